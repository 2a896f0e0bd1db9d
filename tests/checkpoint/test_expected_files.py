"""What lies beside the files of a checkpoint: known, told, or refused."""

import os
import shutil

import pytest

from megatron_dmc.checkpoint import expected_files
from megatron_dmc.checkpoint.expected_files import check_files
from megatron_dmc.checkpoint.guard import examine
from megatron_dmc.checkpoint.locate import locate


def test_what_we_and_megatron_write_is_known(torch_dist, legacy, tmp_path):
    for directory in (torch_dist, legacy):
        assert check_files(locate(directory.parent)) == []
    (torch_dist / "integrity.json").write_text("{}")
    shutil.copyfile(legacy / "mp_rank_00_000" / "model_optim_rng.pt", legacy / "mp_rank_00_000" / "distrib_optim.pt")
    for directory in (torch_dist, legacy):
        assert check_files(locate(directory.parent)) == []


@pytest.mark.parametrize("name", ["README.md", "run_config.yaml", "notes.txt", ".nfs0000000000a1", "tokenizer/x.json"])
def test_files_that_no_loader_opens_are_told(torch_dist, name):
    (torch_dist / name).parent.mkdir(exist_ok=True)
    (torch_dist / name).write_text("x")
    assert check_files(locate(torch_dist)) == [name]
    assert examine(torch_dist).unknown == (name,)


@pytest.mark.parametrize(
    "name", ["x.pt", "x.bin", "x.pth", "x.ckpt", "x.npy", "x.so", ".metadata.bak", "x", "__0_0.distcp~"]
)
def test_files_that_a_loader_could_open_are_refused(torch_dist, name):
    (torch_dist / name).write_text("x")
    with pytest.raises(ValueError, match="a loader could open it"):
        check_files(locate(torch_dist.parent))


def test_links_within_the_checkpoint_are_followed(torch_dist):
    (torch_dist / "__0_0.distcp").rename(torch_dist / "__9_0.distcp")
    (torch_dist / "__0_0.distcp").symlink_to("__9_0.distcp")
    assert examine(torch_dist.parent).pickles > 20


def test_a_link_to_a_folder_is_refused(torch_dist):
    (torch_dist / "more").symlink_to(torch_dist)
    with pytest.raises(ValueError, match="link to a folder"):
        check_files(locate(torch_dist.parent))


def test_a_checkpoint_that_is_itself_reached_by_a_link(torch_dist, tmp_path):
    (tmp_path / "named").symlink_to(torch_dist.parent)
    assert examine(tmp_path / "named").pickles > 20


def test_a_flood_of_files_ends(torch_dist, monkeypatch):
    monkeypatch.setattr(expected_files, "ENTRIES_LIMIT", 3)
    with pytest.raises(ValueError, match="more than 3 files"):
        check_files(locate(torch_dist.parent))


def test_a_model_directory_holds_regular_files(torch_dist, tmp_path):
    model = tmp_path / "hf"
    assert check_files(locate(model)) == []
    os.mkfifo(model / "tokenizer.json")
    with pytest.raises(ValueError, match="a named pipe"):
        check_files(locate(model))
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="is a link to"):
        check_files(locate(model))
