"""Fused ops of the InfoSCC-GAN networks: copy this folder into any project that has PyTorch.

from ops import bias_lrelu, subspace_lrelu
"""

from .bias_lrelu import bias_lrelu
from .subspace_lrelu import subspace_lrelu

__all__ = ["bias_lrelu", "subspace_lrelu"]
