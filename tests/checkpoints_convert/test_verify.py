"""``verify`` notices every difference, and fails where it cannot compare."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert import forward
from checkpoints_convert import verify as verify_module
from checkpoints_convert.forward import LOGITS, ForwardJob, states
from checkpoints_convert.hf_to_megatron import import_checkpoint
from checkpoints_convert.megatron_to_hf import export_checkpoint
from checkpoints_convert.options import Options
from checkpoints_convert.sizes import forward_bytes
from checkpoints_convert.verify import verify
from megatron_dmc.config import DMCConfig, has_adapter
from megatron_dmc.support.errors import CheckFailed
from tests.checkpoints_convert.models import TINY, VARIANTS, write_model

UNVERIFIED = Options(verify=False)


@pytest.fixture
def pair(tmp_path):
    """A Hugging Face directory and its import."""
    source = write_model(tmp_path / "hf")
    import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    return source, tmp_path / "megatron"


def test_equal_tensors(pair):
    compared = verify(*pair, logits=False)
    assert compared.tensors == 3 + 9 * TINY.num_layers
    assert "equal bit for bit" in compared.lines()[0]


def _change_tensor(source, name, change) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, source / "model.safetensors")


def test_one_flipped_bit_is_told_with_its_tensor(pair):
    def flip(tensor):
        tensor.view(torch.int32)[3, 4] ^= 1
        return tensor

    _change_tensor(pair[0], "model.layers.2.self_attn.k_proj.weight", flip)
    with pytest.raises(CheckFailed, match=r"model\.layers\.2\.self_attn\.k_proj\.weight differs in 1 of"):
        verify(*pair, logits=False)


def test_the_sign_of_zero_and_nan_count(pair):
    _change_tensor(pair[0], "model.norm.weight", torch.zeros_like)
    import_checkpoint(pair[0], pair[1], options=Options(verify=False, overwrite=True))
    verify(*pair, logits=False)
    _change_tensor(pair[0], "model.norm.weight", lambda tensor: -tensor)
    with pytest.raises(CheckFailed, match="differs in 32 of 32"):
        verify(*pair, logits=False)


def test_a_configuration_that_differs(pair):
    config = json.loads((pair[0] / "config.json").read_text())
    (pair[0] / "config.json").write_text(json.dumps({**config, "rope_theta": 20000.0}))
    with pytest.raises(CheckFailed, match=r"rope_theta: 20000\.0 and 10000\.0"):
        verify(*pair)


def test_a_damaged_file_is_a_failed_check(pair):
    path = pair[1] / "release" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckFailed, match="SHA-256"):
        verify(*pair, logits=False)
    (pair[1] / "release" / "manifest.json").unlink()
    path.write_bytes(data[:-5000])
    with pytest.raises(CheckFailed, match="could not be made"):
        verify(*pair, logits=False)


def test_a_path_without_a_checkpoint_is_the_users_mistake(pair, tmp_path):
    with pytest.raises(ValueError, match="not a directory"):
        verify(pair[0], tmp_path / "absent")


def test_an_export_of_zero_out_is_compared_with_cleared_channels(tmp_path):
    source = write_model(tmp_path / "hf", TINY, DMCConfig(stage="zero_out"))
    import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", options=UNVERIFIED)
    compared = verify(tmp_path / "megatron", tmp_path / "back", logits=False)
    assert compared.clears_borrowed == (True, False)
    _change_tensor(tmp_path / "back", "model.layers.0.self_attn.q_proj.weight", lambda tensor: tensor + 1)
    (tmp_path / "back" / "manifest.json").unlink()
    with pytest.raises(CheckFailed, match="q_proj"):
        verify(tmp_path / "megatron", tmp_path / "back", logits=False)


def test_borrowed_channels_that_an_export_left_are_noticed(tmp_path):
    """Only the side with DMC is cleared: a plain Llama must really have zeros there."""
    source = write_model(tmp_path / "hf", TINY, DMCConfig(stage="zero_out"))
    plain = write_model(tmp_path / "plain")
    with pytest.raises(CheckFailed, match="q_proj"):
        verify(source, plain, logits=False)


def test_different_dmc_settings(tmp_path):
    first = write_model(tmp_path / "a", TINY, DMCConfig(window_size=12))
    second = write_model(tmp_path / "b", TINY, DMCConfig(window_size=0))
    with pytest.raises(CheckFailed, match="DMC settings"):
        verify(first, second, logits=False)


class _Model:
    """Three layers that add numbers; ``wrong`` is the layer that adds too much."""

    num_layers = 3

    def __init__(self, wrong: int | None = None) -> None:
        self.wrong = wrong

    def embed(self, tokens):
        return tokens[..., None].float().expand(*tokens.shape, 4) + 1

    def layer(self, index, hidden):
        return hidden + index + (0.5 if index == self.wrong else 0.0)

    def final_norm(self, hidden):
        return hidden * torch.tensor([1.0, 2.0, 4.0, 3.0])

    def output_weight(self):
        return torch.eye(4).half()


def _fake_forward(wrong):
    def run(job: ForwardJob):
        return dict(states(_Model(wrong if "megatron" in job.path else None), job))

    return run


@pytest.mark.parametrize("wrong", [None, 1])
def test_the_first_layer_that_diverges_is_named(pair, monkeypatch, wrong):
    monkeypatch.setattr(verify_module, "run_forward", _fake_forward(wrong))
    if wrong is None:
        compared = verify(*pair)
        assert (compared.equal_predictions, compared.max_difference) == (1.0, 0.0)
        assert any("100.0% equal predictions" in line for line in compared.lines())
    else:
        with pytest.raises(CheckFailed, match="diverge at layer 1"):
            verify(*pair)


def test_little_memory_walks_the_first_layers_and_says_so(pair, monkeypatch):
    monkeypatch.setattr(verify_module, "run_forward", _fake_forward(None))
    needs = forward_bytes(TINY)
    monkeypatch.setattr(verify_module, "forward_bytes", lambda config: needs._replace(whole=needs.layers + 10))
    compared = verify(*pair, max_memory=needs.layers + 5)
    assert compared.layers == 2
    assert "first 2 of 4 layers" in compared.lines()[-1]
    with pytest.raises(CheckFailed, match="--max-memory"):
        verify(*pair, max_memory=needs.layers - 1)


def test_a_process_that_fails_is_a_failed_check(tmp_path):
    job = ForwardJob(str(tmp_path), [[1]], 1, False, 10)
    with pytest.raises(CheckFailed, match="holds no checkpoint"):
        forward.run_forward(job)


@pytest.mark.parametrize("absent", ["transformers", "megatron"])
def test_without_transformers_or_megatron_the_comparison_fails_and_says_so(pair, tmp_path, monkeypatch, absent):
    """A module of that name that cannot be imported stands in front of the real one."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / f"{absent}.py").write_text("raise ImportError('not installed')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "path"), os.getcwd()]))
    job = ForwardJob(str(pair[0] if absent == "transformers" else pair[1]), [[1]], 1, False, 10)
    with pytest.raises(CheckFailed, match=f"{absent}.* is needed"):
        forward.run_forward(job)


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", ["gqa", "tied", "bf16", "llama3", "linear", "qwen2", "qwen3"])
def test_megatrons_and_transformers_layers_agree(tmp_path, variant):
    pytest.importorskip("transformers")
    source = write_model(tmp_path / "hf", VARIANTS[variant])
    import_checkpoint(source, tmp_path / "megatron")
    compared = verify(source, tmp_path / "megatron")
    assert compared.layers == TINY.num_layers
    assert compared.equal_predictions == 1.0


