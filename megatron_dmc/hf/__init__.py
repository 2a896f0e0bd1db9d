"""Exported models in transformers: importing this package registers ``dmc_llama`` with its Auto classes.

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
    from megatron_dmc.hf.configuration_dmc_llama import DMCLlamaConfig
    from megatron_dmc.hf.modeling_dmc_llama import DMCLlamaForCausalLM, DMCLlamaModel
except ImportError as error:
    raise ImportError(f"megatron_dmc.hf needs transformers ({error}): pip install 'megatron_dmc[hf]'") from error

_needed = EXTRAS["hf"]["transformers"]
if found not in SpecifierSet(_needed, prereleases=True):
    raise ImportError(f"transformers {found} is no release {_needed}: pip install 'megatron_dmc[hf]'")

AutoConfig.register(DMCLlamaConfig.model_type, DMCLlamaConfig)
AutoModelForCausalLM.register(DMCLlamaConfig, DMCLlamaForCausalLM)

__all__ = ["DMCCache", "DMCLlamaConfig", "DMCLlamaForCausalLM", "DMCLlamaModel"]
