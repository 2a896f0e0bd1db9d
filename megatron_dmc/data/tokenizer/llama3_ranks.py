"""Llama 3's own ``tokenizer.model``: a line ``base64 rank`` per token of a byte-level byte-pair encoding (tiktoken)."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dmc.data.tokenizer.base import MODEL_FILE
from megatron_dmc.data.tokenizer.config import AddedToken, TokenizerConfig, read_tokenizer_config
from megatron_dmc.data.tokenizer.hugging_face import BackendTokenizer, tokenizers_package

if TYPE_CHECKING:
    import tokenizers

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's pattern of words, inside which pieces are merged."""
NUM_RANKS = 128_000
"""Of Llama 3, whose special tokens are known; they follow the ranks."""
SPECIAL_TOKENS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
"""Places of Llama 3.1's special tokens that have a use; the others are reserved ones, numbered."""
NUM_SPECIAL_TOKENS = 256
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n?")


class Llama3RanksTokenizer(BackendTokenizer):
    """A file of ranks; its special tokens are those of the JSON files beside it, else Llama 3's."""

    file_name = MODEL_FILE

    def __init__(self, path: Path) -> None:
        ranks = _read_ranks(path)
        config = read_tokenizer_config(path.parent)
        if not config.added:
            config = _llama3_config(path, len(ranks))
        super().__init__(path, _backend(path, ranks), config)
        # Llama 3 was trained with it; the template that says so is in its tokenizer.json alone.
        bos = next((token.number for token in config.added if token.content == config.bos_token), None)
        self.first = [] if bos is None or config.adds_bos is False else [bos]


def holds_ranks(path: Path) -> bool:
    """Whether a file begins with a line ``base64 rank``."""
    with open(path, "rb") as stream:
        return _LINE.fullmatch(stream.readline(1 << 16)) is not None


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                encoded, rank = line.split()
                ranks[base64.b64decode(encoded, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise ValueError(f"{path}, line {number} is not 'base64 rank': {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError(f"{path} holds no whole vocabulary: every byte and the ranks 0 to {len(ranks) - 1} are needed")
    return ranks


def _llama3_config(path: Path, num_ranks: int) -> TokenizerConfig:
    """Llama 3's special tokens, for a folder that states none.

    Raises:
        ValueError: these are not Llama 3's ranks.
    """
    if num_ranks != NUM_RANKS:
        raise ValueError(
            f"{path} holds {num_ranks} ranks, Llama 3 has {NUM_RANKS}: put the model's tokenizer.json beside it, or a "
            "tokenizer_config.json that states its special tokens under added_tokens_decoder"
        )
    names, reserved = dict(SPECIAL_TOKENS), 0
    for place in range(NUM_SPECIAL_TOKENS):
        if place not in names:
            names[place] = f"<|reserved_special_token_{reserved}|>"
            reserved += 1
    added = tuple(AddedToken(names[place], NUM_RANKS + place) for place in range(NUM_SPECIAL_TOKENS))
    named = {"bos_token": names[0], "eos_token": names[1]}
    return TokenizerConfig(added, frozenset(names.values()), named, adds_bos=None, legacy=False)


def _backend(path: Path, ranks: dict[bytes, int]) -> tokenizers.Tokenizer:
    package = tokenizers_package(path)
    letters = _letters()
    vocabulary = {_written(token, letters): rank for token, rank in ranks.items()}
    model = package.models.BPE(vocab=vocabulary, merges=_merges(ranks, letters), ignore_merges=True)
    backend = package.Tokenizer(model)
    words = package.pre_tokenizers.Split(package.Regex(WORDS), behavior="isolated")
    as_letters = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = package.pre_tokenizers.Sequence([words, as_letters])
    backend.decoder = package.decoders.ByteLevel()
    return backend


def _merges(ranks: dict[bytes, int], letters: list[str]) -> list[tuple[str, str]]:
    """Every pair of tokens that joins to a token, in the order of the ranks of what they join to."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(_written(left, letters), _written(right, letters)) for left, right in pairs]
    return merges


def _written(token: bytes, letters: list[str]) -> str:
    return "".join(letters[byte] for byte in token)


def _letters() -> list[str]:
    """The letter of each byte in a byte-level vocabulary: itself where it is printed, one from U+0100 on elsewhere."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printed]
    return [chr(byte if byte in printed else 0x100 + others.index(byte)) for byte in range(256)]
