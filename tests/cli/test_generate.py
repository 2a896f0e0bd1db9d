"""``megatron-dmc generate``: texts, the size of the cache, and mistakes."""

import json
import shutil
import subprocess
import sys

import pytest

from megatron_dmc.cli import main
from megatron_dmc.config import DMCConfig
from megatron_dmc.data.sentencepiece_training import train_tokenizer
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.memory_need import DeviceMemory
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


def test_a_cache_of_8_bits(model, capsys):
    arguments = ["generate", "--model", str(model), "--prompt", "def", "--max-new-tokens", "60", "--ignore-eod"]
    held = {}
    for kv_dtype in ("auto", "fp8", "int8"):
        assert main([*arguments, "--kv-dtype", kv_dtype, "--json"]) == 0
        held[kv_dtype] = json.loads(capsys.readouterr().out)["cache"]
        assert held[kv_dtype]["kv_dtype"] == kv_dtype
    assert held["int8"]["uncompressed_bytes"] == held["auto"]["uncompressed_bytes"]
    assert held["int8"]["bytes_ratio"] == pytest.approx(held["int8"]["uncompressed_bytes"] / held["int8"]["bytes"])
    assert main([*arguments, "--kv-dtype", "fp8"]) == 0
    assert "entries in fp8, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--model": "nowhere"}, "nowhere"),
        ({"--kv-dtype": "int4"}, "kv_dtype='int4': must be one of auto, fp8, int8 (auto = as the model)"),
        ({"--prompt": ""}, "prompt 0 is empty"),
        ({"--max-new-tokens": "0"}, "max_new_tokens=0: must be at least 1"),
        ({"--max-new-tokens": "500"}, "the model reads at most 128"),
        ({"--top-p": "2"}, "top_p=2.0: must be in (0, 1]"),
        ({"--temperature": "-1"}, "temperature=-1.0: must be >= 0"),
        ({"--max-sequences": "0"}, "max_sequences=0: must be at least 1"),
        ({"--num-blocks": "3"}, "give the cache more blocks"),
        ({"--tokenizer": "nothing"}, "no tokenizer at nothing"),
        ({"--n": "0"}, "n=0: must be in 1..1024"),
        ({"--n": "99999999999999999999"}, "must be in 1..1024"),
        ({"--top-k": "-2"}, "top_k=-2: must be >= 0"),
        ({"--min-p": "1.5"}, "min_p=1.5: must be in [0, 1]"),
        ({"--repetition-penalty": "0"}, "repetition_penalty=0.0: must be > 0"),
        ({"--stop": ""}, "must be strings that are not empty"),
        ({"--logprobs": "-1"}, "logprobs=-1: must be >= 0"),
        ({"--prefill-chunk": "0"}, "prefill_chunk=0: must be at least 1"),
        ({"--memory-fraction": "0"}, "--memory-fraction 0: must be in (0, 1]"),
        ({"--num-blocks": "99999999999"}, "lower --num-blocks"),
    ],
)
def test_mistakes_exit_with_1(model, changed, message, capsys):
    options = {"--model": str(model), "--prompt": "def", "--max-new-tokens": "20"} | changed
    assert main(["generate", *(word for option in options.items() for word in option)]) == 1
    assert message in capsys.readouterr().err


