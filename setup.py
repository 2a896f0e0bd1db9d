"""Packaging of megatron_dmc: the plugin (``megatron_dmc``) and the checkpoint converters (``checkpoints_convert``)."""

import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_dmc/__init__.py").read_text(), re.MULTILINE).group(1)
VERSIONS = runpy.run_path(str(ROOT / "megatron_dmc/support/versions.py"))

setup(
    name="megatron_dmc",
    version=VERSION,
    description="Dynamic Memory Compression for Megatron-LM: retrofit Llama with a compressed key-value cache",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_dmc", "megatron_dmc.*", "checkpoints_convert", "checkpoints_convert.*"]),
    package_data={"megatron_dmc.evaluation.harness": ["tasks/*.yaml"]},
    install_requires=VERSIONS["requirements"](VERSIONS["REQUIRED"]),
    extras_require={extra: VERSIONS["requirements"](packages) for extra, packages in VERSIONS["EXTRAS"].items()},
    entry_points={"console_scripts": ["megatron-dmc = megatron_dmc.cli:main"]},
)
