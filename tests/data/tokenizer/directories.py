"""Tokenizer directories as they are published: Llama 2 with ChatML tokens, Llama 3, Llama 3's ranks alone, Qwen."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest

from megatron_dmc.data.tokenizer.llama3_ranks import WORDS as LLAMA3_WORDS

CHAT_TOKENS = ("<|im_end|>", "<|im_start|>")
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's pattern, but every digit is alone."""
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SENTENCES = [
    "the quick brown fox jumps over the lazy dog and runs into the woods again",
    "a model reads tokens and writes tokens, one after the other, until it stops",
    "user: hello there\nassistant: hello\n\n",
] * 20
PROBES = [
    "",
    "the fox",
    "a  b   c",
    "the\nfox\r\n\truns\n\n",
    "1923 + 3.14",
    "na\u00efve caf\u00e9 \u6771\u4eac \U0001f642 e\u0301",
    "line\u2028separator\x0b\x0c\x85",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe fox<|im_end|>",
    "the <|im_end|> fox<|im_end|><|im_end|>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>",
    "<s>the fox</s> again",
    "<|im_end",
]
"""Texts on which a tokenizer must agree with transformers."""


def sentencepiece_directory(folder: Path, *, legacy: bool = False) -> int:
    """Llama 2's kind of model without tokenizer.json, and two tokens that a fine-tuning added; the first of their ids.

    White space stays as it is and a text gets a space before it, as in Llama 2.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    from sentencepiece import SentencePieceProcessor

    first = SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    numbers = {"<unk>": 0, "<s>": 1, "</s>": 2, **{token: first + place for place, token in enumerate(CHAT_TOKENS)}}
    decoder = {str(number): added(token) for token, number in numbers.items()}
    write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": legacy}
        | {"added_tokens_decoder": decoder, **named},
    )
    write(folder / "special_tokens_map.json", named)
    return first


def byte_level_directory(folder: Path) -> dict[str, int]:
    """Llama 3's kind: pieces of bytes, special tokens behind them, the first of which its template puts first."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = trained_on_bytes()
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in LLAMA3_TOKENS])
    ids = {token: backend.token_to_id(token) for token in LLAMA3_TOKENS}
    bos = LLAMA3_TOKENS[0]
    backend.post_processor = tokenizers.processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, ids[bos])])
    backend.save(str(folder / "tokenizer.json"))
    write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": LLAMA3_TOKENS[1]},
    )
    return ids


def qwen_directory(folder: Path) -> dict[str, int]:
    """Qwen's kind: pieces of bytes of composed characters, nothing put first, a special token for the end of a text and
    one for the end of a turn, and a token that is added but not special.
    """
    tokenizers = pytest.importorskip("tokenizers")
    backend = trained_on_bytes(QWEN_WORDS, ignore_merges=False)
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.post_processor = tokenizers.processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    backend.add_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in QWEN_TOKENS])
    backend.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    ids = {token: backend.token_to_id(token) for token in (*QWEN_TOKENS, "<think>")}
    decoder = {str(number): added(token, special=token in QWEN_TOKENS) for token, number in ids.items()}
    write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "add_prefix_space": False, "bos_token": None}
        | {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "errors": "replace"}
        | {"added_tokens_decoder": decoder, "additional_special_tokens": list(QWEN_TOKENS[1:])},
    )
    write(
        folder / "generation_config.json",
        {"bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"], "do_sample": True}
        | {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "top_k": 20, "temperature": 0.6},
    )
    return ids


def ranks_file(folder: Path) -> dict[bytes, int]:
    """Llama 3's own tokenizer.model, with a few ranks."""
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}
    vocabulary = trained_on_bytes().get_vocab(with_added_tokens=False)
    ranks = {bytes(bytes_of[letter] for letter in token): rank for token, rank in vocabulary.items()}
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ordered)
    (folder / "tokenizer.model").write_text("".join(lines))
    return dict(ordered)


def ranks_directory(folder: Path) -> dict[bytes, int]:
    """The ranks, with the special tokens in a tokenizer_config.json; their ids leave a gap."""
    ranks = ranks_file(folder)
    places = {len(ranks) + place + (place > 2): token for place, token in enumerate(LLAMA3_TOKENS)}
    write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": LLAMA3_TOKENS[0], "eos_token": LLAMA3_TOKENS[1]}
        | {"added_tokens_decoder": {str(number): added(token) for number, token in places.items()}},
    )
    return ranks


def trained_on_bytes(words: str = LLAMA3_WORDS, *, ignore_merges: bool = True):
    """A byte-level byte-pair encoding of the tokenizers package that merges inside words, by default Llama 3's."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    pattern = tokenizers.pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([pattern, letters])
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(SENTENCES, tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return backend


def byte_letters() -> dict[int, str]:
    """The letter of each byte, as transformers has it."""
    return pytest.importorskip("transformers.convert_slow_tokenizer").bytes_to_unicode()


def added(content: str, **changes: bool) -> dict[str, object]:
    """A token as added_tokens_decoder states it."""
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content, **flags, **changes}


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def auto_tokenizer(folder: Path):
    """What transformers makes of a directory."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers.AutoTokenizer.from_pretrained(folder)
