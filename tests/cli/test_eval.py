"""``megatron-dmc eval``: generated tasks, pictures, and what it refuses before work starts."""

import importlib.util
import json

import pytest

from megatron_dmc.cli import eval_harness, main
from megatron_dmc.config import DMCConfig
from megatron_dmc.evaluation.perplexity import DECODE, TEACHER_FORCED
from megatron_dmc.evaluation.tasks import TASKS
from tests.evaluation.harness.benchmark_files import write_benchmarks
from tests.inference.model_directory import write_model

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("eval") / "model"
    write_model(directory, DMCConfig(decision_bias=-1.0), max_position_embeddings=1024)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def arguments(model, *options):
    return ["eval", "--model", str(model), *options]


def test_generated_tasks_and_their_pictures(model, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need the extra [plot]")
    options = ["--tasks", "passkey,variable_tracking", "--lengths", "500,600", "--depths", "3", "--seeds", "0,1"]
    assert main(arguments(model, *options, "--output", str(tmp_path / "out"), "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"passkey.png"}
    assert (result["form"], result["path_of_texts"]) == ("plain text", "decode")
    assert (result["method"], result["standard_tasks"]) == ("dmc", None)
    found = result["generated_tasks"]
    assert [(one["task"], one["length"], one["num_questions"]) for one in found] == [
        (task, length, 6) for task in ("passkey", "variable_tracking") for length in (500, 600)
    ]
    assert [depth for depth, _ in found[0]["score_by_depth"]] == [0, 0.5, 1]
    assert all(1.2 < one["compression_ratio"] < 8 for one in found)
    assert found[0]["entries_at_the_end"] < 500 / 1.2


def test_a_question_in_the_chat_template(model, capsys):
    options = ["--tasks", "niah", "--lengths", "600", "--depths", "1", "--chat"]
    assert main(arguments(model, *options, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["form"] == "chat template"


def test_a_table_for_people(model, capsys):
    options = ["--tasks", ",".join(TASKS), "--lengths", "700", "--depths", "1", "--policy", "h2o", "--budget", "64"]
    assert main(arguments(model, *options)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["task", *TASKS]
    # The answer's last token is never read.
    assert all(line.split()[-2] in ("64.0", "65.0") for line in printed[1:])


def test_generated_programs(model, tmp_path, capsys):
    data = write_benchmarks(tmp_path)
    options = ["--tasks", "humaneval", "--data-dir", str(data), "--json"]
    assert main(arguments(model, *options)) == 1
    assert "allow it with --execute-generated-code" in capsys.readouterr().err
    assert main(arguments(model, *options, "--execute-generated-code")) == 0
    found = json.loads(capsys.readouterr().out)["standard_tasks"]["tasks"]["humaneval"]
    assert found["metrics"]["pass@1,none"] == 0.0
    assert found["outcomes"][0]["task_id"] == "made-up/0"


def test_the_parser_offers_every_path():
    assert eval_harness.PATHS == (TEACHER_FORCED, DECODE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "chess"], "task 'chess': must be one of passkey, niah"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "niah", "--lengths", "600", "--max-sequences", "0"], "max_sequences=0: must be at least 1"),
        (["--tasks", "piqa"], "give the folder of the JSON files with --data-dir"),
        (["--tasks", "piqa", "--data-dir", ".", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--tasks", "piqa", "--data-dir", ".", "--num-fewshot", "-1"], "--num-fewshot -1: must be at least 0"),
        (["--tasks", "niah", "--lengths", "2000"], "--lengths 2000: the model reads at most 1024 tokens"),
        (["--tasks", "niah", "--lengths", "50"], "task niah at length 50: the question alone takes"),
        (["--tasks", "niah", "--lengths", "600", "--depths", "0"], "depths=0: must be at least 1"),
    ],
)
def test_mistakes_exit_with_1(model, options, message, capsys):
    assert main(arguments(model, *options)) == 1
    assert message in capsys.readouterr().err


def test_the_harness_is_asked_for_by_the_name_of_its_extra(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(arguments(model, "--tasks", "piqa", "--data-dir", str(tmp_path))) == 1
    assert "pip install 'megatron_dmc[eval]'" in capsys.readouterr().err
