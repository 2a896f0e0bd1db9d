"""Task files: the shipped ones are whole, and what is missing in a file is said in one message."""

import json

import pytest

from megatron_dmc.evaluation.harness.task_files import read_records, read_task, shipped_names
from tests.evaluation.harness.benchmark_files import write_benchmarks

yaml = pytest.importorskip("yaml", reason="task files are YAML, which comes with the extra [eval]")

TASK = {
    "task": "mine",
    "dataset_kwargs": {"data_files": {"test": "mine.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
    "metadata": {"fields": ["question", "answer"]},
}


def write_task(folder, task):
    (folder / "mine.yaml").write_text(task if isinstance(task, str) else yaml.safe_dump(task))
    return str(folder / "mine.yaml")


def test_every_shipped_task_reads_its_file(tmp_path):
    names = ["arc_challenge", "arc_easy", "boolq", "gsm8k", "hellaswag", "mmlu", "piqa", "winogrande"]
    assert shipped_names() == names
    data = write_benchmarks(tmp_path)
    tasks = [task for name in names for task in read_task(name, data)]
    assert [task.name for task in tasks if task.group == "mmlu"] == ["mmlu_algebra", "mmlu_virology"]
    assert all(task.records for task in tasks)
    assert not any("dataset_kwargs" in task.config for task in tasks)


def test_a_task_of_ones_own(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"question": "a", "answer": 1}\n\n{"question": "b", "answer": 0}\n')
    (task,) = read_task(write_task(tmp_path, TASK), tmp_path)
    assert task.name == task.group == "mine"
    assert [record["question"] for record in task.records["test"]] == ["a", "b"]


@pytest.mark.parametrize("field", [name for name in TASK if name not in ("metadata", "test_split")])
def test_a_missing_field_is_named(tmp_path, field):
    task = {name: value for name, value in TASK.items() if name != field}
    with pytest.raises(ValueError, match=f"mine.yaml lacks {field}: a task file needs task, dataset_kwargs"):
        read_task(write_task(tmp_path, task), tmp_path)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TASK | {"dataset_kwargs": {}}, "lacks dataset_kwargs.data_files"),
        (TASK | {"dataset_kwargs": 3}, "lacks dataset_kwargs.data_files"),
        (TASK | {"dataset_kwargs": {"data_files": {"test": ["a", "b"]}}}, "give one path below --data-dir"),
        (TASK | {"dataset_kwargs": {"data_files": {"test": "/a/{subject}"}}}, "give one path below --data-dir"),
        (TASK | {"metadata": 3}, "gives 3 as metadata"),
        (TASK | {"test_split": "train"}, "names the split train, for which data_files has no file"),
        (TASK | {"test_split": None}, "lacks test_split"),
        ("[1, 2]", "is no task file"),
        ("task: !function utils.f", "is no task file that can be read.*write Jinja"),
        (TASK, "mine.jsonl is missing"),
        (
            TASK | {"dataset_kwargs": {"data_files": {"test": "s/{subject}.jsonl"}}},
            r"holds no file s/\{subject\}.jsonl",
        ),
    ],
)
def test_task_files_that_do_not_do(tmp_path, task, message):
    with pytest.raises(ValueError, match=message):
        read_task(write_task(tmp_path, task), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a"}\n', "record 1 lacks answer: a record has question, answer"),
        ('{"question": "a", "answer": 1}\n7\n', "record 2 lacks question, answer"),
        ("{", "is no JSON"),
        ("", "holds no record"),
        (b"\xff\xfe{}", "is no JSON"),
    ],
)
def test_records_that_do_not_do(tmp_path, text, message):
    (tmp_path / "mine.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_task(write_task(tmp_path, TASK), tmp_path)


def test_records_in_a_list(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([{"a": 1}, {"a": 2}]))
    assert read_records(tmp_path / "list.json", ["a"]) == [{"a": 1}, {"a": 2}]
