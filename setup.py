"""Packaging of megatron_dmc: the plugin (``megatron_dmc``) and the checkpoint converters (``checkpoints_convert``)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_dmc/__init__.py").read_text(), re.MULTILINE).group(1)

setup(
    name="megatron_dmc",
    version=VERSION,
    description="Dynamic Memory Compression for Megatron-LM: retrofit Llama with a compressed key-value cache",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_dmc", "megatron_dmc.*", "checkpoints_convert", "checkpoints_convert.*"]),
    install_requires=[
        "megatron-core[training] >= 0.19.2, < 0.21",
        "numpy",
        "psutil",  # megatron-core imports it in its checkpoint writer without declaring it
        "rich",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "torch >= 2.10",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch] >= 2.20"],
        "hf": ["tokenizers", "transformers >= 5.3"],
        "eval": ["lm-eval >= 0.4.13"],
        "plot": ["matplotlib"],
        "data": ["pyarrow"],
        "dev": ["hypothesis", "mypy", "pytest", "pytest-timeout", "ruff"],
    },
    entry_points={"console_scripts": ["megatron-dmc = megatron_dmc.cli:main"]},
)
