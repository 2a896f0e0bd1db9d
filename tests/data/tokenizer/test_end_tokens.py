"""Several tokens may end a text; who states them is said."""

import pytest

from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.data.tokenizer.end_tokens import end_tokens
from tests.data.tokenizer.directories import byte_level_directory, qwen_directory, write


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level_directory(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, {7, 8}),
        ({"eos_token_id": 7}, {"eos_token_id": [8, 9]}, {7}),
        (None, {"eos_token_id": [8, 9]}, {8, 9}),
        ({}, {"eos_token_id": 9}, {9}),
        ({"eos_token_id": None}, {}, set()),
        (None, None, set()),
    ],
)
def test_the_generation_config_counts_then_the_config_and_always_the_tokenizer(
    tokenizer, tmp_path, generation, config, expected
):
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            write(tmp_path / name, value)
    found = end_tokens(tmp_path, tokenizer)
    assert found.ids == expected | {tokenizer.eod}
    assert found.stated_by == (f"the model's configuration in {tmp_path}" if expected else str(tokenizer.path))


def test_what_stands_beside_the_tokenizer_counts_where_the_model_says_nothing(tmp_path):
    byte_level_directory(tmp_path)
    write(tmp_path / "generation_config.json", {"eos_token_id": [3, 4]})
    tokenizer = load_tokenizer(tmp_path)
    assert end_tokens(tmp_path / "no_such_folder", tokenizer).ids == {3, 4, tokenizer.eod}


def test_qwen_ends_a_turn_and_a_text_and_begins_with_neither(tmp_path):
    """Its generation config names a bos token that its tokenizer does not put before a text."""
    ids = qwen_directory(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert end_tokens(tmp_path, tokenizer).ids == {ids["<|im_end|>"], ids["<|endoftext|>"]}
    assert tokenizer.first == []
    assert tokenizer.encode_prompt("<think>the fox") == [ids["<think>"], *tokenizer.encode("the fox")]
    assert tokenizer.decode([ids["<think>"], ids["<|im_end|>"]]) == "<think>"


def test_something_else_than_ids_is_refused(tokenizer, tmp_path):
    write(tmp_path / "generation_config.json", {"eos_token_id": ["</s>"]})
    with pytest.raises(ValueError, match="eos_token_id.*is not a token id"):
        end_tokens(tmp_path, tokenizer)
