"""Prompts and decoding on a CPU or a GPU: ``python -m examples.benchmarks.decode --json OUT``.

Beside transformers on the same weights, and beside our own engine without compression. Both sides run in turns in one
process. Without ``--model`` the weights are random, of the shape of SmolLM2-135M. Caches of a given compression ratio
are filled with random entries; a step reads them as if they were a text's. Goals are those of the issue that asked for
compressed inference that pays, for two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.benchmarks.measure import SMOLLM2_135M, Row, add_output_argument, median_ratio, report, timed
from examples.benchmarks.synthetic_cache import bytes_per_step, fill, head_lengths, waste
from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.cache.paged_kv_cache import DEFAULT_BLOCK_SIZE, PagedKVCache
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.methods.dmc import DMC

NO_SLOWER, TIMES_FASTER_THAN_STEPS, OF_THE_IDEAL, TIMES_FASTER_THAN_PADDED, MOST_WASTE = 1.0, 20.0, 0.6, 1.5, 0.04
STEPS = 5
"""Steps of decoding in one timed turn."""
REPEATS_OF_LONG_RUNS = 3


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        shape: of a random model, as transformers' ``LlamaConfig`` takes it.
        contexts, batches: of the comparison with transformers.
        prompt: tokens of the prompt that is held against steps.
        compressed: contexts and batches that are decoded with and without compression.
        prompts: lengths of a batch.
        repeats: timed turns.
    """

    shape: dict[str, Any]
    contexts: Sequence[int]
    batches: Sequence[int]
    prompt: int
    compressed: Sequence[tuple[int, int]]
    prompts: Sequence[int]
    repeats: int


FULL = Scale(
    shape={**SMOLLM2_135M, "max_position_embeddings": 32768},
    contexts=(128, 512, 2048),
    batches=(1, 8),
    prompt=2048,
    compressed=((4096, 1), (4096, 8), (16384, 1), (16384, 4)),
    prompts=(32, 536, 1040, 1544, 2048),
    repeats=7,
)
QUICK = Scale(
    shape={
        **FULL.shape,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 128,
    },
    contexts=(32,),
    batches=(1, 2),
    prompt=64,
    compressed=((512, 2),),
    prompts=(8, 24, 64),
    repeats=2,
)


class Bench:
    """The models, and how much is measured with them."""

    def __init__(self, directory: Path, scale: Scale, device: str) -> None:
        source = open_source(directory)
        self.directory, self.scale, self.device = directory, scale, device
        self.dense = Decoder(source, dtype="float32", device=device)
        self.dmc = Decoder(source, dtype="float32", device=device, method=DMC(DMCConfig()))

    def transformers(self) -> Any:
        """The same weights in transformers."""
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32)
        return model.to(self.device).eval()

    def tokens(self, *shape: int) -> Tensor:
        """Random ones."""
        return torch.randint(0, self.dense.config.vocab_size, shape, device=self.device)

    def timed(self, runs: dict[str, Callable[[], object]], repeats: int | None = None) -> dict[str, list[float]]:
        """Seconds of each run, in turns."""
        with torch.no_grad():
            return timed(runs, repeats or self.scale.repeats, torch.device(self.device).type)


class Ours:
    """A batch of sequences in a cache of ours."""

    def __init__(self, model: Decoder, num_sequences: int, cache: PagedKVCache | None = None) -> None:
        self.model = model
        self.cache = cache or model.new_cache(num_sequences)
        self.rows = self.cache.add_sequences(num_sequences) if cache is None else list(range(num_sequences))

    def read(self, token_BS: Tensor) -> Tensor:
        """Logits [B, V] after equally many tokens of every sequence."""
        batch, count = token_BS.shape
        hidden_TH = self.model.read(token_BS.flatten(), [count] * batch, self.cache, self.rows)
        return self.model.logits(hidden_TH.unflatten(0, (batch, count))[:, -1])

    def read_uneven(self, tokens: Sequence[Tensor]) -> Tensor:
        """Logits [B, V] after prompts of different lengths."""
        counts = [len(token_S) for token_S in tokens]
        hidden_TH = self.model.read(torch.cat(list(tokens)), counts, self.cache, self.rows)
        return self.model.logits(hidden_TH[torch.tensor(counts).cumsum(0) - 1])


