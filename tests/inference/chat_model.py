"""A random model with a tokenizer of chat tokens and a template, as a Hugging Face directory."""

from pathlib import Path

from safetensors.torch import save_file

from megatron_dmc.config import DMCConfig
from megatron_dmc.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dmc.models.hugging_face import to_hf_config
from tests.data.tokenizer.directories import sentencepiece_directory, write
from tests.inference.tiny_model import RandomSource, tiny_llama

TEMPLATE = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def write_chat_model(folder: Path, settings: DMCConfig | None = None, template: str | None = TEMPLATE) -> Tokenizer:
    """Write everything into an existing folder; returns the tokenizer."""
    sentencepiece_directory(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(folder)
    source = RandomSource(tiny_llama(vocab_size=tokenizer.vocab_size, max_position_embeddings=512), settings)
    save_file(source.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write(folder / "config.json", to_hf_config(source.config, settings))
    return tokenizer
