"""``megatron-dmc generate``: texts, the size of the cache, and mistakes."""

import json
import subprocess
import sys

import pytest

from megatron_dmc.cli import main
from megatron_dmc.config import DMCConfig
from megatron_dmc.data.sentencepiece_training import train_tokenizer
from tests.inference.model_directory import TEXT, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("generate") / "model"
    write_model(directory, DMCConfig(decision_bias=-1.0))
    return directory


def test_texts_and_cache_in_a_new_process(model):
    command = [sys.executable, "-m", "megatron_dmc", "generate", "--model", str(model), "--max-new-tokens", "20"]
    prompts = ["--prompt", "def step_7(x):", "--prompt", "    return", "--ignore-eod"]
    finished = subprocess.run([*command, *prompts], capture_output=True, text=True, check=True)
    assert finished.stdout.startswith("def step_7(x):")
    assert "\n\n    return" in finished.stdout
    last_line = finished.stdout.splitlines()[-1]
    assert last_line.startswith("cache: ")
    assert "uncompressed: " in last_line


def test_json_from_a_file_of_prompts(model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("def\n\nreturn x * 3\n")
    arguments = ["generate", "--model", str(model), "--prompts-file", str(tmp_path / "prompts.txt"), "--json"]
    options = ["--max-new-tokens", "30", "--ignore-eod", "--temperature", "0.8", "--top-p", "0.9", "--seed", "5"]
    assert main([*arguments, *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [result["prompt"] for result in printed["results"]] == ["def", "return x * 3"]
    for result in printed["results"]:
        assert len(result["tokens"]) == 30
        assert result["finish_reason"] == "length"
    assert printed["cache"]["compression_ratio"] > 1.2
    assert printed["cache"]["bytes"] == sum(result["cache"]["bytes"] for result in printed["results"])
    speed = printed.pop("speed")
    assert speed["decode_tokens"] == 2 * 29
    assert speed["decode_tokens_per_second"] > 0
    assert main([*arguments, *options]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again.pop("speed").keys() == speed.keys()
    assert again == printed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--model": "nowhere"}, "nowhere"),
        ({"--prompt": ""}, "prompt 0 is empty"),
        ({"--max-new-tokens": "0"}, "max_new_tokens=0: must be at least 1"),
        ({"--max-new-tokens": "500"}, "the model reads at most 128"),
        ({"--top-p": "2"}, "top_p=2.0: must be in (0, 1]"),
        ({"--temperature": "-1"}, "temperature=-1.0: must be >= 0"),
        ({"--max-sequences": "0"}, "max_sequences=0: must be at least 1"),
        ({"--num-blocks": "3"}, "give the cache more blocks"),
        ({"--tokenizer": "nothing"}, "no tokenizer at nothing"),
    ],
)
def test_mistakes_exit_with_1(model, changed, message, capsys):
    options = {"--model": str(model), "--prompt": "def", "--max-new-tokens": "20"} | changed
    assert main(["generate", *(word for option in options.items() for word in option)]) == 1
    assert message in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_vocabulary(model, tmp_path, capsys):
    train_tokenizer([TEXT], 310, tmp_path)
    arguments = ["generate", "--model", str(model), "--prompt", "def", "--tokenizer", str(tmp_path)]
    assert main(arguments) == 1
    assert "the tokenizer has 310 ids, the model's vocabulary 300" in capsys.readouterr().err
