"""Import and export: every tensor comes back bit for bit, and transformers finds nothing missing."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.hf_to_megatron import import_checkpoint
from checkpoints_convert.hf_writer import plan_shards, write_weights
from checkpoints_convert.megatron_to_hf import export_checkpoint
from checkpoints_convert.megatron_writer import ANY_LAYOUT, MegatronLayout
from checkpoints_convert.options import Options
from checkpoints_convert.verify import verify
from megatron_dmc.checkpoint.manifest import manifest_problems
from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.config import DMCConfig, has_adapter
from tests.checkpoints_convert.models import (
    TINY,
    VARIANTS,
    random_tensors,
    transformers_logits,
    write_model,
    write_with_transformers,
)

UNVERIFIED = Options(verify=False)
TOKENS = [[1, 5, 200, 7], [3, 3, 100, 9]]
LAYOUTS = {
    "torch_dist": ANY_LAYOUT,
    "legacy": MegatronLayout("torch"),
    "legacy 2x2": MegatronLayout("torch", 2, 2),
    "legacy 1x2 virtual": MegatronLayout("torch", 1, 2, 1),
    "legacy local": MegatronLayout("torch", 2, 1, None, "local"),
}


def _same_tensors(first, second) -> None:
    one, other = open_source(first), open_source(second)
    assert one.config == other.config
    assert one.names() == other.names()
    for name in one.names():
        assert torch.equal(one.tensor(name), other.tensor(name)), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_in_every_layout(tmp_path, variant, layout):
    source = write_model(tmp_path / "hf", VARIANTS[variant])
    import_checkpoint(source, tmp_path / "megatron", layout=LAYOUTS[layout], options=UNVERIFIED)
    _same_tensors(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", options=UNVERIFIED)
    _same_tensors(source, tmp_path / "back")
    for directory in (tmp_path / "megatron" / "release", tmp_path / "back"):
        assert manifest_problems(directory) == []


@pytest.mark.parametrize("variant", ["gqa", "tied", "bf16", "llama3", "qwen2", "qwen3"])
def test_transformers_loads_the_export_and_computes_the_same(tmp_path, variant):
    pytest.importorskip("transformers")
    source = write_with_transformers(tmp_path / "hf", VARIANTS[variant])
    assert (source / "model.safetensors.index.json").is_file()
    import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", options=UNVERIFIED)
    assert torch.equal(transformers_logits(tmp_path / "back", TOKENS), transformers_logits(source, TOKENS))


def test_shards_and_their_index(tmp_path):
    shards = plan_shards(TINY, 20_000)
    assert len(shards) > 3
    assert shards[0].file_name == f"model-00001-of-{len(shards):05d}.safetensors"
    tensors = random_tensors(TINY)
    write_weights(tmp_path, TINY, lambda entry: [tensors[name] for name in entry.hf_names], shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / shard)[name], tensors[name])


def test_the_companions_travel(tmp_path):
    source = write_model(tmp_path / "hf", eos_token_id=[2, 3])
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.6}')
    import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", options=UNVERIFIED)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 3])


def test_a_tokenizer_given_by_hand(tmp_path):
    source = write_model(tmp_path / "hf")
    import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    other = tmp_path / "tokenizer"
    other.mkdir()
    with pytest.raises(ValueError, match="no tokenizer"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back", tokenizer=other, options=UNVERIFIED)
    assert not (tmp_path / "back").exists()
    (other / "tokenizer.json").write_text('{"x": 1}')
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", tokenizer=other, options=UNVERIFIED)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == '{"x": 1}'


def test_settings_of_dmc_travel(tmp_path):
    dmc = DMCConfig(stage="consolidate", window_size=12, target_cr=4.0)
    source = write_model(tmp_path / "hf", TINY, dmc)
    import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    assert open_source(tmp_path / "megatron").dmc == dmc
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", measured_cr=3.91, options=UNVERIFIED)
    assert open_source(tmp_path / "back").dmc == dmc
    _same_tensors(source, tmp_path / "back")
    card = (tmp_path / "back" / "README.md").read_text()
    assert "3.91" in card
    assert "one length per request" in card


@pytest.mark.parametrize(("stage", "as_llama"), [("zero_out", False), ("retrofit", True)])
def test_a_plain_llama_from_a_dmc_checkpoint_has_no_borrowed_channels(tmp_path, stage, as_llama):
    source = write_model(tmp_path / "hf", TINY, DMCConfig(stage=stage))
    import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", as_llama=as_llama, options=UNVERIFIED)
    before, after = open_source(source), open_source(tmp_path / "back")
    assert after.dmc is None
    for name in before.names():
        expected = before.tensor(name).clone()
        if "q_proj" in name or "k_proj" in name:
            expected[TINY.head_dim - 1 :: TINY.head_dim] = 0
        assert torch.equal(after.tensor(name), expected), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decision_source", ["neuron", "adapter"])
def test_models_that_evict_travel(tmp_path, decision_source, layout):
    dmc = DMCConfig("dms", window_size=8, decision_source=decision_source, decided_by="next")
    source = write_model(tmp_path / "hf", dataclasses.replace(TINY, adapter=has_adapter(dmc)), dmc)
    import_checkpoint(source, tmp_path / "megatron", layout=LAYOUTS[layout], options=UNVERIFIED)
    _same_tensors(source, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", options=UNVERIFIED)
    assert open_source(tmp_path / "back").dmc == dmc
    _same_tensors(source, tmp_path / "back")
    card = (tmp_path / "back" / "README.md").read_text()
    assert "Dynamic Memory Sparsification (arXiv 2506.05345)" in card
    assert "evicted from its key-value cache once 8 more have come" in card
    assert "merge" not in card


@pytest.mark.parametrize("decision_source", ["neuron", "adapter"])
def test_a_plain_llama_from_a_model_that_evicts(tmp_path, decision_source):
    """Without the channel of the first query head of each KV head, or without the adapter; nothing else changes."""
    dmc = DMCConfig("dms", decision_source=decision_source)
    source = write_model(tmp_path / "hf", dataclasses.replace(TINY, adapter=has_adapter(dmc)), dmc)
    import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", as_llama=True, options=UNVERIFIED)
    assert verify(source, tmp_path / "back", logits=False).clears_borrowed == (True, False)
    before, after = open_source(source), open_source(tmp_path / "back")
    assert (after.dmc, after.config) == (None, TINY)
    for name in after.names():
        expected = before.tensor(name).clone()
        if "q_proj" in name and decision_source == "neuron":
            expected[TINY.head_dim - 1 :: TINY.queries_per_kv_head * TINY.head_dim] = 0
        assert torch.equal(after.tensor(name), expected), name


def test_stage_off_exports_as_it_is(tmp_path):
    source = write_model(tmp_path / "hf", TINY, DMCConfig(stage="off"))
    import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", options=UNVERIFIED)
    assert open_source(tmp_path / "back").dmc is None
    _same_tensors(source, tmp_path / "back")


def test_a_vocabulary_that_nobody_states(tmp_path):
    source = write_model(tmp_path / "hf")
    import_checkpoint(source, tmp_path / "legacy", layout=MegatronLayout("torch"), options=UNVERIFIED)
    path = tmp_path / "legacy" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    state["args"].vocab_size = None
    torch.save(state, path)
    with pytest.raises(ValueError, match="--vocab-size"):
        export_checkpoint(tmp_path / "legacy", tmp_path / "back", options=UNVERIFIED)
    with pytest.raises(ValueError, match="384 rows"):
        export_checkpoint(tmp_path / "legacy", tmp_path / "back", vocab_size=1000, options=UNVERIFIED)
    export_checkpoint(tmp_path / "legacy", tmp_path / "back", vocab_size=257, options=UNVERIFIED)
    _same_tensors(source, tmp_path / "back")


def _tensors_without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in random_tensors(TINY).items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (_tensors_without("model.layers.2.mlp.up_proj.weight"), r"lacks model\.layers\.2\.mlp\.up_proj\.weight"),
        (random_tensors(TINY) | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, "q_proj.bias"),
        (random_tensors(TINY) | {"model.layers.4.mlp.up_proj.weight": torch.ones(1)}, r"unknown model\.layers\.4"),
        (random_tensors(TINY) | {"model.norm.weight": torch.ones(31)}, "shape"),
    ],
    ids=["missing", "bias", "unknown layer", "shape"],
)
def test_tensors_that_are_not_the_models_are_named(tmp_path, tensors, told):
    source = write_model(tmp_path / "hf")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=told):
        import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    assert not (tmp_path / "megatron").exists()


def test_buffers_of_old_files_are_ignored_and_a_tied_head_must_be_equal(tmp_path):
    source = write_model(tmp_path / "hf", VARIANTS["tied"])
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors")
    import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match="ties the embeddings"):
        import_checkpoint(source, tmp_path / "other", options=UNVERIFIED)


def test_an_index_that_lies(tmp_path):
    source = write_with_transformers(tmp_path / "hf", TINY)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(name for name, shard in index["weight_map"].items() if shard == first)
    for shard, told in (("../hf/" + first, "plain file names"), (second, "against the index"), (3, "weight_map")):
        path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], name: shard}}))
        with pytest.raises(ValueError, match=told):
            import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)


def test_wrong_directions_and_places(tmp_path):
    source = write_model(tmp_path / "hf")
    import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    with pytest.raises(ValueError, match="already"):
        import_checkpoint(tmp_path / "megatron", tmp_path / "x", options=UNVERIFIED)
    with pytest.raises(ValueError, match="already"):
        export_checkpoint(source, tmp_path / "x", options=UNVERIFIED)
    with pytest.raises(ValueError, match="--overwrite"):
        import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    with pytest.raises(ValueError, match="--max-memory"):
        import_checkpoint(source, tmp_path / "x", options=Options(verify=False, max_memory=1000))


def test_conversion_and_inspection_import_neither_transformers_nor_megatron(tmp_path):
    source = write_model(tmp_path / "hf")
    program = (
        "import sys\n"
        "from checkpoints_convert.hf_to_megatron import import_checkpoint\n"
        "from checkpoints_convert.megatron_to_hf import export_checkpoint\n"
        "from checkpoints_convert.options import Options\n"
        "import_checkpoint(sys.argv[1], sys.argv[2], options=Options(verify=False))\n"
        "export_checkpoint(sys.argv[2], sys.argv[3], options=Options(verify=False))\n"
        "from checkpoints_convert.inspect import inspect_checkpoint\n"
        "assert not any(inspect_checkpoint(path).problems for path in sys.argv[1:])\n"
        "heavy = {'transformers', 'megatron', 'safetensors', 'sentencepiece', 'matplotlib'} & set(sys.modules)\n"
        "assert heavy <= {'safetensors'}, heavy\n"
    )
    command = [sys.executable, "-c", program, source, tmp_path / "megatron", tmp_path / "back"]
    subprocess.run(list(map(str, command)), check=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