def test_samples_with_log_probabilities(model, capsys):
    options = ["--prompt", "def", "--prompt", "return x", "--n", "3", "--temperature", "1", "--seed", "4", "--json"]
    options += ["--max-new-tokens", "6", "--ignore-eod", "--logprobs", "2", "--prompt-logprobs"]
    assert main(["generate", "--model", str(model), *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    results = printed["results"]
    assert [(one["prompt"], one["seed"]) for one in results] == [
        (prompt, seed) for seed, prompt in enumerate(["def"] * 3 + ["return x"] * 3, start=4)
    ]
    assert len({tuple(one["tokens"]) for one in results[:3]}) == 3
    for one in results:
        assert [stated["token"] for stated in one["logprobs"]] == one["tokens"]
        assert all(len(stated["top"]) == 2 for stated in one["logprobs"])
        assert one["prompt_logprobs"] == results[0 if one["prompt"] == "def" else 3]["prompt_logprobs"]
    assert len(results[3]["prompt_logprobs"]) > 1
    assert printed["speed"]["prefill_tokens"] < 3 * (2 + sum(len(one["prompt_logprobs"]) for one in results[::3]))


def test_a_stop_string_and_every_setting_at_once(model, capsys):
    arguments = ["generate", "--model", str(model), "--prompt", "def", "--ignore-eod", "--json"]
    arguments += ["--max-new-tokens", "20", "--prefill-chunk", "1"]
    arguments += ["--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.01"]
    arguments += ["--repetition-penalty", "1.1"]
    assert main(arguments) == 0
    text = json.loads(capsys.readouterr().out)["results"][0]["text"]
    assert main([*arguments, "--stop", "never", "--stop", text[5:8]]) == 0
    stopped = json.loads(capsys.readouterr().out)["results"][0]
    assert stopped["text"] == text[: text.index(text[5:8])]
    assert stopped["finish_reason"] == "stop"


def test_one_prompt_is_streamed_to_a_terminal_as_it_is_printed_to_a_file(model, capsys, monkeypatch):
    arguments = ["generate", "--model", str(model), "--prompt", "def", "--ignore-eod", "--max-new-tokens", "10"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "tokens/s; decode: " in printed.err
    pieces = []
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.write", pieces.append, raising=False)
    assert main(arguments) == 0
    monkeypatch.undo()
    assert "".join(pieces) == printed.out
    assert len(pieces) > 10


@pytest.mark.parametrize("command", ["generate --prompt def", "chat", "evaluate --text text.txt"])
def test_a_model_that_does_not_fit_is_refused_before_it_is_read(model, command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    monkeypatch.setattr(DeviceMemory, "of", lambda device: DeviceMemory(100_000, 1 << 30))
    monkeypatch.setattr(Decoder, "_load", None)
    options = {"generate": ["--max-new-tokens", "9"], "chat": ["--chat-template", "template.jinja"], "evaluate": []}
    words = command.split()
    assert main([*words, "--model", str(model), *options[words[0]]]) == 1
    said = capsys.readouterr().err
    assert "of weights" in said
    assert "lower --" in said


def test_the_memory_fraction_sizes_the_cache_and_changes_no_text(model, capsys, monkeypatch):
    prompts = [word for prompt in ("def", "return", "x * 3", "step") for word in ("--prompt", prompt)]
    arguments = ["generate", "--model", str(model), *prompts, "--max-new-tokens", "60", "--ignore-eod", "--json"]
    arguments += ["--prefill-chunk", "8", "--block-size", "4"]
    assert main(arguments) == 0
    expected = json.loads(capsys.readouterr().out)
    sizes, make = [], Engine.__init__

    def noted(self, *args, num_blocks, **options):
        sizes.append(num_blocks)
        make(self, *args, num_blocks=num_blocks, **options)

    monkeypatch.setattr(Engine, "__init__", noted)
    for fraction in ("0.9", "0.48"):
        monkeypatch.setattr(DeviceMemory, "of", lambda device: DeviceMemory(800_000, 1_000_000))
        assert main([*arguments, "--memory-fraction", fraction]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [one["tokens"] for one in found["results"]] == [one["tokens"] for one in expected["results"]]
    assert sizes[0] > 2 * sizes[1]
    # Four texts of 60 tokens and more would need 4 heads times 16 blocks each, without compression.
    assert sizes[1] < 4 * 4 * 16


def test_a_prompt_that_fails_leaves_the_others_alone(model, tmp_path, capsys):
    long = "def step_7(x): " * 40
    options = ["--max-new-tokens", "5", "--ignore-eod", "--n", "2", "--json"]
    prompts = ["--prompt", "def", "--prompt", long, "--prompt", "return"]
    assert main(["generate", "--model", str(model), *prompts, *options]) == 1
    printed = capsys.readouterr()
    results = json.loads(printed.out)["results"]
    assert [one["finish_reason"] for one in results] == ["length"] * 2 + ["error"] * 2 + ["length"] * 2
    assert "2 of 6 texts failed: prompt 1 has" in printed.err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"dmc": None}, "dmc"),
        ({"vocab_size": 999}, "config.json asks for"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"hidden_size": "32"}, "hidden_size"),
        (b"", "truncated"),
        (b"\x00" * 100, "model.safetensors"),
    ],
)
@pytest.mark.parametrize("command", ["generate --prompt def --max-new-tokens 3", "chat --chat-template template.jinja"])
def test_a_damaged_directory_is_refused_in_one_line(model, tmp_path, monkeypatch, capsys, damage, message, command):
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    if isinstance(damage, bytes):
        (tmp_path / "model" / "model.safetensors").write_bytes(damage)
    else:
        config = json.loads((tmp_path / "model" / "config.json").read_text()) | damage
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert main([*command.split(), "--model", "model"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]
    assert all(line.startswith("memory: about ") for line in said[:-1])


def test_a_tokenizer_larger_than_the_vocabulary(model, tmp_path, capsys):
    train_tokenizer([TEXT], 310, tmp_path)
    arguments = ["generate", "--model", str(model), "--prompt", "def", "--tokenizer", str(tmp_path)]
    assert main(arguments) == 1
    assert "the tokenizer has 310 ids, the model's vocabulary 300" in capsys.readouterr().err