class Theirs:
    """The same in transformers."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, None

    def read(self, token_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Logits [B, V] after equally many tokens of every sequence, some of them padding where the mask is 0."""
        out = self.model(token_BS, attention_mask=mask_BS, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        logits_BV: Tensor = out.logits[:, -1]
        return logits_BV


def transformers_rows(bench: Bench) -> Iterator[Row]:
    """Prompts and steps at CR 1."""
    other = bench.transformers()
    for batch in bench.scale.batches:
        for context in bench.scale.contexts:
            yield from _beside(bench, other, batch, context)


def _beside(bench: Bench, other: Any, batch: int, context: int) -> Iterator[Row]:
    token_BS, next_B1 = bench.tokens(batch, context), bench.tokens(batch, 1)
    where = {"batch": batch, "context": context}
    prompts = {
        "ours": lambda: Ours(bench.dense, batch).read(token_BS),
        "transformers": lambda: Theirs(other).read(token_BS),
    }
    seconds = bench.timed(prompts)
    goal = NO_SLOWER if batch == 1 and context == bench.scale.prompt else None
    yield Row("prompt, ours / transformers: time", median_ratio(seconds, *seconds), "ratio", where, goal)
    ours, theirs = Ours(bench.dense, batch), Theirs(other)
    with torch.no_grad():
        ours.read(token_BS)
        theirs.read(token_BS)
    seconds = bench.timed({"ours": _steps(ours, next_B1), "transformers": _steps(theirs, next_B1)})
    for side, values in seconds.items():
        yield Row(f"step, {side}: time", 1000 * statistics.median(values) / STEPS, "ms", where)
    yield Row("step, ours / transformers: time", median_ratio(seconds, *seconds), "ratio", where, NO_SLOWER)


def _steps(side: Ours | Theirs, next_B1: Tensor) -> Callable[[], None]:
    def run() -> None:
        for _ in range(STEPS):
            side.read(next_B1)

    return run


def prompt_rows(bench: Bench) -> Iterator[Row]:
    """A prompt at once against token by token, of which some steps along the way are timed."""
    length = bench.scale.prompt
    token_1S, next_11 = bench.tokens(1, length), bench.tokens(1, 1)
    starts = [0, length // 4, length // 2, 3 * length // 4, length - 1]
    sides = []
    for start in starts:
        sides.append(Ours(bench.dense, 1))
        if start:
            sides[-1].read(token_1S[:, :start])

    def at_once() -> None:
        Ours(bench.dense, 1).read(token_1S)

    def some_steps() -> None:
        for side in sides:
            side.read(next_11)

    seconds = bench.timed({"at once": at_once, "steps": some_steps})
    ratio = median_ratio(seconds, *seconds) * len(starts) / length
    where = {"tokens": length, "steps timed at": starts}
    yield Row("prompt, at once / token by token: time", ratio, "ratio", where, 1 / TIMES_FASTER_THAN_STEPS)


def compression_rows(bench: Bench) -> Iterator[Row]:
    """Steps over caches of a given ratio, against the dense model over one of CR 1."""
    for context, batch in bench.scale.compressed:
        plain = _filled(bench.dense, batch, context, ratio=1, spread=0)
        for ratio in (4, 8):
            for spread in (0, 1):
                compressed = _filled(bench.dmc, batch, context, ratio, spread)
                next_B1 = bench.tokens(batch, 1)
                seconds = bench.timed({"compressed": _steps(compressed, next_B1), "plain": _steps(plain, next_B1)})
                sizes = [bytes_per_step(side.model, side.cache) for side in (compressed, plain)]
                ideal = sum(sizes[1]) / sum(sizes[0])
                weights, cache = sizes[1]
                where = {"context": context, "batch": batch, "ratio": ratio, "spread over heads": spread}
                found = median_ratio(seconds, *seconds)
                yield Row("step, compressed / CR 1: time", found, "ratio", {**where, "ideal": round(1 / ideal, 3)})
                goal = 1 / OF_THE_IDEAL if cache > weights else None
                yield Row("step, compressed / CR 1: time over the ideal", found * ideal, "ratio", where, goal)
                if spread:
                    goal = MOST_WASTE if (ratio, context) == (8, 4096) else None
                    yield Row(
                        "cache, places of blocks that hold nothing", waste(compressed.cache), "share", where, goal
                    )


def _filled(model: Decoder, batch: int, context: int, ratio: float, spread: float) -> Ours:
    heads = (model.config.num_layers, batch, model.config.num_kv_heads)
    cache = model.new_cache(batch, num_blocks=math.prod(heads) * (context // DEFAULT_BLOCK_SIZE + 8))
    cache.add_sequences(batch)
    fill(cache, head_lengths(heads, context, ratio, spread))
    return Ours(model, batch, cache)


def uneven_rows(bench: Bench) -> Iterator[Row]:
    """A batch of prompts of different lengths, against the same padded to the longest."""
    other, lengths = bench.transformers(), bench.scale.prompts
    batch, longest = len(lengths), max(lengths)
    token_BS = bench.tokens(batch, longest)
    first_B1 = longest - torch.tensor(lengths, device=bench.device).unsqueeze(-1)
    mask_BS = (torch.arange(longest, device=bench.device) >= first_B1).long()
    prompts = [token_BS[row, longest - length :] for row, length in enumerate(lengths)]
    runs = {
        "packed": lambda: Ours(bench.dense, batch).read_uneven(prompts),
        "ours": lambda: Ours(bench.dense, batch).read(token_BS),
        "transformers": lambda: Theirs(other).read(token_BS, mask_BS),
    }
    seconds = bench.timed(runs, min(bench.scale.repeats, REPEATS_OF_LONG_RUNS))
    where = {"lengths": list(lengths)}
    for side in ("ours", "transformers"):
        ratio = median_ratio(seconds, "packed", side)
        yield Row(f"uneven prompts, packed / {side} padded: time", ratio, "ratio", where, 1 / TIMES_FASTER_THAN_PADDED)


SUITES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "transformers": transformers_rows,
    "prompt": prompt_rows,
    "compression": compression_rows,
    "uneven": uneven_rows,
}


def write_random_model(directory: Path, shape: dict[str, Any]) -> None:
    """A Hugging Face directory with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(directory)


def main() -> int:
    """Run the chosen suites."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmarks.decode", description=__doc__.split(":")[0])
    add_output_argument(parser)
    parser.add_argument("--model", type=Path, help="Hugging Face directory (default: random weights)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--suites", default=",".join(SUITES), help="comma-separated choice of %(default)s")
    parser.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    options = parser.parse_args()
    names = options.suites.split(",")
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        parser.error(f"--suites {','.join(unknown)}: known are {','.join(SUITES)}")
    scale = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        directory = options.model or Path(folder)
        if options.model is None:
            write_random_model(directory, scale.shape)
        bench = Bench(directory, scale, options.device)
        rows = (row for name in names for row in SUITES[name](bench))
        # At a size of nothing no goal means anything.
        report((dataclasses.replace(row, goal=None) for row in rows) if options.quick else rows, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
