"""The two sides of ``training_transformers``, each in a process of its own that takes a step when it is told to.

Every line on standard input asks for one step; every line on standard output is the seconds that one took: forward,
backward, clipping, the optimizer and the cleared gradients. What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from megatron_dmc.support.threads import wait_briefly

LEARNING_RATE = 1e-5
CLIP = 1.0


class Turns:
    """Steps taken on request."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def timed(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """``step``, which waits for its turn and answers with its seconds."""

        def taken(*args: Any, **kwargs: Any) -> Any:
            sys.stdin.readline()
            start = time.perf_counter()
            result = step(*args, **kwargs)
            print(time.perf_counter() - start, file=self._answers, flush=True)
            return result

        return taken


def megatron_dmc(turns: Turns, flags: list[str]) -> None:
    """Steps of ``megatron-dmc train``.

    Args:
        turns: when a step is taken.
        flags: of the command.
    """
    wait_briefly()  # as the command does, before torch is loaded
    from megatron_dmc.seam import host

    host.use_cpu()
    from megatron.training import training as engine

    from megatron_dmc.training.pretrain import train

    engine.train_step = turns.timed(engine.train_step)
    train(flags)


def transformers(turns: Turns, model: str, dtype: str, length: int, steps: int) -> None:
    """The same steps in plain PyTorch: one sequence, AdamW over weights in float32.

    Args:
        turns: when a step is taken.
        model: Hugging Face directory.
        dtype: ``float32`` or ``bfloat16``, in which it computes.
        length: tokens of the sequence.
        steps: how many.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).train()
    weights = list(model.parameters())
    masters = weights if dtype == "float32" else [w.detach().float().requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE)

    def step() -> None:
        tokens = torch.randint(0, model.config.vocab_size, (1, length))
        model(input_ids=tokens, labels=tokens).loss.backward()
        if masters is not weights:
            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if masters is not weights:
            with torch.no_grad():
                for master, weight in zip(masters, weights, strict=True):
                    weight.copy_(master)

    for _ in range(steps):
        turns.timed(step)()


if __name__ == "__main__":
    SIDES = {"megatron_dmc": megatron_dmc, "transformers": transformers}
    SIDES[sys.argv[1]](Turns(), **json.loads(sys.argv[2]))
