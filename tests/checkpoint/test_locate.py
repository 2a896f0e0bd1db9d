"""Which checkpoint a path means."""

import pytest

from megatron_dmc.checkpoint.locate import HUGGING_FACE, LEGACY, TORCH_DIST, locate


def test_every_way_to_name_a_checkpoint(torch_dist, legacy, tmp_path):
    assert (locate(torch_dist).format, locate(torch_dist).root) == (TORCH_DIST, torch_dist.parent)
    assert locate(torch_dist.parent).directory == torch_dist
    assert locate(legacy.parent).format == LEGACY
    assert locate(tmp_path / "hf").format == HUGGING_FACE


def test_an_iteration_and_its_number(torch_dist):
    torch_dist.rename(torch_dist.parent / "iter_0001500")
    (torch_dist.parent / "latest_checkpointed_iteration.txt").write_text("1500\n")
    assert locate(torch_dist.parent).iteration == 1500
    assert locate(torch_dist.parent / "iter_0001500").iteration == 1500


def test_ranks_beside_the_tracker_as_in_the_published_releases(legacy):
    for rank in list(legacy.glob("mp_rank_*")):
        rank.rename(legacy.parent / rank.name)
    (legacy.parent / "latest_checkpointed_iteration.txt").write_text("2000")
    place = locate(legacy.parent)
    assert (place.format, place.directory, place.iteration) == (LEGACY, legacy.parent, 2000)


@pytest.mark.parametrize("text", ["", "x", "-1", "1e3", "../other", "9" * 100, "release\nx"])
def test_a_tracker_that_holds_something_else(torch_dist, text):
    (torch_dist.parent / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(ValueError, match="latest_checkpointed_iteration"):
        locate(torch_dist.parent)


def test_a_tracker_that_names_nothing(torch_dist):
    (torch_dist.parent / "latest_checkpointed_iteration.txt").write_text("5")
    with pytest.raises(ValueError, match=r"iter_0000005 is missing"):
        locate(torch_dist.parent)


def test_directories_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="not a directory"):
        locate(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        locate(tmp_path)


def test_the_tracker_decides_where_it_lies_inside_an_iteration(torch_dist):
    """Megatron, told to load this folder, would follow the tracker in it."""
    (torch_dist / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(ValueError, match=r"beside latest_checkpointed_iteration.txt, which names iter_0000003"):
        locate(torch_dist)


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "common.pt", "__0_0.distcp", "mp_rank_00"])
def test_parts_beside_a_tracker_that_names_a_folder_are_refused(torch_dist, name):
    (torch_dist.parent / name).mkdir()
    with pytest.raises(ValueError, match="which of the two"):
        locate(torch_dist.parent)


def test_metadata_json_decides_over_ranks_as_it_does_for_megatron(torch_dist):
    (torch_dist / "mp_rank_00").mkdir()
    assert locate(torch_dist).format == TORCH_DIST
    (torch_dist / ".metadata").unlink()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        locate(torch_dist.parent)
