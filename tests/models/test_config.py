"""The strict parser of ``config.json``: what transformers writes is read, what changes the computation is refused."""

import json

import pytest

from megatron_dmc.config import DMCConfig
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.hugging_face import parse_hf_config, to_hf_config
from megatron_dmc.ops.rope_scaling import RopeScaling

LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def test_llama2_as_published():
    llama, dmc = parse_hf_config(LLAMA2_7B)
    assert dmc is None
    assert (llama.num_layers, llama.head_dim, llama.rope_theta, llama.dtype) == (32, 128, 10000.0, "float16")


def test_both_spellings_of_rope_and_dtype_mean_the_same():
    old = {**LLAMA2_7B, "rope_theta": 500000.0, "rope_scaling": LLAMA31_ROPE}
    new = {name: value for name, value in LLAMA2_7B.items() if name not in ("rope_scaling", "torch_dtype")}
    new |= {"rope_parameters": {**LLAMA31_ROPE, "rope_theta": 500000.0}, "dtype": "float16"}
    assert parse_hf_config(old) == parse_hf_config(new)
    assert parse_hf_config(new)[0].rope_scaling == RopeScaling("llama3", 8.0)


def test_the_old_name_of_the_rope_type():
    llama, _ = parse_hf_config({**LLAMA2_7B, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert llama.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("sliding_window", 4096),
        ("quantization_config", {"bits": 4}),
        ("auto_map", {"AutoModel": "modeling.Model"}),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("model_type", "qwen2_moe"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0, "beta_fast": 1}),
        ("rope_scaling", "linear"),
        ("logit_scale", 0.5),
        ("partial_rotary_factor", 0.5),
        ("num_key_value_heads", 5),
        ("hidden_size", "4096"),
        ("hidden_size", True),
        ("vocab_size", 1 << 40),
        ("rms_norm_eps", 0),
        ("torch_dtype", "float8_e4m3fn"),
        ("tie_word_embeddings", "no"),
    ],
)
def test_what_changes_the_computation_is_refused_by_name(name, value):
    told = {"rope_scaling": "rope", "num_key_value_heads": "num_kv_heads", "torch_dtype": "dtype"}.get(name, name)
    with pytest.raises(ValueError, match=told):
        parse_hf_config({**LLAMA2_7B, name: value})


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_missing_size_is_named(name):
    with pytest.raises(ValueError, match=f"{name} is missing"):
        parse_hf_config({key: value for key, value in LLAMA2_7B.items() if key != name})


def test_a_mistral_must_state_its_window():
    mistral = {**LLAMA2_7B, "model_type": "mistral", "num_key_value_heads": 8}
    with pytest.raises(ValueError, match="sliding_window"):
        parse_hf_config(mistral)
    assert parse_hf_config({**mistral, "sliding_window": None})[0].num_kv_heads == 8


QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_8B = {
    **QWEN25_7B,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
    "transformers_version": "4.51.0",
    "vocab_size": 151936,
}


def test_qwen_as_published():
    qwen2, qwen3 = parse_hf_config(QWEN25_7B)[0], parse_hf_config(QWEN3_8B)[0]
    assert (qwen2.family, qwen2.head_dim, qwen2.qkv_bias, qwen2.qk_norm) == ("qwen2", 128, True, False)
    assert (qwen3.family, qwen3.head_dim, qwen3.qkv_bias, qwen3.qk_norm) == ("qwen3", 128, False, True)
    # As the models' cards state them.
    assert (round(qwen2.num_parameters / 1e9, 2), round(qwen3.num_parameters / 1e9, 1)) == (7.62, 8.2)


@pytest.mark.parametrize("published", [QWEN25_7B, QWEN3_8B], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
        ("mlp_bias", True),
        ("num_experts", 128),
        ("dual_chunk_attention_config", {"chunk_size": 262144}),
    ],
)
def test_what_changes_a_qwen_is_refused_by_name(published, name, value):
    with pytest.raises(ValueError, match="rope" if name == "rope_scaling" else name):
        parse_hf_config({**published, name: value})


@pytest.mark.parametrize(
    ("published", "refused"), [(QWEN25_7B, False), (QWEN3_8B, True)], ids=["biases always", "biases never"]
)
def test_a_qwen_has_the_biases_of_its_family(published, refused):
    assert parse_hf_config({**published, "attention_bias": not refused}) == parse_hf_config(published)
    with pytest.raises(ValueError, match=f"attention_bias={refused} is not supported"):
        parse_hf_config({**published, "attention_bias": refused})


def test_what_other_programs_call_the_biases_of_qwen2_changes_nothing():
    assert parse_hf_config({**QWEN25_7B, "qkv_bias": True}) == parse_hf_config(QWEN25_7B)
    with pytest.raises(ValueError, match="qkv_bias=True is not supported"):
        parse_hf_config({**QWEN3_8B, "qkv_bias": True})


@pytest.mark.parametrize("name", ["num_key_value_heads", "head_dim", "max_position_embeddings"])
def test_what_transformers_would_fill_in_for_a_qwen_must_be_stated(name):
    with pytest.raises(ValueError, match=f"{name} is missing"):
        parse_hf_config({key: value for key, value in QWEN3_8B.items() if key != name})


def test_contradictions_in_one_file():
    with pytest.raises(ValueError, match="rope_theta"):
        parse_hf_config(
            {**LLAMA2_7B, "rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
        )
    with pytest.raises(ValueError, match="dtype"):
        parse_hf_config({**LLAMA2_7B, "dtype": "bfloat16"})


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a": 1}'])
def test_files_that_are_no_configuration(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json|model_type"):
        parse_hf_config(tmp_path)


def test_what_is_written_is_read_again(tmp_path):
    llama = ModelConfig(48, 3, 6, 3, 16, 96, 301, 512, 1e-6, 5e5, RopeScaling("llama3", 4.0), True, "float32")
    settings = DMCConfig(stage="consolidate", window_size=12)
    for dmc in (None, settings):
        written = to_hf_config(llama, dmc, bos_token_id=1, eos_token_id=[2, 3])
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert parse_hf_config(tmp_path) == (llama, dmc)


def test_dmc_settings_belong_to_the_model_type():
    written = to_hf_config(ModelConfig(64, 2, 4, 2, 16, 96, 300, 64), DMCConfig())
    with pytest.raises(ValueError, match="dmc"):
        parse_hf_config({**written, "model_type": "llama"})
    with pytest.raises(ValueError, match="schema_version"):
        parse_hf_config({**written, "dmc": {**written["dmc"], "schema_version": 99}})


def test_transformers_reads_what_we_write(tmp_path):
    transformers = pytest.importorskip("transformers")
    llama = ModelConfig(64, 2, 4, 2, 32, 96, 301, 16384, 1e-6, 5e5, RopeScaling("llama3", 8.0), True, "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(llama)))
    theirs = transformers.LlamaConfig.from_pretrained(tmp_path)
    assert (theirs.head_dim, theirs.tie_word_embeddings, theirs.rms_norm_eps) == (32, True, 1e-6)
    assert theirs.rope_parameters["rope_type"] == "llama3"
    assert theirs.rope_parameters["rope_theta"] == 5e5
    theirs.save_pretrained(tmp_path / "again")
    assert parse_hf_config(tmp_path / "again") == (llama, None)
