"""What the server of ranks imports once: torch and Megatron, redirected to the CPU, and everything that trains."""

import importlib
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

from megatron_dmc.seam import host, megatron_compat

MODULES = (
    "megatron.training",
    "megatron.core.dist_checkpointing.gpt_checkpoint_interop",
    "megatron.core.models.mimo",
    "megatron.core.tokenizers.text.libraries",
    "megatron_dmc.checkpoint",
    "megatron_dmc.data.manifest",
    "megatron_dmc.training.data_sets",
    "megatron_dmc.training.forward_step",
    "megatron_dmc.training.metrics",
    "megatron_dmc.training.model_config",
    "megatron_dmc.training.pretrain",
    "tests.layouts.probe",
)
"""Loaded by Megatron and by us in the course of a run; here they are loaded before ranks are forked."""

torch.set_num_threads(1)
host.use_cpu()
megatron_compat.adapt_engine(cpu=True)
for module in MODULES:
    importlib.import_module(module)
