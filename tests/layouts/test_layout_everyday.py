"""Runs as people start them: with few flags, without validation data, with more steps than at first."""

import json

import numpy as np
import pytest

from megatron_dmc.cli import main
from megatron_dmc.data.indexed import IndexedWriter
from megatron_dmc.data.manifest import SCHEMA_VERSION, write_manifest
from tests.layouts.cases import RETROFIT, ZERO_OUT
from tests.layouts.laboratory import VOCAB_SIZE
from tests.layouts.ranks import run_ranks

EOD = 2
LEFT_OUT = (
    "eval_iters",
    "save_interval",
    "split",
    "data_path",
    "dmc_total_samples",
    "global_batch_size",
    "tokenizer_type",
)


def command(argv):
    """``megatron-dmc train`` on one rank; its exit code."""
    return main(["train", *argv])


def masks(argv):
    """Tokens and loss masks of all micro-batches of a run."""
    from megatron_dmc.training import forward_step

    seen, next_batch = [], forward_step._next_batch

    def recorded(*args):
        batch = next_batch(*args)
        seen.append((batch["tokens"].numpy().copy(), batch["loss_mask"].numpy().copy()))
        return batch

    forward_step._next_batch = recorded
    assert command(argv) == 0
    return seen


@pytest.fixture(scope="module")
def data(laboratory):
    """Short documents, as ``data prepare`` leaves them: their end is not the last id."""
    prefix = laboratory.path("everyday")
    random = np.random.default_rng(3)
    with IndexedWriter(prefix, VOCAB_SIZE) as writer:
        for _ in range(200):
            writer.add(np.append(random.integers(3, VOCAB_SIZE, size=int(random.integers(1, 9))), EOD))
        tokens = writer.num_tokens
    hashes = dict.fromkeys(("tokenizer_sha256", "bin_sha256", "idx_sha256", "corpus_sha256"), "0")
    counts = {"vocab_size": VOCAB_SIZE, "num_tokens": tokens, "num_documents": 200, "num_bad_lines": 0}
    write_manifest(prefix, {"schema_version": SCHEMA_VERSION, "eod": EOD, "files": [], **hashes, **counts})
    return prefix


@pytest.fixture
def start(laboratory, data, tmp_path):
    """Start a run with few flags on one rank; its answer and what it printed."""

    def started(*switches, function=command, variant=ZERO_OUT, **flags):
        few = dict.fromkeys(LEFT_OUT) | {"train_data_path": data, "save": tmp_path / "save", "train_iters": 2}
        few["pretrained_checkpoint"] = laboratory.base(variant)
        logs = tmp_path / f"logs{len(list(tmp_path.iterdir()))}"
        (answer,) = run_ranks(function, 1, logs, laboratory.arguments(variant, switches, **few | flags))
        return answer, (logs / "rank0.log").read_text()

    return started


def test_layout_training_data_alone_is_enough(start, tmp_path):
    code, said = start()
    assert code == 0
    line = next(line for line in said.splitlines() if line.startswith("flags set by megatron_dmc: "))
    for flag in ("--global-batch-size 16", "--save-interval 500", "--eval-iters 0", f"--null-tokenizer-eod-id {EOD}"):
        assert flag in line
    assert "five steps raised the perplexity" in said
    assert len((tmp_path / "save" / "metrics.jsonl").read_text().splitlines()) == 2


def test_layout_the_ends_of_documents_are_masked_as_asked(start):
    for switches, masked in (((), False), (("--eod-mask-loss",), True)):
        batches, _ = start(*switches, function=masks, save=None, train_iters=1)
        tokens_B1S, mask_B1S = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        assert 0.1 < (tokens_B1S == EOD).mean() < 0.5
        assert (tokens_B1S == VOCAB_SIZE - 1).any()
        np.testing.assert_array_equal(mask_B1S, tokens_B1S != EOD if masked else np.ones_like(mask_B1S))


def test_layout_a_finished_stage_is_given_more_steps(start, tmp_path):
    assert start(variant=RETROFIT)[0] == 0
    code, said = start(variant=RETROFIT, train_iters=4)
    assert code == 0
    assert "the stage began with --train-iters 2" in said
    lines = (tmp_path / "save" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert [json.loads(line)["consumed_samples"] for line in lines] == [24, 40, 56, 72]


def test_layout_what_megatron_refuses_is_one_message(start):
    """Before it starts, while it loads, and by a word that nobody knows."""
    assert start()[0] == 0
    for flags, words in (
        ({"lr_warmup_iters": 1, "train_iters": 3}, "give the learning rate, its schedule"),
        ({"lr": 1e-4, "train_iters": 3}, "give the learning rate and weight decay that it began with"),
        ({"save": None, "tensor_model_parallel_size": 2}, "must divide the number of ranks"),
        ({"save": None, "mirco_batch_size": 2}, "did you mean --micro-batch-size?"),
        ({"save": None, "lr": "fast"}, "argument --lr: invalid float value: 'fast'"),
    ):
        code, said = start(**flags)
        assert code == 1
        assert "Traceback" not in said
        assert words in "".join(said.splitlines(keepends=True)[-2:])
