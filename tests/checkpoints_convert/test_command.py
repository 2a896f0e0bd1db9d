"""``megatron-dmc convert``: exit codes, messages, plans and what ``inspect`` tells."""

import json
import subprocess
import sys

import pytest
import torch

from megatron_dmc.checkpoint.torch_file import StoredTensor
from megatron_dmc.cli import main
from megatron_dmc.config import DMCConfig
from tests.checkpoints_convert.models import TINY, write_model


@pytest.fixture
def source(tmp_path):
    return write_model(tmp_path / "hf")


def _run(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def test_import_inspect_export(source, tmp_path, capsys):
    assert _run("import", source, tmp_path / "m", "--no-verify") == 0
    assert _run("inspect", tmp_path / "m") == 0
    told = capsys.readouterr().out
    assert "257, padded to 384" in told
    assert "SHA-256 compared" in told
    assert _run("export", tmp_path / "m", tmp_path / "back", "--no-verify", "--measured-cr", 2) == 0
    assert _run("verify", source, tmp_path / "back", "--no-logits") == 0
    assert "equal bit for bit" in capsys.readouterr().out


def test_the_legacy_format(source, tmp_path, capsys):
    flags = ["--format", "torch", "--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2]
    flags += ["--num-layers-per-virtual-pipeline-stage", 1]
    assert _run("import", source, tmp_path / "m", "--no-verify", *flags) == 0
    assert _run("inspect", tmp_path / "m", "--json") == 0
    facts = json.loads(capsys.readouterr().out.split("is complete\n")[1])
    assert (facts["format"], facts["layout"], facts["problems"]) == ("torch", "TP 2 x PP 2 x VPP 2", [])


def test_dry_run_writes_nothing_and_plans_everything(source, tmp_path, capsys):
    assert _run("import", source, tmp_path / "m", "--dry-run") == 0
    told = capsys.readouterr().out
    for part in ("4 x 96x32", "linear_qkv", "free disk needed", "peak memory"):
        assert part in told
    assert not (tmp_path / "m").exists()
    assert _run("import", source, tmp_path / "m", "--no-verify") == 0
    assert _run("export", tmp_path / "m", tmp_path / "back", "--dry-run") == 0
    assert "1 safetensors files" in capsys.readouterr().out
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["import", "absent", "DST"], "not a directory"),
        (["import", "SRC", "SRC"], "--overwrite"),
        (["import", "SRC", "DST", "--format", "torch", "--tensor-model-parallel-size", "3"], "num_kv_heads=2"),
        (["import", "SRC", "DST", "--tensor-model-parallel-size", "2"], "any layout"),
        (["import", "SRC", "DST", "--max-memory", "1M"], "--max-memory"),
        (["export", "SRC", "DST"], "already"),
        (["merge-kv-heads", "SRC", "DST", "--num-kv-heads", "3"], "must divide"),
        (["import-dmc-release", "SRC", "DST", "--target-cr", "8"], "mp_rank_00"),
        (["inspect", "absent"], "not a directory"),
    ],
)
def test_the_users_mistakes_are_exit_code_1_and_leave_nothing(source, tmp_path, capsys, arguments, told):
    places = {"SRC": str(source), "DST": str(tmp_path / "dst")}
    assert _run(*(places.get(argument, argument) for argument in arguments)) == 1
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert sorted(path.name for path in source.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("arguments", [[], ["import"], ["import", "a", "b", "--max-memory", "lots"], ["unknown"]])
def test_wrong_usage_is_exit_code_1(arguments):
    with pytest.raises(SystemExit) as stop:
        _run(*arguments)
    assert stop.value.code == 1


def test_a_difference_is_exit_code_2(source, tmp_path, capsys):
    other = write_model(tmp_path / "other", seed=1)
    assert _run("verify", source, other, "--no-logits") == 2
    assert "differs in" in capsys.readouterr().err


def test_inspect_tells_what_is_damaged(source, tmp_path, capsys):
    assert _run("import", source, tmp_path / "m", "--no-verify") == 0
    path = tmp_path / "m" / "release" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    assert _run("inspect", tmp_path / "m") == 2
    assert "PROBLEM: __0_0.distcp has another SHA-256" in capsys.readouterr().out
    assert _run("inspect", tmp_path / "m", "--no-hashes") == 0
    path.unlink()
    assert _run("inspect", tmp_path / "m") == 2
    assert "missing" in capsys.readouterr().out


def test_inspect_names_a_hostile_file(source, tmp_path, capsys):
    import os

    class Shell:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'marker'}",)

    assert _run("import", source, tmp_path / "m", "--no-verify", "--format", "torch") == 0
    torch.save({"model": {}, "x": Shell()}, tmp_path / "m" / "release" / "mp_rank_00" / "model_optim_rng.pt")
    assert _run("inspect", tmp_path / "m") == 1
    assert "system" in capsys.readouterr().err
    assert not (tmp_path / "marker").exists()


