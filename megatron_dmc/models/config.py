"""The shape of a Llama model: what conversion, inference and Megatron's arguments agree on.

``config.json`` goes through the strict parser here and nothing else: a setting that would change the computation
and is not supported, or is unknown, is an error that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dmc.config import DMCConfig

DTYPES = ("float32", "bfloat16", "float16")
ROPE_TYPES = ("linear", "llama3")
DMC_MODEL_TYPE = "dmc_llama"
MODEL_TYPES = ("llama", "mistral", DMC_MODEL_TYPE)
CONFIG_BYTES_LIMIT = 1 << 20

# Far above every known model; a hostile file must not make us reserve memory for its numbers.
SIZE_LIMITS = {
    "hidden_size": 1 << 17,
    "num_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "ffn_hidden_size": 1 << 20,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretraining length.

    ``rope_type`` is ``linear`` (positions divided by ``factor``) or ``llama3`` (all five numbers count).
    Raises ``ValueError`` on another type or a number that is not positive.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        _require(self.rope_type in ROPE_TYPES, "rope_type", self.rope_type, f"one of default, {', '.join(ROPE_TYPES)}")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"rope scaling {name}", value, "a positive number")
        _require(
            self.high_freq_factor > self.low_freq_factor,
            "rope scaling high_freq_factor",
            self.high_freq_factor,
            f"above low_freq_factor={self.low_freq_factor}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the computation of a Llama model, and its stored dtype.

    Raises ``ValueError`` on sizes out of bounds or heads that do not divide into groups.
    """

    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, limit in SIZE_LIMITS.items():
            _require(0 < getattr(self, name) <= limit, name, getattr(self, name), f"in 1..{limit}")
        _require(
            self.num_attention_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_attention_heads={self.num_attention_heads}",
        )
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even (rotary embeddings turn pairs of channels)")
        _require(
            math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0, "rms_norm_eps", self.rms_norm_eps, "positive"
        )
        _require(math.isfinite(self.rope_theta) and self.rope_theta > 1, "rope_theta", self.rope_theta, "above 1")
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that share one KV head."""
        return self.num_attention_heads // self.num_kv_heads


def parse_hf_config(source: Mapping[str, Any] | str | Path) -> tuple[ModelConfig, DMCConfig | None]:
    """Read ``config.json`` as transformers 4 and 5 write it for Llama and Llama-shaped models.

    Args:
        source: the parsed mapping, the path of a ``config.json``, or of a directory that holds one.

    Returns:
        The shape of the model, and its DMC settings if it is a ``dmc_llama``.

    Raises:
        ValueError: not JSON; a required setting is missing; a setting is unknown, or would change the computation
            in a way that is not supported. The message names it.
    """
    given = dict(source) if isinstance(source, Mapping) else read_config_json(Path(source))
    model_type = given.get("model_type")
    _require(model_type in MODEL_TYPES, "config.json: model_type", model_type, f"one of {', '.join(MODEL_TYPES)}")
    if model_type == "mistral":
        # transformers fills in values of Mistral 7B v0.1 when these are absent.
        for name in ("num_key_value_heads", "sliding_window"):
            if name not in given:
                raise ValueError(f"config.json: {name} is missing; a mistral model must state it")
    _check_fixed_settings(given)
    _check_known(given)
    heads = _number(given, "num_attention_heads", int)
    hidden_size = _number(given, "hidden_size", int)
    theta, scaling = _parse_rope(given)
    config = ModelConfig(
        hidden_size=hidden_size,
        num_layers=_number(given, "num_hidden_layers", int),
        num_attention_heads=heads,
        num_kv_heads=_number(given, "num_key_value_heads", int, heads),
        head_dim=_number(given, "head_dim", int, hidden_size // max(heads, 1)),
        ffn_hidden_size=_number(given, "intermediate_size", int),
        vocab_size=_number(given, "vocab_size", int),
        max_position_embeddings=_number(given, "max_position_embeddings", int, 2048),
        rms_norm_eps=_number(given, "rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=_flag(given, "tie_word_embeddings"),
        dtype=_parse_dtype(given),
    )
    return config, _parse_dmc(given)


def to_hf_config(
    config: ModelConfig,
    dmc: DMCConfig | None = None,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """``config.json`` of a model, readable by transformers 4 and 5; the inverse of :func:`parse_hf_config`.

    ``dmc`` given: the model type is ``dmc_llama`` and the file carries every DMC setting and the schema version.
    """
    written: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if dmc is None else "DMCLlamaForCausalLM"],
        "model_type": "llama" if dmc is None else DMC_MODEL_TYPE,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling_json(config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.dtype,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    if dmc is not None:
        written["dmc"] = dmc.to_dict()
    return written


def read_config_json(path: Path) -> dict[str, Any]:
    """The mapping in ``path`` (a file, or a directory with ``config.json``), at most 1 MiB of it."""
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} is missing: give a directory that transformers' save_pretrained wrote")
    with open(path, "rb") as stream:
        text = stream.read(CONFIG_BYTES_LIMIT + 1)
    if len(text) > CONFIG_BYTES_LIMIT:
        raise ValueError(f"{path} is larger than {CONFIG_BYTES_LIMIT} bytes: not a model configuration")
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds a {type(given).__name__}: a JSON object is expected")
    return given


# Settings that must have one value (or be absent), because another would change the computation.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "partial_rotary_factor": (1, 1.0),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "auto_map": (None, {}),
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
}
# Settings that are read below, and settings that say nothing about the computation of the next-token logits.
_READ = """
    model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    vocab_size max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings
    torch_dtype dtype dmc layer_types
