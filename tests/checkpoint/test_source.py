"""Parts of tensors, as a tensor-parallel rank asks for them, from any kind of checkpoint."""

import pytest
import torch

from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.models.fusion import Cut
from megatron_dmc.models.tensors import by_hf_name


@pytest.mark.parametrize("kind", ["hugging face", "torch_dist", "legacy"])
def test_a_part_is_that_of_the_whole_in_memory_of_its_own(kind, request, tmp_path):
    directory = request.getfixturevalue("legacy" if kind == "legacy" else "torch_dist")
    source = open_source(tmp_path / "hf" if kind == "hugging face" else directory.parent)
    for name, (entry, _) in by_hf_name(source.config).items():
        whole, axis = source.tensor(name), entry.row.layout.axis
        if axis is None:
            assert whole.ndim == 1
            continue
        for cut in (Cut(axis, 0, 5), Cut(axis, 7, whole.shape[axis])):
            part = source.tensor(name, cut)
            assert torch.equal(part, whole.narrow(axis, cut.first, cut.last - cut.first))
            assert part.shape == cut.shape(whole.shape)
            assert part.untyped_storage().nbytes() == part.nbytes
