"""Layout functions are inverse to each other, and mean what Megatron means."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_convert.megatron_writer import MegatronLayout
from megatron_dmc.models import fusion
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.fusion import MegatronShape, fuse_qkv, padded_vocab_size, split_qkv
from megatron_dmc.models.tensors import entries


@st.composite
def shapes(draw: st.DrawFn) -> tuple[MegatronShape, int]:
    """A small model and a tensor parallel size that fits it."""
    tensor_size = draw(st.sampled_from([1, 2, 4]))
    groups = tensor_size * draw(st.integers(1, 3))
    config = ModelConfig(
        hidden_size=draw(st.integers(1, 6)),
        num_layers=1,
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_kv_heads=groups,
        head_dim=2 * draw(st.integers(1, 4)),
        ffn_hidden_size=tensor_size * draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(1, 400)),
        max_position_embeddings=8,
    )
    return MegatronShape(config, padded_vocab_size(config.vocab_size, tensor_size)), tensor_size


def _numbered(*shape: int, start: int = 0) -> torch.Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.arange(start, start + count).view(shape)


@settings(deadline=None)
@given(shapes())
def test_every_entry_survives_fusing_and_cutting(case):
    shape, tensor_size = case
    for entry in entries(shape.config):
        parts = [
            _numbered(*size, start=1 + 100_000 * place) for place, size in enumerate(entry.hf_shapes(shape.config))
        ]
        layout = entry.row.layout
        fused = layout.fuse(parts, shape)
        assert tuple(fused.shape) == entry.megatron_shape(shape)
        shards = layout.shard(fused, tensor_size)
        assert [shard.shape for shard in shards] == [layout.shard_shape(fused.shape, tensor_size)] * tensor_size
        assert torch.equal(layout.unshard(shards), fused)
        for part, again in zip(parts, layout.split(fused, shape), strict=True):
            assert torch.equal(part, again)


@settings(deadline=None)
@given(shapes())
def test_a_rank_holds_whole_groups(case):
    """The shard of a rank is the fused tensor of that rank's heads: what tensor parallelism needs."""
    shape, tensor_size = case
    config = shape.config
    q = _numbered(config.num_attention_heads * config.head_dim, config.hidden_size)
    k = _numbered(config.num_kv_heads * config.head_dim, config.hidden_size, start=10_000)
    v = _numbered(config.num_kv_heads * config.head_dim, config.hidden_size, start=20_000)
    local = ModelConfig(
        config.hidden_size,
        1,
        config.num_attention_heads // tensor_size,
        config.num_kv_heads // tensor_size,
        config.head_dim,
        config.ffn_hidden_size // tensor_size,
        config.vocab_size,
        8,
    )
    shards = fusion.QKV.shard(fuse_qkv(q, k, v, config), tensor_size)
    for rank, shard in enumerate(shards):
        own = [whole.chunk(tensor_size)[rank] for whole in (q, k, v)]
        for expected, got in zip(own, split_qkv(shard, local), strict=True):
            assert torch.equal(expected, got)


def test_the_order_within_a_group_in_words():
    """Two KV heads with two queries each, one row per head: q0 q1 k0 v0, q2 q3 k1 v1."""
    config = ModelConfig(1, 1, 4, 2, 2, 1, 1, 1)
    q, k, v = torch.arange(8)[:, None], torch.arange(100, 104)[:, None], torch.arange(200, 204)[:, None]
    fused = fuse_qkv(q, k, v, config)
    assert fused.flatten().tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]


def test_a_rank_of_gate_and_up_holds_both():
    gate, up = torch.arange(4)[:, None], torch.arange(10, 14)[:, None]
    shards = fusion.GATE_UP.shard(torch.cat([gate, up]), 2)
    assert [shard.flatten().tolist() for shard in shards] == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_a_shape_that_does_not_divide_is_refused():
    assert fusion.REPLICATED.shard_shape((5, 3), 2) == (5, 3)
    for layout in (fusion.COLUMNS, fusion.VOCABULARY, fusion.QKV, fusion.GATE_UP):
        with pytest.raises(ValueError, match="2 equal shards"):
            layout.shard_shape((5, 3), 2)


def test_copies_that_differ_are_noticed():
    with pytest.raises(ValueError, match="different copies"):
        fusion.REPLICATED.unshard([torch.ones(2), torch.zeros(2)])


def test_the_vocabulary_is_padded_with_zeros_and_cut():
    assert [padded_vocab_size(32000, size) for size in (1, 2, 4, 8)] == [32000, 32000, 32256, 32768]
    config = ModelConfig(2, 1, 2, 2, 2, 2, 3, 8)
    shape = MegatronShape(config, 128)
    padded = fusion.VOCABULARY.fuse([torch.ones(3, 2)], shape)
    assert padded.shape == (128, 2)
    assert padded.sum() == 6
    assert torch.equal(fusion.VOCABULARY.split(padded, shape)[0], torch.ones(3, 2))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_model_chunks_cover_the_layers_once(pipeline, virtual, per_chunk):
    num_layers = pipeline * virtual * per_chunk
    layout = MegatronLayout("torch", 1, pipeline, per_chunk if virtual > 1 else None)
    chunks = layout.chunks(num_layers)
    assert len(chunks) == pipeline
    assert {len(of_rank) for of_rank in chunks} == {virtual}
    in_order = [layer for stage in range(virtual) for rank in range(pipeline) for layer in chunks[rank][stage]]
    assert in_order == list(range(num_layers))


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        (MegatronLayout("torch", 3), "num_kv_heads=2"),
        (MegatronLayout("torch", 1, 3), "4 layers"),
        (MegatronLayout("torch", 1, 2, 3), "virtual"),
        (MegatronLayout("torch", 1, 1, 2), "virtual"),
        (MegatronLayout("torch", 0), "at least 1"),
        (MegatronLayout("torch_dist", 2), "any layout"),
        (MegatronLayout("zarr"), "zarr"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layout, told):
    config = ModelConfig(8, 4, 4, 2, 4, 12, 10, 8)
    with pytest.raises(ValueError, match=told):
        layout.check(config)