"""
_WITHOUT_EFFECT = """
    architectures transformers_version _name_or_path name_or_path _attn_implementation_autoset _commit_hash
    initializer_range use_cache bos_token_id eos_token_id pad_token_id pretraining_tp return_dict output_attentions
    output_hidden_states chunk_size_feed_forward id2label label2id problem_type torchscript use_bfloat16
    tf_legacy_loss max_sequence_length max_length min_length do_sample temperature top_k top_p
"""
_KNOWN = _FIXED.keys() | set(_READ.split()) | set(_WITHOUT_EFFECT.split())


def _check_fixed_settings(given: Mapping[str, Any]) -> None:
    for name, allowed in _FIXED.items():
        if name in given and not any(type(given[name]) is type(value) and given[name] == value for value in allowed):
            raise ValueError(
                f"config.json: {name}={given[name]!r} is not supported (only {allowed[0]!r}): it changes what the "
                "model computes; use a checkpoint without it"
            )
    layer_types = given.get("layer_types")
    if layer_types is not None and set(layer_types) != {"full_attention"}:
        raise ValueError(f"config.json: layer_types={layer_types!r}: every layer must be full_attention")


def _check_known(given: Mapping[str, Any]) -> None:
    unknown = sorted(given.keys() - _KNOWN)
    if unknown:
        raise ValueError(
            f"config.json: unknown settings {', '.join(unknown)}: they may change what the model computes; "
            "remove them from config.json if they do not"
        )


def _parse_rope(given: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from ``rope_theta`` and ``rope_scaling`` (transformers 4) or ``rope_parameters`` (5)."""
    parameters, scaling = given.get("rope_parameters"), given.get("rope_scaling")
    if parameters is not None and scaling is not None and dict(parameters, rope_theta=0) != dict(scaling, rope_theta=0):
        raise ValueError(f"config.json: rope_parameters={parameters!r} contradicts rope_scaling={scaling!r}")
    rope = parameters if parameters is not None else scaling
    if rope is not None and not isinstance(rope, Mapping):
        raise ValueError(f"config.json: rope_parameters or rope_scaling is {rope!r}: an object or null is expected")
    rope = dict(rope or {})
    thetas = [_number(part, "rope_theta", float) for part in (given, rope) if part.get("rope_theta") is not None]
    if len(set(thetas)) > 1:
        raise ValueError(f"config.json: rope_theta is {thetas[0]} and {thetas[1]} in one file: they must be equal")
    theta = thetas[0] if thetas else 10000.0
    rope.pop("rope_theta", None)
    _require(rope.pop("partial_rotary_factor", 1.0) == 1.0, "config.json: partial_rotary_factor", rope, "1")
    kinds = {rope.pop(name) for name in ("rope_type", "type") if name in rope}
    _require(len(kinds) <= 1, "config.json: rope type", sorted(map(str, kinds)), "one type")
    kind = kinds.pop() if kinds else "default"
    if kind == "default":
        _require(not rope, "config.json: rope parameters", rope, "empty for rope_type default")
        return theta, None
    _require(kind in ROPE_TYPES, "config.json: rope type", kind, f"one of default, {', '.join(ROPE_TYPES)}")
    needed: dict[str, type] = {"factor": float}
    if kind == "llama3":
        needed |= {"low_freq_factor": float, "high_freq_factor": float, "original_max_position_embeddings": int}
    unknown = sorted(rope.keys() - needed.keys() - {"original_max_position_embeddings"})
    _require(not unknown, "config.json: rope parameters", unknown, f"among {sorted(needed)} for {kind}")
    return theta, RopeScaling(kind, **{name: _number(rope, name, kind_of) for name, kind_of in needed.items()})


def _rope_scaling_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    written: dict[str, Any] = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling.rope_type == "llama3":
        written |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return written


def _parse_dtype(given: Mapping[str, Any]) -> str:
    stated = {str(given[name]).removeprefix("torch.") for name in ("dtype", "torch_dtype") if given.get(name)}
    _require(len(stated) <= 1, "config.json: dtype and torch_dtype", sorted(stated), "equal")
    return stated.pop() if stated else "float32"


def _parse_dmc(given: Mapping[str, Any]) -> DMCConfig | None:
    is_dmc = given["model_type"] == DMC_MODEL_TYPE
    if is_dmc != isinstance(given.get("dmc"), Mapping):
        raise ValueError(
            f"config.json: model_type={given['model_type']!r} with dmc={given.get('dmc')!r}: a {DMC_MODEL_TYPE} has an "
            "object 'dmc' with its settings, any other model has none"
        )
    return DMCConfig.from_dict(given["dmc"]) if is_dmc else None


def _number(given: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """``given[name]`` as ``kind`` (int or float); a null counts as absent."""
    value = given.get(name)
    if value is None:
        if default is None:
            raise ValueError(f"config.json: {name} is missing")
        return default
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ValueError(f"config.json: {name}={value!r} must be of type {kind.__name__}")
    return kind(value)


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    _require(isinstance(value, bool), f"config.json: {name}", value, "true or false")
    return value


def _require(holds: bool, name: str, given: Any, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}={given!r}: must be {allowed}")