def test_inspect_loads_no_torch(source, tmp_path):
    """It reads headers and descriptions: of every format, those of the tensors included."""
    for format_ in ("torch_dist", "torch"):
        assert _run("import", source, tmp_path / format_, "--no-verify", "--format", format_) == 0
    paths = [str(source), str(tmp_path / "torch_dist"), str(tmp_path / "torch")]
    code = (
        "import sys; from megatron_dmc.cli import main\n"
        f"assert not any(main(['convert', 'inspect', path]) for path in {paths})\n"
        "print([name for name in ('torch', 'numpy', 'safetensors') if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "[]"


def test_inspect_tells_the_settings_of_dmc(tmp_path, capsys):
    write_model(tmp_path / "hf", TINY, DMCConfig(stage="consolidate", window_size=12))
    assert _run("inspect", tmp_path / "hf") == 0
    assert "stage=consolidate" in capsys.readouterr().out


def test_a_setting_that_the_user_knows_to_be_harmless(source, tmp_path, capsys):
    config = json.loads((source / "config.json").read_text()) | {"frobnicate": 3, "twiddle": None}
    (source / "config.json").write_text(json.dumps(config))
    for arguments in (["import", source, tmp_path / "m"], ["import", source, tmp_path / "m", "--dry-run"]):
        assert _run(*arguments) == 1
        told = capsys.readouterr().err
        assert "unknown settings frobnicate=3" in told
        assert "--ignore-setting frobnicate" in told
        assert "GB/s" not in told
        assert not (tmp_path / "m").exists()
    ignoring = ["--ignore-setting", "frobnicate"]
    assert _run("import", source, tmp_path / "m", "--no-verify", *ignoring) == 0
    told = capsys.readouterr().err
    assert "frobnicate=3 is ignored" in told
    assert "unknown setting twiddle=None is taken for one that is off" in told
    manifest = json.loads((tmp_path / "m" / "release" / "manifest.json").read_text())
    assert manifest["ignored_settings"] == ["frobnicate"]
    assert _run("verify", source, tmp_path / "m", "--no-logits") == 2
    assert _run("verify", source, tmp_path / "m", "--no-logits", *ignoring) == 0
    capsys.readouterr()
    assert _run("inspect", source, *ignoring) == 0
    assert "frobnicate=3 is ignored" in capsys.readouterr().out


def test_no_weight_is_read_before_every_setting_is_checked(source, tmp_path, capsys, monkeypatch):
    """A token id that is none was noticed after the whole conversion."""
    config = json.loads((source / "config.json").read_text()) | {"pad_token_id": -7}
    (source / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(StoredTensor, "read", lambda _: pytest.fail("a tensor was read"))
    assert _run("import", source, tmp_path / "m") == 1
    assert "pad_token_id=-7 is not a token id" in capsys.readouterr().err
