"""Models of DMS as its authors' code saves them: read as ours, and what differs is refused by name."""

import dataclasses
import json

import pytest

from checkpoints_convert.hf_to_megatron import import_checkpoint
from checkpoints_convert.options import Options
from checkpoints_convert.verify import verify
from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.models.hugging_face import parse_hf_config, to_hf_config
from tests.checkpoints_convert.models import TINY, write_model

PUBLISHED = {
    "auto_map": {"AutoConfig": "configuration_qwen3_dms.Qwen3ConfigDMS"},
    "dms_alpha_per": "head",
    "dms_alpha_scale": 100.0,
    "dms_chunked_prefill": None,
    "dms_compile_limit": 72,
    "dms_cr": 8,
    "dms_disable_eviction": False,
    "dms_initial_alpha_offset": 5.0,
    "dms_manual_inference_mode": False,
    "dms_paged_attention_block_size": 256,
    "dms_preallocate_for_tokens": 4096,
    "dms_separate_alpha": True,
    "dms_tau": 0.1,
    "dms_window_size": 512,
}
SETTINGS = DMCConfig(
    "dms",
    target_cr=8.0,
    window_size=512,
    decision_source="adapter",
    decided_by="next",
    train="decisions",
    distill="reverse",
)


def test_settings_of_a_published_model():
    config, dmc = parse_hf_config({**to_hf_config(TINY), **PUBLISHED})
    assert dmc == SETTINGS
    assert config == dataclasses.replace(TINY, adapter=True)
    few = {name: PUBLISHED[name] for name in ("auto_map", "dms_separate_alpha")}
    assert parse_hf_config({**to_hf_config(TINY), **few}) == (config, dmc)


def test_a_plain_model_has_none():
    assert parse_hf_config(to_hf_config(TINY)) == (TINY, None)
    with pytest.raises(ValueError, match="auto_map"):
        parse_hf_config({**to_hf_config(TINY), "auto_map": PUBLISHED["auto_map"]})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dms_separate_alpha", False, "dms_separate_alpha=False must be True"),
        ("dms_alpha_scale", 10.0, "dms_alpha_scale=10.0 must be 100.0"),
        ("dms_alpha_per", "layer", "dms_alpha_per='layer' must be 'head'"),
        ("dms_disable_eviction", True, "dms_disable_eviction=True must be False"),
        ("dms_window_size", "512", "dms_window_size='512' must be a number"),
        ("dms_sinks", 4, "unknown settings dms_sinks=4"),
    ],
)
def test_what_computes_otherwise_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        parse_hf_config({**to_hf_config(TINY), **PUBLISHED, name: value})


def test_published_weights_become_a_checkpoint(tmp_path):
    """Names and shapes of the adapters are those of our table."""
    source = write_model(tmp_path / "hf", dataclasses.replace(TINY, adapter=True), **PUBLISHED)
    assert json.loads((source / "config.json").read_text())["model_type"] == "llama"
    import_checkpoint(source, tmp_path / "megatron", options=Options(verify=False))
    opened = open_source(tmp_path / "megatron")
    assert (opened.dmc, opened.config.adapter) == (SETTINGS, True)
    verify(source, tmp_path / "megatron", logits=False)
    (request,) = Engine(Decoder(opened)).generate([[1, 2, 3]], SamplingParams(max_new_tokens=4))
    assert request.finish_reason == "length"
