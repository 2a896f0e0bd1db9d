"""``config.json`` and the model it describes, read strictly and written.

A setting that would change the computation and is not supported, or is unknown, is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_dmc.config import DMCConfig, has_adapter
from megatron_dmc.models.config import ModelConfig, require
from megatron_dmc.models.families import DMC_PREFIX, Family, family_of
from megatron_dmc.models.hugging_face_settings import check_settings
from megatron_dmc.models.published_dms import plain_settings, published_settings
from megatron_dmc.ops.rope_scaling import ROPE_TYPES, RopeScaling

CONFIG_BYTES_LIMIT = 1 << 20


def parse_hf_config(
    source: Mapping[str, Any] | str | Path, ignored_settings: Collection[str] = ()
) -> tuple[ModelConfig, DMCConfig | None]:
    """Read ``config.json`` as transformers 4 and 5 write it for the families that are known, or the code of DMS.

    Args:
        source: the parsed mapping, the path of a ``config.json``, or of a directory that holds one.
        ignored_settings: unknown settings that change nothing, as the user says.

    Returns:
        The model, and its DMC settings if it is a compressed one.

    Raises:
        ValueError: not JSON; a required setting is missing; a setting is unknown, or would change the computation
            in a way that is not supported. The message names it.
    """
    given = dict(source) if isinstance(source, Mapping) else read_config_json(Path(source))
    published = published_settings(given)
    given = plain_settings(given)
    family = parse_family(given)
    check_settings(given, family, ignored_settings)
    heads = _number(given, "num_attention_heads", int)
    hidden_size = _number(given, "hidden_size", int)
    theta, scaling = _parse_rope(given)
    dmc = _parse_dmc(given) or published
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
        family=family.name,
        qk_norm=family.qk_norm,
        adapter=has_adapter(dmc),
    )
    return config, dmc


def to_hf_config(
    config: ModelConfig,
    dmc: DMCConfig | None = None,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """``config.json`` of a model, readable by transformers 4 and 5; the inverse of :func:`parse_hf_config`.

    ``dmc`` given: the model type begins with ``dmc_`` and the file carries every DMC setting and the schema version.
    """
    family = family_of(config.family)
    written: dict[str, Any] = {
        "architectures": [family.architecture if dmc is None else family.dmc_architecture],
        "model_type": family.model_type if dmc is None else family.dmc_model_type,
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
        **{name: allowed[0] for name, allowed in family.fixed.items()},
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


def parse_family(given: Mapping[str, Any]) -> Family:
    """The family that ``config.json`` names. Raises ``ValueError`` where it is unknown, or lacks what it must state."""
    model_type = given.get("model_type")
    try:
        family = family_of(model_type)
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from error
    for name in family.stated:
        if name not in given:
            # transformers fills in values of that family's first model.
            raise ValueError(f"config.json: {name} is missing; a {model_type} model must state it")
    return family


def _parse_rope(given: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from ``rope_theta`` and ``rope_scaling`` (transformers 4) or ``rope_parameters`` (5)."""
    parameters, scaling = given.get("rope_parameters"), given.get("rope_scaling")
    if parameters is not None and scaling is not None and dict(parameters, rope_theta=0) != dict(scaling, rope_theta=0):
        raise ValueError(f"config.json: rope_parameters={parameters!r} contradicts rope_scaling={scaling!r}")
    rope = parameters if parameters is not None else scaling
    if rope is not None and not isinstance(rope, Mapping):
        raise ValueError(f"config.json: rope_parameters or rope_scaling is {rope!r}: an object or null is expected")
    rope = {name: value for name, value in (rope or {}).items() if value is not None}
    thetas = [_number(part, "rope_theta", float) for part in (given, rope) if part.get("rope_theta") is not None]
    if len(set(thetas)) > 1:
        raise ValueError(f"config.json: rope_theta is {thetas[0]} and {thetas[1]} in one file: they must be equal")
    theta = thetas[0] if thetas else 10000.0
    rope.pop("rope_theta", None)
    require(rope.pop("partial_rotary_factor", 1.0) == 1.0, "config.json: partial_rotary_factor", rope, "1")
    kinds = {rope.pop(name) for name in ("rope_type", "type") if name in rope}
    require(len(kinds) <= 1, "config.json: rope type", sorted(map(str, kinds)), "one type")
    kind = kinds.pop() if kinds else "default"
    if kind == "default":
        require(not rope, "config.json: rope parameters", rope, "empty for rope_type default")
        return theta, None
    require(kind in ROPE_TYPES, "config.json: rope type", kind, f"one of default, {', '.join(ROPE_TYPES)}")
    needed: dict[str, type] = {"factor": float}
    if kind == "llama3":
        needed |= {"low_freq_factor": float, "high_freq_factor": float, "original_max_position_embeddings": int}
    unknown = sorted(rope.keys() - needed.keys() - {"original_max_position_embeddings"})
    require(not unknown, "config.json: rope parameters", unknown, f"among {sorted(needed)} for {kind}")
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
    require(len(stated) <= 1, "config.json: dtype and torch_dtype", sorted(stated), "equal")
    return stated.pop() if stated else "float32"


def _parse_dmc(given: Mapping[str, Any]) -> DMCConfig | None:
    is_dmc = given["model_type"].startswith(DMC_PREFIX)
    if is_dmc != isinstance(given.get("dmc"), Mapping):
        raise ValueError(
            f"config.json: model_type={given['model_type']!r} with dmc={given.get('dmc')!r}: a model type that begins "
            f"with {DMC_PREFIX} has an object 'dmc' with its settings, any other has none"
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
    require(isinstance(value, bool), f"config.json: {name}", value, "true or false")
    return value
