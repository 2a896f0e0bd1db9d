"""pass@1: the share of questions whose first program passes its tests.

Questions have the format of HumanEval (arXiv 2107.03374): ``prompt``, ``test`` and ``entry_point``. One program a
question is generated greedily, so pass@1 is the plain share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_dmc.data.tokenizer import Tokenizer
from megatron_dmc.evaluation.estimate import Estimate
from megatron_dmc.evaluation.harness.continuations import Scorer
from megatron_dmc.evaluation.harness.generation import generate
from megatron_dmc.evaluation.harness.programs import isolation, run_program
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.sampling import SamplingParams

FIELDS = ["task_id", "prompt", "test", "entry_point"]
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""A completion ends before these, as in HumanEval."""
MAX_NEW_TOKENS = 512


def pass_at_1(
    scorer: Scorer, tokenizer: Tokenizer, end_tokens: frozenset[int], questions: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Generate, **execute**, and count; ready for JSON.

    Args:
        scorer: of the model, whose batch size and cache are used.
        tokenizer: of the model.
        end_tokens: each ends a program.
        questions: records with :data:`FIELDS`.
    """
    sampling = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, end_tokens=end_tokens, stop=STOPS)
    requests = [Request(tokenizer.encode_prompt(question["prompt"]), sampling) for question in questions]
    generate(scorer, tokenizer, requests)
    outcomes = [
        run_program(program(question, request.text)) for question, request in zip(questions, requests, strict=True)
    ]
    passed = Estimate.of(torch.tensor([outcome.passed for outcome in outcomes], dtype=torch.float64))
    return {
        "metrics": {"pass@1,none": passed.mean, "pass@1_stderr,none": passed.standard_error},
        "num_questions": len(questions),
        "form": "plain text",
        "isolation": isolation(),
        "outcomes": [
            {"task_id": question["task_id"], "completion": request.text, "reason": outcome.reason}
            for question, request, outcome in zip(questions, requests, outcomes, strict=True)
        ],
    }


def program(question: dict[str, Any], completion: str) -> str:
    """The whole program: prompt, completion, tests, and their call."""
    return f"{question['prompt']}{completion}\n{question['test']}\ncheck({question['entry_point']})\n"
