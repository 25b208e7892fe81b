"""Fused ops of the InfoSCC-GAN networks: copy this folder into any project that has PyTorch.

from ops import bias_lrelu, conv2d, conv_transpose2d, subspace_lrelu
"""

from .bias_lrelu import bias_lrelu
from .conv2d import conv2d, conv_transpose2d, no_weight_gradients
from .subspace_lrelu import subspace_lrelu

__all__ = ["bias_lrelu", "conv2d", "conv_transpose2d", "no_weight_gradients", "subspace_lrelu"]
