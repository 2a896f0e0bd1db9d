"""Text from the exported model, loaded by a new process, as a user would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_dmc.support.errors import InfrastructureError


def generate_in_new_process(model: Path, prompt: str, max_new_tokens: int) -> dict[str, Any]:
    """What ``megatron-dmc generate --json`` says: the text, and the cache beside an uncompressed one.

    Raises:
        InfrastructureError: the process failed.
    """
    command = [sys.executable, "-m", "megatron_dmc", "generate", "--json", "--model", str(model)]
    command += ["--prompt", prompt, "--max-new-tokens", str(max_new_tokens)]
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise InfrastructureError(f"{' '.join(command[1:])} failed:\n{finished.stderr}")
    result: dict[str, Any] = json.loads(finished.stdout)
    return result
