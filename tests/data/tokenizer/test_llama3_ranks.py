"""Llama 3's own file of ranks: the ids of tiktoken, which it was written for."""

import base64
import json

import pytest

from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.data.tokenizer.llama3_ranks import NUM_RANKS, WORDS, Llama3RanksTokenizer
from tests.data.tokenizer.directories import (
    PROBES,
    byte_level_directory,
    ranks_directory,
    ranks_file,
)


def test_ids_are_those_of_tiktoken(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = ranks_directory(tmp_path)
    reference = tiktoken.Encoding("test", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    tokenizer = load_tokenizer(tmp_path)
    for text in (*PROBES, " the", "  the  \n\n  fox", "THE Fox's 12345"):
        if "<|" not in text:
            assert tokenizer.encode(text) == reference.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_json_of_the_same_directory_counts(tmp_path):
    ids = byte_level_directory(tmp_path)
    ranks_file(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.path.name == "tokenizer.json"
    assert tokenizer.encode_prompt("hi")[0] == ids["<|begin_of_text|>"]


def test_special_tokens_of_llama_3_follow_its_ranks(tmp_path):
    """As many ranks as Llama 3's: all bytes, all pairs of bytes, triples."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [left + right for left in tokens[:256] for right in tokens[:256]]
    tokens += [pair + b"a" for pair in tokens[256 : NUM_RANKS - len(tokens) + 256]]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 128_256
    named = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert tokenizer.encode("".join(named)) == [128_000, 128_001, 128_006, 128_007, 128_009]
    assert tokenizer.token(128_255) == "<|reserved_special_token_247|>"
    assert tokenizer.encode_prompt("hi")[0] == 128_000
    assert tokenizer.eod == 128_001


@pytest.mark.parametrize(("says", "first"), [(True, 1), (None, 1), (False, 0)])
def test_a_prompt_begins_as_llama_3_was_trained(tmp_path, says, first):
    ranks_directory(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": says}))
    assert len(load_tokenizer(tmp_path).first) == first


def test_ranks_of_another_model_need_their_special_tokens(tmp_path):
    ranks_file(tmp_path)
    with pytest.raises(ValueError, match=r"Llama 3 has 128000: put the model's tokenizer.json beside it"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "???? 7\n", "is not 'base64 rank'"),
        (lambda text: text + "YQ==\n", "is not 'base64 rank'"),
        (lambda text: text.split("\n", 1)[1], "holds no whole vocabulary"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    ranks_directory(tmp_path)
    path = tmp_path / "tokenizer.model"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        Llama3RanksTokenizer(path)
