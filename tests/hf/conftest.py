"""One exported model for all tests of this folder, and the same in our engine."""

import pytest

from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.inference.decoder.decoder import Decoder
from tests.hf.exported import SETTINGS, load
from tests.inference.model_directory import write_model


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    write_model(path, SETTINGS)
    return path


@pytest.fixture(scope="session")
def model(directory):
    return load(directory)


@pytest.fixture(scope="session")
def ours(directory):
    return Decoder(open_source(directory))
