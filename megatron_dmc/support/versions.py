"""Releases of other packages that this one needs; ``setup.py`` runs this file, ``doctor`` and messages use it."""

from __future__ import annotations

REQUIRED = {
    "jinja2": ">=3.1.6",  # its sandbox has known holes before
    "megatron-core[training]": ">=0.19.2,<0.21",
    "numpy": "",
    "psutil": "",  # megatron-core imports it in its checkpoint writer without declaring it
    "rich": "",
    "safetensors": "",
    "sentencepiece": "",
    "tensorboard": "",
    "torch": ">=2.10",
}
"""Package -> releases that work."""

EXTRAS = {
    "te": {"transformer-engine[pytorch]": ">=2.20"},
    "hf": {"transformers": ">=5.17", "tokenizers": ""},
    "eval": {"lm-eval": ">=0.4.13"},
    "plot": {"matplotlib": ""},
    "data": {"pyarrow": ""},
    "dev": {"pytest": "", "hypothesis": "", "mypy": "", "pytest-timeout": "", "ruff": ""},
}
"""Extra -> its packages; the first shows that the extra is there. ``megatron_dmc.hf`` subclasses transformers' caches,
whose methods change between releases: it is tested with 5.17 and with 5.23."""


def requirements(packages: dict[str, str]) -> list[str]:
    """As pip takes them: ``torch>=2.10``."""
    return [package + releases for package, releases in packages.items()]
