"""A manifest notices every change of its files."""

import json

import pytest

from megatron_dmc.checkpoint.manifest import manifest_problems, read_manifest, write_manifest


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_text("two")
    write_manifest(tmp_path)
    return tmp_path


def test_a_whole_directory_has_no_problems(directory):
    assert manifest_problems(directory) == []
    assert set(read_manifest(directory)["files"]) == {"a", "b/c"}


def test_changes_are_told_by_name(directory):
    (directory / "a").write_text("eno")
    assert manifest_problems(directory) == ["a has another SHA-256 than when it was written"]
    assert manifest_problems(directory, hashes=False) == []
    (directory / "a").write_text("longer")
    (directory / "b" / "c").unlink()
    (directory / "new").write_text("x")
    problems = manifest_problems(directory, hashes=False)
    assert problems == ["a has 6 bytes instead of 3", "b/c is missing", "new is not in the manifest"]


def test_without_a_manifest_there_is_nothing_to_compare(tmp_path):
    assert read_manifest(tmp_path) is None
    assert manifest_problems(tmp_path) == []


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"schema_version": 2, "files": {}}', '{"schema_version": 1, "files": {"a": 1}}']
)
def test_a_damaged_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        manifest_problems(tmp_path)


def test_known_hashes_are_not_computed_again(tmp_path):
    (tmp_path / "a").write_text("one")
    write_manifest(tmp_path, {"a": "0" * 64})
    assert json.loads((tmp_path / "manifest.json").read_text())["files"]["a"]["sha256"] == "0" * 64
