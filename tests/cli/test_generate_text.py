"""``megatron-dmc generate`` with tokenizers as they are published: where texts begin and end, and that none is lost."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from megatron_dmc.cli import main
from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.models.hugging_face import to_hf_config
from tests.data.tokenizer.directories import byte_level_directory, ranks_directory, sentencepiece_directory, write
from tests.inference.tiny_model import RandomSource, tiny_llama


def write_model(folder, answer, more_rows=0, **ids):
    """A model for the tokenizer in ``folder`` that answers everything with one token; the tokenizer."""
    tokenizer = load_tokenizer(folder)
    source = RandomSource(tiny_llama(vocab_size=tokenizer.vocab_size + more_rows, tie_word_embeddings=False))
    for name, tensor in source.tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            tensor.zero_()
    source.tensors["model.embed_tokens.weight"].fill_(0.5)
    source.tensors["lm_head.weight"][answer] = 1.0
    save_file(source.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write(folder / "config.json", to_hf_config(source.config, None, **ids))
    return tokenizer


def generate(capsys, folder, *options, new_tokens=3):
    """The result of ``--json`` for one prompt, and what was said beside it."""
    assert main(["generate", "--model", str(folder), "--max-new-tokens", str(new_tokens), "--json", *options]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_the_space_between_prompt_and_text_is_not_lost(tmp_path, capsys):
    sentencepiece_directory(tmp_path)
    word = load_tokenizer(tmp_path).encode("over the")[-1]
    write_model(tmp_path, word)
    result, _ = generate(capsys, tmp_path, "--prompt", "over")
    assert result["results"][0]["text"] == " the the the"
    assert main(["generate", "--model", str(tmp_path), "--prompt", "over", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("over the the the\n")


def test_an_added_token_ends_the_text(tmp_path, capsys):
    end = sentencepiece_directory(tmp_path)
    write_model(tmp_path, end)
    result, said = generate(capsys, tmp_path, "--prompt", "the fox")
    assert result["results"][0]["finish_reason"] == "eod"
    assert result["results"][0]["text"] == ""
    assert f"a text ends at <|im_end|> ({end})" in said
    result, _ = generate(capsys, tmp_path, "--prompt", "the fox", "--ignore-eod")
    assert result["results"][0]["tokens"] == [end] * 3


def test_a_token_that_nobody_has_is_left_out_and_named(tmp_path, capsys):
    sentencepiece_directory(tmp_path)
    nobody = load_tokenizer(tmp_path).vocab_size + 4
    write_model(tmp_path, nobody, more_rows=8)
    result, said = generate(capsys, tmp_path, "--prompt", "the fox")
    assert result["results"][0]["text"] == ""
    assert result["results"][0]["tokens"] == [nobody] * 3
    assert f"left out of the texts: [{nobody}]" in said


def test_an_added_token_without_a_row_is_refused_only_where_it_is_used(tmp_path, capsys):
    """Many directories add <pad> behind the last row of the model."""
    sentencepiece_directory(tmp_path)
    write_model(tmp_path, 5)
    pad = load_tokenizer(tmp_path).vocab_size
    write(tmp_path / "added_tokens.json", {"<pad>": pad})
    result, said = generate(capsys, tmp_path, "--prompt", "the fox")
    assert len(result["results"][0]["tokens"]) == 3
    assert "the model has no row for the added tokens <pad>" in said
    assert main(["generate", "--model", str(tmp_path), "--prompt", "the<pad>"]) == 1
    assert f"holds token {pad}" in capsys.readouterr().err


@pytest.mark.parametrize("directory", [byte_level_directory, ranks_directory])
def test_every_end_token_of_the_generation_config_ends_a_text(tmp_path, capsys, directory):
    directory(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    (turn,) = tokenizer.encode("<|eot_id|>")
    write_model(tmp_path, turn, bos_token_id=tokenizer.first[0], eos_token_id=tokenizer.eod)
    result, _ = generate(capsys, tmp_path, "--prompt", "Hello")
    assert result["results"][0]["finish_reason"] == "length"
    write(tmp_path / "generation_config.json", {"eos_token_id": [tokenizer.eod, turn]})
    result, said = generate(capsys, tmp_path, "--prompt", "Hello")
    assert result["results"][0]["finish_reason"] == "eod"
    assert result["results"][0]["tokens"] == []
    assert result["end_tokens"]["ids"] == [tokenizer.eod, turn]
    assert result["tokenizer"] == {"file": str(tokenizer.path), "first_tokens": tokenizer.first}
    assert f"a prompt begins with <|begin_of_text|> ({tokenizer.first[0]})" in said


def test_half_a_character_is_replaced_and_the_rest_is_kept(tmp_path, capsys):
    byte_level_directory(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    write_model(tmp_path, tokenizer.encode("\u6771")[0])
    result, _ = generate(capsys, tmp_path, "--prompt", "hi")
    assert result["results"][0]["text"] == "\ufffd" * 3


def test_prompts_keep_their_separators(tmp_path, capsys):
    sentencepiece_directory(tmp_path)
    write_model(tmp_path, 5)
    path = tmp_path / "prompts.txt"
    path.write_bytes("the quick\u2028brown fox\nthe lazy dog\n".encode())
    result, _ = generate(capsys, tmp_path, "--prompts-file", str(path))
    assert [one["prompt"] for one in result["results"]] == ["the quick\u2028brown fox", "the lazy dog"]


@pytest.mark.parametrize("option", ["--prompt", "--prompts-file"])
def test_bytes_that_are_no_text_are_refused_before_the_model_is_read(tmp_path, option):
    (tmp_path / "p.txt").write_bytes(b"caf\xe9\n")
    given = b"caf\xe9" if option == "--prompt" else "p.txt"
    command = [sys.executable, "-m", "megatron_dmc", "generate", "--model", "nowhere", option, given]
    finished = subprocess.run(command, capture_output=True, cwd=tmp_path, check=False)
    assert finished.returncode == 1
    (message,) = finished.stderr.decode().splitlines()
    assert "is not UTF-8 text" in message
    assert ("p.txt" if option == "--prompts-file" else "--prompt number 1") in message


def test_a_terminal_without_the_letter_loses_no_text(tmp_path):
    byte_level_directory(tmp_path)
    write_model(tmp_path, load_tokenizer(tmp_path).encode("a")[0])
    command = [sys.executable, "-m", "megatron_dmc", "generate", "--model", str(tmp_path), "--max-new-tokens", "2"]
    finished = subprocess.run(
        [*command, "--prompt", "caf\u00e9 \u6771"],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert finished.stdout.startswith(b"caf? ?aa\n")
