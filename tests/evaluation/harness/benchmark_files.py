"""A tiny made-up file for every shipped task, in the format of its benchmark."""

import json
from pathlib import Path

MMLU = {"question": "What is x?", "choices": ["one", "two", "three", "four"], "answer": 2}
GSM8K = {"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"}
ARC = {"question": "Which is hot?", "choices": {"text": ["sun", "ice"], "label": ["A", "B"]}, "answerKey": "A"}
HELLASWAG = {
    "activity_label": "Cooking",
    "ctx_a": "A man cooks [title] He",
    "ctx_b": "then",
    "endings": ["eats [step] it.", " flies.", "sleeps.", "swims."],
    "label": "0",
}
WINOGRANDE = {
    "sentence": "The cup fell off the table because _ was small.",
    "option1": "the cup",
    "option2": "the table",
    "answer": "2",
}
HUMANEVAL = {
    "task_id": "made-up/0",
    "prompt": "def one():\n",
    "test": "def check(f):\n    assert f() == 1\n",
    "entry_point": "one",
}
RECORDS = {
    "mmlu/algebra_test": [MMLU, MMLU | {"answer": 0}],
    "mmlu/algebra_dev": [MMLU] * 5,
    "mmlu/virology_test": [MMLU],
    "mmlu/virology_dev": [MMLU] * 5,
    "piqa": [{"goal": "open a jar", "sol1": "turn the lid", "sol2": "eat it", "label": 0}],
    "arc_easy": [ARC],
    "arc_challenge": [ARC],
    "hellaswag": [HELLASWAG],
    "winogrande": [WINOGRANDE],
    "boolq": [{"passage": "The sky is blue.", "question": "is the sky blue", "label": 1}],
    "gsm8k_train": [GSM8K] * 6,
    "gsm8k_test": [GSM8K],
    "humaneval": [HUMANEVAL],
}


def write_benchmarks(folder: Path) -> Path:
    """All of them, as ``--data-dir`` has them."""
    for name, records in RECORDS.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
