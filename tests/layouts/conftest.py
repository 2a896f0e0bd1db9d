import importlib.util

import pytest

from tests.layouts.laboratory import Laboratory


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory):
    # Looked up, not imported: only the ranks may load Megatron.
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("needs megatron-core")
    return Laboratory(tmp_path_factory.mktemp("layouts"))
