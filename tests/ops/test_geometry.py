"""Positions, chunks and documents of a pass."""

import pytest
import torch

from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.rope import inverse_frequencies, rotate


def test_chunks_and_documents_in_numbers():
    geometry = Geometry(12, 2, query_starts=[9, 0], num_queries=6, documents=[[0, 4], [0]])
    assert geometry.query_T.tolist() == [9, 10, 11, 0, 1, 2]
    assert geometry.first_SB.nonzero().tolist() == [[0, 0], [0, 1], [4, 0]]


def test_queries_rotate_at_their_own_positions():
    frequencies = inverse_frequencies(8, 10000.0)
    whole, chunks = Geometry(12, 1, frequencies), Geometry(12, 1, frequencies, [8, 2], num_queries=4)
    x = torch.randn(12, 1, 3, 8)
    expected = rotate(x, whole.rotations(0.0, x.dtype)[0], x.dtype)[[8, 9, 2, 3]]
    q_rotation, k_rotation = chunks.rotations(0.0, x.dtype)
    assert torch.equal(rotate(x[[8, 9, 2, 3]], q_rotation, x.dtype), expected)
    assert torch.equal(rotate(x, k_rotation, x.dtype), rotate(x, whole.rotations(0.0, x.dtype)[1], x.dtype))


def test_positions_may_begin_anew():
    frequencies = inverse_frequencies(8, 10000.0)
    packed = Geometry(5, 1, frequencies, documents=[[0, 3]], position_S=torch.tensor([0, 1, 2, 0, 1]))
    cos, _ = packed.cos_sin_S
    assert torch.equal(cos[3:], cos[:2])


def test_what_follows_from_a_geometry_is_made_once():
    geometry = Geometry(4, 1, inverse_frequencies(8, 10000.0))
    assert geometry.rotations(0.5, torch.float32) is geometry.rotations(0.5, torch.bfloat16)
    assert geometry.rotations(0.5, torch.float32) is not geometry.rotations(1.0, torch.float32)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"query_starts": [0, 5, 9, 1, 2]}, "12 queries in 5 chunks"),
        ({"query_starts": [0, 7]}, r"those at \[7\] do not"),
        ({"documents": [[0]]}, "documents of 1 rows for a batch of 2"),
        ({"documents": [[0], [3]]}, r"document starts \[3\]: must ascend from 0"),
        ({"documents": [[0], [0, 12]]}, "stay below the sequence length 12"),
    ],
)
def test_wrong_places_are_named(places, message):
    with pytest.raises(ValueError, match=message):
        Geometry(12, 2, **places)
