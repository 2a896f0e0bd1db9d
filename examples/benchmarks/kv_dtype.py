"""What a cache in 8 bits costs and saves: ``python -m examples.benchmarks.kv_dtype --model DIR --data PREFIX``.

Sequences are read in parts, side by side through caches of every format, so that all but the tokens of one part are
read from the cache. At every position the distribution of the next token is compared with that of the cache in the
model's dtype that read the same parts. Parts of one token are decoding.

Legend: N sequences, S positions, C positions of a part, V vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from examples.benchmarks.measure import Row, add_output_argument, report
from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.data.indexed import IndexedTokens
from megatron_dmc.evaluation.perplexity import cut_sequences
from megatron_dmc.inference.cache.paged_kv_cache import PagedKVCache
from megatron_dmc.inference.cache.usage import CacheUsage
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.ops.kv_quantization import AUTO, KV_FORMATS

QUANTISED = [name for name in KV_FORMATS if name != AUTO.name]


@dataclass
class Difference:
    """From the cache in the model's dtype, by position; KL(model's dtype, 8 bits) in nats."""

    kl_N: list[Tensor] = field(default_factory=list)
    same_top_N: list[Tensor] = field(default_factory=list)
    loss_N: list[Tensor] = field(default_factory=list)
    """Additional loss of the token that follows."""

    def add(self, expected_NV: Tensor, found_NV: Tensor, next_N: Tensor) -> None:
        """Compare log-probabilities at N positions."""
        self.kl_N.append((expected_NV.exp() * (expected_NV - found_NV)).sum(-1))
        self.same_top_N.append((expected_NV.argmax(-1) == found_NV.argmax(-1)).float())
        self.loss_N.append((expected_NV - found_NV).gather(-1, next_N.unsqueeze(-1)).squeeze(-1))


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmarks.kv_dtype", description=__doc__.split(":")[0])
    add_output_argument(parser)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint or Hugging Face directory")
    parser.add_argument("--data", type=Path, required=True, metavar="PREFIX", help="data set, without .bin or .idx")
    parser.add_argument("--dtype", default="float32", help="of the model (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=4, help="read at once (default: %(default)s)")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens of each (default: %(default)s)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 16], help="tokens of a part (default: 1 16)")
    options = parser.parse_args()
    report(_rows(options), options.json)
    return 0


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    model = Decoder(open_source(options.model), dtype=options.dtype)
    token_NT = cut_sequences(IndexedTokens(options.data).tokens, options.seq_length, options.sequences)
    for chunk in options.chunks:
        caches = {name: model.new_cache(len(token_NT), kv_dtype=name) for name in KV_FORMATS}
        differences = read_side_by_side(model, token_NT, chunk, caches)
        usages = {name: CacheUsage.of(cache, range(len(token_NT))) for name, cache in caches.items()}
        conditions = {
            "model": options.model.name,
            "method": model.method.name,
            "dtype": options.dtype,
            "sequences": len(token_NT),
            "seq_length": options.seq_length,
            "chunk": chunk,
        }
        for name, difference in differences.items():
            kl, same_top, loss = (torch.cat(part) for part in vars(difference).values())
            yield Row(f"{name}: mean KL per token", kl.mean().item(), "nats", conditions)
            yield Row(f"{name}: largest KL of a token", kl.max().item(), "nats", conditions)
            yield Row(f"{name}: same most likely token", same_top.mean().item(), "share", conditions)
            yield Row(f"{name}: additional loss per token", loss.mean().item(), "nats", conditions)
        for name, usage in usages.items():
            yield Row(f"{name}: bytes per token", usage.bytes_held / usage.num_tokens, "B", conditions)


def read_side_by_side(
    model: Decoder, token_NT: Tensor, chunk: int, caches: dict[str, PagedKVCache]
) -> dict[str, Difference]:
    """Read sequences ``chunk`` tokens at a time into every cache; what differs from ``auto``, by format.

    Args:
        token_NT: int64; the last token of each sequence is only predicted.
        caches: empty, by the names of their formats.
    """
    differences = {name: Difference() for name in QUANTISED}
    rows = {name: cache.add_sequences(len(token_NT)) for name, cache in caches.items()}
    parts = (token_NS.split(chunk, dim=1) for token_NS in (token_NT[:, :-1], token_NT[:, 1:]))
    for token_NC, next_NC in zip(*parts, strict=True):
        counts = [token_NC.shape[1]] * len(token_NC)
        log_probs = {
            name: model.logits(model.read(token_NC.flatten(), counts, cache, rows[name])).log_softmax(-1)
            for name, cache in caches.items()
        }
        for name, difference in differences.items():
            difference.add(log_probs[AUTO.name], log_probs[name], next_NC.flatten())
    return differences


if __name__ == "__main__":
    raise SystemExit(main())
