"""File names from an index stay in their directory."""

import pytest

from megatron_dmc.checkpoint.bounded import confined
from megatron_dmc.support.files import parse_json, read_bounded


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", "a/../../b", None, 3, ["a"]]
)
def test_names_that_are_not_plain_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="plain file names"):
        confined(tmp_path, name)


def test_a_link_must_not_lead_out(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("secret")
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "shard").symlink_to(outside)
    (directory / "inner").symlink_to(directory / "real")
    with pytest.raises(ValueError, match="outside its directory"):
        confined(directory, "shard")
    assert confined(directory, "inner") == directory / "inner"


def test_the_cache_of_hugging_face_links_to_its_blobs(tmp_path):
    model = tmp_path / "models--org--name"
    snapshot, blobs = model / "snapshots" / "abc", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("x")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert confined(snapshot, "model.safetensors").read_text() == "x"


def test_reading_is_bounded(tmp_path):
    (tmp_path / "a").write_bytes(b"123456")
    assert read_bounded(tmp_path / "a", 6) == b"123456"
    with pytest.raises(ValueError, match="larger than the 5 bytes"):
        read_bounded(tmp_path / "a", 5)
    with pytest.raises(ValueError, match="not a regular file"):
        read_bounded(tmp_path, 5)


def test_numbers_that_are_none():
    with pytest.raises(ValueError, match="Infinity"):
        parse_json(b'{"a": Infinity}', "it")
