"""transformers' AutoTokenizer reads the same ids from the same directories."""

import pytest

from megatron_dmc.data.tokenizer import load_tokenizer
from tests.data.tokenizer.directories import (
    PROBES,
    auto_tokenizer,
    byte_level_directory,
    qwen_directory,
    ranks_directory,
    sentencepiece_directory,
)


def sentencepiece_and_json(folder):
    """The same with the tokenizer.json that transformers makes of it."""
    sentencepiece_directory(folder)
    auto_tokenizer(folder).save_pretrained(folder)


KINDS = [sentencepiece_directory, sentencepiece_and_json, byte_level_directory, ranks_directory, qwen_directory]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder)
    return load_tokenizer(folder), auto_tokenizer(folder)


@pytest.mark.parametrize("text", PROBES)
def test_ids_of_documents(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", [text for text in PROBES if not text.startswith("<")])
def test_ids_of_prompts(pair, text):
    ours, theirs = pair
    ids = theirs(text)["input_ids"]
    # transformers makes no template of ranks: Llama 3's first token comes from its tokenizer.json alone.
    assert ours.encode_prompt(text) == (ids if ids[:1] == ours.first else [*ours.first, *ids])


@pytest.mark.parametrize("text", PROBES)
def test_texts_of_ids(pair, text):
    ours, theirs = pair
    ids = theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_sizes_and_end_of_document(pair):
    ours, theirs = pair
    assert ours.vocab_size == len(theirs)
    assert ours.eod == theirs.eos_token_id


def test_a_leading_space_is_kept_where_a_text_goes_on(pair):
    ours, theirs = pair
    for text in ("<|im_end|> the", "<|im_end|>\nthe", "<|eot_id|>  the"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_old_sentencepiece_puts_a_space_before_every_piece_of_text(tmp_path):
    sentencepiece_directory(tmp_path, legacy=True)
    ours, theirs = load_tokenizer(tmp_path), auto_tokenizer(tmp_path)
    for text in PROBES:
        # Before a space transformers 5 puts none; sentencepiece, and transformers before, do.
        if "> " not in text:
            assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    space = ours.encode("  ")[:1]
    assert ours.encode("<|im_end|> the") == [ours.eod, *space, *theirs("the", add_special_tokens=False)["input_ids"]]


def test_a_text_that_begins_with_a_space_is_read_as_sentencepiece_reads_it(tmp_path):
    """Llama 2 was trained so; transformers 5 drops one of the two spaces."""
    from sentencepiece import SentencePieceProcessor

    sentencepiece_directory(tmp_path)
    reference = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in (" the", "  the fox", " \n"):
        ids = load_tokenizer(tmp_path).encode(text)
        assert ids == reference.encode(text)
        assert load_tokenizer(tmp_path).decode(ids) == text
