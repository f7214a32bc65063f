"""Kimi Delta Attention, forward: CUDA kernels for Hopper, a PyTorch path for CPU, an fp64 reference."""

from flash_kda._reference import reference
from flash_kda.interface import fwd

__version__ = "0.1.0"
__all__ = ["fwd", "reference", "__version__"]
