"""Dynamic Memory Compression for Megatron-LM: learned compression of the key-value cache."""

from megatron_dmc.config import DMCConfig

__version__ = "0.1.0"
__all__ = ["DMCConfig", "__version__"]
