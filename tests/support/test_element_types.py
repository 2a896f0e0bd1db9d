"""What is said of element types without torch is what torch says."""

import pytest

from megatron_dmc.checkpoint.allowed import STORAGE_DTYPES
from megatron_dmc.support.element_types import ELEMENT_TYPES

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("name", ELEMENT_TYPES)
def test_name_and_size_are_those_of_torch(name):
    element_type = ELEMENT_TYPES[name]
    assert str(element_type.dtype) == f"torch.{name}" == f"torch.{element_type}"
    assert element_type.itemsize == element_type.dtype.itemsize


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("storage", STORAGE_DTYPES)
def test_storages_hold_the_type_that_torch_gives_them(storage):
    assert STORAGE_DTYPES[storage].dtype == getattr(torch, storage.removeprefix("torch.")).dtype
