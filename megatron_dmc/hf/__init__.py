"""Exported models in transformers: importing this package registers ``dmc_llama``, ``dmc_qwen2`` and ``dmc_qwen3``.

>>> import megatron_dmc.hf
>>> model = transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY)

The one package of ours whose import changes something elsewhere. Raises ``ImportError`` where transformers is missing
or too old.
"""

from megatron_dmc.support.versions import EXTRAS

try:
    from packaging.specifiers import SpecifierSet
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers import __version__ as found

    from megatron_dmc.hf.cache_dmc_llama import DMCCache
    from megatron_dmc.hf.configuration_dmc_llama import DMCLlamaConfig, DMCQwen2Config, DMCQwen3Config
    from megatron_dmc.hf.families import (
        DMCLlamaForCausalLM,
        DMCLlamaModel,
        DMCQwen2ForCausalLM,
        DMCQwen2Model,
        DMCQwen3ForCausalLM,
        DMCQwen3Model,
    )
except ImportError as error:
    raise ImportError(f"megatron_dmc.hf needs transformers ({error}): pip install 'megatron_dmc[hf]'") from error

_needed = EXTRAS["hf"]["transformers"]
if found not in SpecifierSet(_needed, prereleases=True):
    raise ImportError(f"transformers {found} is no release {_needed}: pip install 'megatron_dmc[hf]'")

for _model in (DMCLlamaForCausalLM, DMCQwen2ForCausalLM, DMCQwen3ForCausalLM):
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)

__all__ = [
    "DMCCache",
    "DMCLlamaConfig",
    "DMCLlamaForCausalLM",
    "DMCLlamaModel",
    "DMCQwen2Config",
    "DMCQwen2ForCausalLM",
    "DMCQwen2Model",
    "DMCQwen3Config",
    "DMCQwen3ForCausalLM",
    "DMCQwen3Model",
]
