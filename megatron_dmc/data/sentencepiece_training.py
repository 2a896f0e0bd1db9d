"""Trains a byte-pair tokenizer whose round trip is exact, and writes it in both formats that Llama directories hold."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_dmc.data.tokenizer.base import JSON_FILE, MODEL_FILE
from megatron_dmc.support.files import write_json

PIECE_CHARACTERS = 2000
"""Training reads documents in pieces of whole lines of about this length."""
MAX_PIECE_BYTES = 1 << 20
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Train a tokenizer on ``texts`` and write it to the existing ``directory``.

    White space, tabs and line ends are kept as they are; what the vocabulary lacks falls back to bytes.

    Raises:
        ValueError: a vocabulary that the texts cannot fill, or too small for the bytes.
    """
    from sentencepiece import SentencePieceTrainer

    if vocab_size <= SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocabulary of {vocab_size}: must be above {SMALLEST_VOCABULARY} (256 bytes, 3 special tokens)"
        )
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_pieces(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=MAX_PIECE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"sentencepiece cannot train a vocabulary of {vocab_size} on this text: {error}") from error
    (directory / MODEL_FILE).write_bytes(model.getvalue())
    _write_hugging_face(model.getvalue(), directory)


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        piece = ""
        for line in text.splitlines(keepends=True):
            if piece and len(piece) + len(line) > PIECE_CHARACTERS:
                yield piece
                piece = ""
            piece += line
        if piece:
            yield piece


def _write_hugging_face(model: bytes, directory: Path) -> None:
    """The same vocabulary as ``tokenizer.json``: pieces in the order of their ids, merges in that of their scores."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(token) for token in range(processor.vocab_size())]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    unspace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    write_json(
        directory / JSON_FILE,
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": vocabulary[token], "content": token, **special} for token in SPECIAL_TOKENS],
            "normalizer": space,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [unspace, {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {
                "type": "BPE",
                "unk_token": "<unk>",
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": vocabulary,
                "merges": _merges(pieces, vocabulary),
            },
        },
    )
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "clean_up_tokenization_spaces": False,
        },
    )
    ids = {"bos_token_id": vocabulary["<s>"], "eos_token_id": vocabulary["</s>"]}
    write_json(directory / "generation_config.json", ids)


def _merges(pieces: list[str], vocabulary: dict[str, int]) -> list[list[str]]:
    """Every pair of pieces that joins to a piece; sentencepiece numbers merged pieces in the order of their merges."""
    return [
        [piece[:cut], piece[cut:]]
        for piece in pieces[SMALLEST_VOCABULARY:]
        for cut in range(1, len(piece))
        if vocabulary.get(piece[:cut], 0) >= SMALLEST_VOCABULARY
        and vocabulary.get(piece[cut:], 0) >= SMALLEST_VOCABULARY
    ]