@pytest.mark.exhaustive
def test_a_computation_that_differs_is_found_although_the_tensors_agree(tmp_path, monkeypatch):
    """A Megatron checkpoint whose saved arguments were changed behind our back."""
    source = write_model(tmp_path / "hf")
    import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    monkeypatch.setattr(verify_module, "_check_settings", lambda first, second: (False, False))
    with pytest.raises(CheckFailed, match="diverge at layer 0"):
        verify(source, tmp_path / "megatron")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "settings",
    [DMCConfig(stage="consolidate"), DMCConfig("dms"), DMCConfig("dms", decision_source="adapter")],
    ids=["dmc", "dms", "dms, adapter"],
)
def test_cleared_channels_in_both_walks(tmp_path, settings):
    source = write_model(tmp_path / "hf", dataclasses.replace(TINY, adapter=has_adapter(settings)), settings)
    import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    export_checkpoint(tmp_path / "megatron", tmp_path / "plain", as_llama=True)
    one, other = (
        forward.run_forward(ForwardJob(str(path), [[1, 2, 3]], 4, clears, TINY.vocab_size))
        for path, clears in ((source, True), (tmp_path / "plain", False))
    )
    assert torch.allclose(one[LOGITS], other[LOGITS], atol=1e-5)


@pytest.mark.slow
def test_transformers_logits_of_directories_as_people_have_them(tmp_path):
    """Pickled weights, mixed types and a tied tensor under its other name go through the whole comparison."""
    source = write_model(tmp_path / "hf", VARIANTS["tied"], torch_dtype="bfloat16", frobnicate=1)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    tensors = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    options = Options(ignored_settings=("frobnicate",))
    save_file(tensors, source / "model.safetensors")
    import_checkpoint(source, tmp_path / "from_safetensors", options=options)
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    import_checkpoint(source, tmp_path / "from_pickle", options=options)
    found = verify(tmp_path / "from_safetensors", tmp_path / "from_pickle")
    assert found.equal_predictions == 1.0
