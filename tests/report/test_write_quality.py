"""Quality over compression ratio from result files: one line for every method, intervals, and the tokens trained."""

import json

import pytest

from megatron_dmc.cli import main
from megatron_dmc.report.evaluations import lines, read_measured


def evaluation(ratio, perplexity, kl=None, length=512):
    path = {
        "perplexity": perplexity,
        "loss_standard_error": 0.01,
        "mean_resident_ratio": ratio,
        "mean_resident_entries": length / 2 / ratio,
        "mean_resident_bytes": 4096.0,
        "against_reference": None
        if kl is None
        else {
            "perplexity": perplexity,
            "perplexity_standard_error": 0.1,
            "perplexity_ratio": perplexity / 10,
            "perplexity_ratio_standard_error": 0.01,
            "mean_kl": kl,
            "mean_kl_standard_error": 0.02,
            "top1_agreement": 0.9,
            "top1_agreement_standard_error": 0.0,
        },
    }
    return {"seq_length": length, "decode": path, "teacher_forced": None}


def task(ratio, score):
    return {
        "task": "niah",
        "length": 1024,
        "score": score,
        "score_standard_error": 0.05,
        "compression_ratio": ratio,
        "entries_at_the_end": 1024 / ratio,
        "bytes_at_the_end": 2048.0,
    }


def benchmarks():
    """As ``eval`` writes them: MMLU of two subjects, and GSM8K."""
    metrics = {"acc,none": 0.5, "acc_stderr,none": 0.1}
    return {
        "tasks": {
            "mmlu_algebra": {"metrics": metrics},
            "mmlu_virology": {"metrics": metrics},
            "gsm8k": {"metrics": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A"}},
        },
        "groups": {"mmlu": {"metrics": {"acc,none": 0.4, "acc_stderr,none": 0.02}}},
        "path_of_scores": "teacher-forced",
        "path_of_texts": "decode",
        "cache": {
            "compression_ratio": 3.5,
            "entries": 4000,
            "bytes": 10240,
            "num_sequences": 5,
            "per_layer_and_kv_head": {"entries": [[1000, 1000], [1000, 1000]]},
        },
    }


@pytest.fixture
def files(tmp_path):
    dmc = {"name": "DMC", "tokens_trained": 20_000_000}
    contents = {
        "dmc_4": dmc | {"evaluations": [evaluation(4.0, 10.5, 0.3), evaluation(4.1, 9.5, 0.3, length=1024)]},
        "dmc_2": dmc | {"tokens_trained": 10_000_000, **evaluation(2.0, 10.1, 0.1)},
        "tova": {"name": "TOVA", "tokens_trained": 0, **evaluation(4.0, 12.0, 0.8)},
        "dense": {"name": "dense", **evaluation(1.0, 10.0)},
        "niah": dmc | {"generated_tasks": [task(4.0, 0.75)], "standard_tasks": benchmarks()},
    }
    paths = []
    for name, content in contents.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(content))
    return paths


def test_lines_of_methods(files):
    panels = lines(read_measured(files), "text_512")
    assert list(panels)[:2] == ["perplexity", "perplexity / the reference's"]
    perplexity = panels["perplexity"]
    dmc = "DMC (10,000,000 to 20,000,000 tokens trained)"
    assert perplexity.keys() == {dmc, "TOVA (not trained)", "dense (training not stated)"}
    points = perplexity[dmc]
    assert [(point.ratio, point.value) for point in points] == [(2.0, 10.1), (4.0, 10.5)]
    assert points[0].half_interval == pytest.approx(0.196)
    (dense,) = perplexity["dense (training not stated)"]
    assert dense.half_interval == pytest.approx(1.96 * 0.1), "from the loss, where there is no reference"


def test_a_page_with_pictures(files, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need the extra [plot]")
    assert main(["report", *map(str, files), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "quality.md")
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {
        "quality_text_512.png",
        "quality_text_1024.png",
        "quality_tasks_1024.png",
        "quality_benchmarks.png",
    }
    text = (tmp_path / "out" / "quality.md").read_text()
    assert all(f"]({picture})" in text for picture in pictures)
    held = "| DMC (20,000,000 tokens trained) | decode | 4.00 | 64.0 | 4.0 KiB "
    assert f"{held}| 10.5000 ± 0.1960 | 1.0500 ± 0.0196 | 0.3000 ± 0.0392 | 0.9000 |" in text
    assert "| dense (training not stated) | decode | 1.00 | 256.0 | 4.0 KiB | 10.0000 ± 0.1960 |  |  |  |" in text
    assert "| decode | 4.00 | 256.0 | 2.0 KiB | 0.7500 ± 0.0980 |" in text
    assert "| teacher-forced | 3.50 | 200.0 | 2.0 KiB | 0.4000 ± 0.0392 |  |" in text
    assert "| decode | 3.50 | 200.0 | 2.0 KiB |  | 0.2500 |" in text
    stored = json.loads((tmp_path / "out" / "quality.json").read_text())["results"]
    assert len(stored) == 4 * 4 + 1 + 1 + 2


def test_what_it_refuses(files, tmp_path, capsys):
    assert main(["report", str(files[0])]) == 1
    assert "give its directory with --output" in capsys.readouterr().err
    assert main(["report", str(files[0]), str(tmp_path), "--output", "out"]) == 1
    assert "report on either" in capsys.readouterr().err
    for content in ({}, {"seq_length": 5, "decode": {}, "teacher_forced": None}):
        (tmp_path / "bad.json").write_text(json.dumps(content))
        assert main(["report", str(tmp_path / "bad.json"), "--output", str(tmp_path / "out")]) == 1
        assert "bad.json" in capsys.readouterr().err
