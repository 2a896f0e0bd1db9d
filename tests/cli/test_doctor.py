"""doctor: what is wrong is found, with its remedy."""

import json
import os
import re

import pytest

from megatron_dmc.cli import main
from megatron_dmc.seam import doctor


def statuses(findings):
    return {finding.name: finding.status for finding in findings}


def test_this_machine_can_run_what_the_tests_run(capsys):
    assert main(["doctor", "--json"]) == 0
    found = {finding["name"]: finding["status"] for finding in json.loads(capsys.readouterr().out)}
    assert found["megatron-core"] == found["torch"] == found["Python"] == "ok"


def test_missing_old_and_untested_packages():
    found = doctor._required({"megatron-core": "0.21.0", "torch": "2.9.1", "numpy": "2.0"})
    assert statuses(found)["torch"] == "failed"
    assert statuses(found)["megatron-core"] == "warning"
    assert statuses(found)["psutil"] == "failed"
    assert statuses(found)["numpy"] == "ok"
    assert {finding.name: finding.remedy for finding in found}["torch"] == "pip install 'torch>=2.10'"


@pytest.mark.parametrize(
    ("versions", "named"),
    [
        ({"torch": "2.9.0"}, ["torch security"]),
        ({"torch": "2.15.0", "transformers": "5.23"}, []),
        ({"transformers": "4.57.0", "megatron-bridge": "0.5.0"}, ["transformers security", "megatron-bridge security"]),
    ],
)
def test_known_holes_are_named(versions, named):
    assert list(statuses(doctor._security(versions))) == named


def test_impostors(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor._impostors({"megatron": "0.5.1"})
    assert statuses(found) == {"apex": "failed", "megatron": "failed"}


def test_environment_that_reopens_unsafe_loading():
    found = doctor._environment({"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1"})
    assert statuses(found) == {
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "failed",
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "warning",
    }
    assert doctor._environment({"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}) == []


def test_small_disks_are_seen_where_the_output_will_be(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "MIN_FREE_DISK", 1e30)
    found = doctor._machine(tmp_path / "not" / "there")
    assert statuses(found)[f"disk at {tmp_path}"] == "warning"
    assert statuses(found)["CPU cores"] == "ok"
    assert str(len(os.sched_getaffinity(0))) in {finding.detail for finding in found}


def test_what_the_cpu_does_fast(monkeypatch):
    monkeypatch.setattr(doctor, "PRODUCT_SHAPE", (64, 64, 64))
    (found,) = doctor._matrix_products({"torch": "2.15.0"})
    assert found.status == "ok"
    assert re.search(r"float32 \d+ GFLOP/s, bfloat16 \d+\.\d\d times that \(\d+ threads, \w+\)", found.detail)
    assert doctor._matrix_products({}) == []


@pytest.mark.parametrize(
    ("bfloat16", "told"),
    [
        (2.4e11, "bfloat16 2.40 times that (2 threads): --bf16 pays"),
        (1e10, "0.10 times that (2 threads): --bf16 does not"),
    ],
)
def test_bf16_is_advised_where_it_is_faster(bfloat16, told):
    assert told in doctor._judged_products(1e11, bfloat16, "2 threads").detail


def test_a_failure_exits_with_2(monkeypatch, capsys):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert main(["doctor"]) == 2
    assert "unset it" in capsys.readouterr().out
