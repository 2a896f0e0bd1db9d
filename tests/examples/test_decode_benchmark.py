"""The benchmark of decoding: that all its suites run, and that its synthetic caches are what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from examples.benchmarks import decode
from examples.benchmarks.synthetic_cache import bytes_per_step, fill, head_lengths, waste
from tests.inference.tiny_model import tiny_model


def test_head_lengths_have_the_mean_and_the_spread_asked_for() -> None:
    equal = head_lengths((3, 2, 4), context=4096, ratio=8, spread=0)
    assert equal.unique().tolist() == [512]
    uneven = head_lengths((30, 8, 8), context=1 << 20, ratio=8, spread=1).double()
    assert uneven.mean().item() == pytest.approx(2**17, rel=0.1)
    assert uneven.log().std().item() == pytest.approx(1, rel=0.1)


def test_a_filled_cache_decodes_and_is_counted() -> None:
    model = tiny_model()
    config = model.config
    cache = model.new_cache(2, block_size=4)
    rows = cache.add_sequences(2)
    length_LBG = head_lengths((config.num_layers, 2, config.num_kv_heads), context=64, ratio=4, spread=1)
    fill(cache, length_LBG)
    cache.check_integrity()
    assert torch.equal(cache.cache_seqlens, length_LBG.int())
    assert waste(cache) == pytest.approx((4 * (-(-length_LBG // 4)).sum() / length_LBG.sum() - 1).item())
    weights, entries = bytes_per_step(model, cache)
    assert entries == length_LBG.sum() * 2 * config.head_dim * 4
    matrices = (32 * 64, 32 * 32, 32 * 32, 64 * 32, *[32 * 48] * 3)
    assert weights == 4 * (config.num_layers * sum(matrices) + 50 * 32)
    assert model.read(torch.tensor([1, 2]), [1, 1], cache, rows).isfinite().all()


@pytest.mark.slow
def test_every_suite_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["decode", "--quick", "--json", str(output)])
    assert decode.main() == 0
    rows = json.loads(output.read_text())["rows"]
    assert len({row["name"] for row in rows}) == 10
    assert all(row["value"] > 0 and math.isfinite(row["value"]) and row["goal"] is None for row in rows)


def test_unknown_suite_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["decode", "--suites", "prompt,speed"])
    with pytest.raises(SystemExit):
        decode.main()
    assert "speed: known are transformers,prompt,compression,uneven" in capsys.readouterr().err
