"""A random model as a Hugging Face directory, with a tokenizer trained on its own little text."""

import json
from pathlib import Path

from safetensors.torch import save_file

from megatron_dmc.config import DMCConfig
from megatron_dmc.data.sentencepiece_training import train_tokenizer
from megatron_dmc.models.hugging_face import to_hf_config
from tests.inference.tiny_model import RandomSource, tiny_llama

VOCAB_SIZE = 300
TEXT = "".join(f"def step_{n}(x):\n    return x * {n} + {n * n}\n" for n in range(120))


def write_model(directory: Path, settings: DMCConfig | None = None, **changes) -> RandomSource:
    """Write ``config.json``, weights and tokenizer; returns the model that was written."""
    source = RandomSource(tiny_llama(vocab_size=VOCAB_SIZE, **changes), settings)
    directory.mkdir(parents=True)
    config = to_hf_config(source.config, settings, bos_token_id=1, eos_token_id=2)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(source.tensors, directory / "model.safetensors", metadata={"format": "pt"})
    train_tokenizer([TEXT], VOCAB_SIZE, directory)
    return source
