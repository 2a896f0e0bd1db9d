"""The comparison with the authors' numbers passes, and notices what is wrong with a file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import golden_check

GOLDEN = Path(__file__).parent / "golden"
SMALL = "train_gqa_w4.safetensors"


def test_all_files_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert golden_check.main([str(GOLDEN)]) == 0
    printed = capsys.readouterr().out
    assert all(path.name in printed for path in GOLDEN.glob("*.safetensors"))


def changed(directory: Path, name: str, **changes: object) -> Path:
    """A copy of a golden file with tensors replaced, or left out where the change is None."""
    source = GOLDEN / name
    with golden_check.safe_open(source, "pt") as stream:
        metadata = stream.metadata()
    tensors = {**load_file(source), **changes}
    save_file({key: value for key, value in tensors.items() if value is not None}, directory / name, metadata)
    return directory


@pytest.mark.parametrize("tensor", ["output", "grad_key", "pooled_value", "rotated_pooled_key"])
def test_a_wrong_number_fails(tensor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = load_file(GOLDEN / SMALL)[tensor]
    wrong[0, 0, 0, 0] += 0.01
    assert golden_check.main([str(changed(tmp_path, SMALL, **{tensor: wrong}))]) == 2
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(failed) == 2
    assert all(tensor in line for line in failed)


def test_a_wrong_length_fails(tmp_path: Path) -> None:
    name = "decode_mha_w0.safetensors"
    lengths = load_file(GOLDEN / name)["cache_length"]
    lengths[-1, 0, 0] += 1
    assert golden_check.main([str(changed(tmp_path, name, cache_length=lengths))]) == 2


def test_unknown_and_missing_tensors_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = load_file(GOLDEN / SMALL)["output"]
    assert golden_check.main([str(changed(tmp_path, SMALL, surprise=output.clone()))]) == 2
    assert "unknown tensor" in capsys.readouterr().out
    assert golden_check.main([str(changed(tmp_path, SMALL, logistic_noise=None))]) == 2
    assert "'logistic_noise' is missing" in capsys.readouterr().out


def test_unreadable_and_unknown_files_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train_broken.safetensors").write_bytes(b"not safetensors")
    assert golden_check.main([str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().out
    (tmp_path / "train_broken.safetensors").unlink()
    shutil.copy(GOLDEN / SMALL, tmp_path / "other_gqa.safetensors")
    assert golden_check.main([str(tmp_path)]) == 2
    assert "unknown family" in capsys.readouterr().out


def test_nothing_checked_is_a_failure(tmp_path: Path) -> None:
    assert golden_check.main([str(tmp_path)]) == 2
    assert golden_check.main([str(changed(tmp_path, SMALL)), "--only", "decode,dms"]) == 2


@pytest.mark.parametrize("arguments", [[], ["nowhere"], [str(GOLDEN), "--only", "tests"]])
def test_wrong_usage_is_the_users(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        golden_check.main(arguments)
    assert stopped.value.code == 1
