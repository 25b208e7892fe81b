"""Fused ops of the InfoSCC-GAN networks. Copy this folder into any project that has PyTorch.

from ops import Graphs, bias_lrelu, conv2d, conv_transpose2d, freeze, subspace_lrelu, tsne_forces, tsne_neighbourhoods
"""

from .bias_lrelu import bias_lrelu
from .conv2d import Conv2d, conv2d, conv_transpose2d, no_weight_gradients, use_conv2d
from .freeze import freeze
from .graphs import CaptureError, Graphs
from .subspace_lrelu import subspace_lrelu
from .tsne import tsne_forces, tsne_neighbourhoods

__all__ = [
    "CaptureError",
    "Conv2d",
    "Graphs",
    "bias_lrelu",
    "conv2d",
    "conv_transpose2d",
    "freeze",
    "no_weight_gradients",
    "subspace_lrelu",
    "tsne_forces",
    "tsne_neighbourhoods",
    "use_conv2d",
]
