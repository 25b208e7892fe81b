"""A trained network, rewritten for speed: freeze(network, shape) computes the same function with less work.

For networks that are not trained any more, such as an encoder that passes a gradient on to a generator. Batch norms
disappear into the convolutions before them. On the CPU, convolutions run by `conv2d` or as something cheaper still.
"""

import collections
import copy
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .conv2d import _FEW_PLACES, Conv2d, is_usual, use_conv2d


def freeze(network: nn.Module, shape: Sequence[int], dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of `network` for inference and for gradients with respect to its input; its parameters get none.

    network: any that torch.fx can trace. shape: (C, H, W) of the inputs that the copy will get. Freeze it on the device
    and in the dtype of its inputs. It is fastest for inputs in channels_last. dtype: autocast's, if the copy will run
    under autocast alone: its weights are then converted once, and not at every call.

    The copy has the same class and attributes and is in eval mode. Batch norms are folded into the convolutions before
    them, and memory is channels_last. On the CPU the usual convolutions (square, no groups, no dilation) run by
    `conv2d`, and as one matrix product those that meet maps of one size alone, of at most four pixels (1x1 kernels: of
    one). Results differ by rounding only.

    Raises torch.fx.proxy.TraceError if the network cannot be traced. The copy raises ValueError for inputs of another
    size where a matrix product stands for a convolution.
    """
    # eval: batch norms are then fixed scales and shifts, which a convolution can take over.
    frozen = copy.deepcopy(network).eval().requires_grad_(False)
    for layer in frozen.modules():
        if type(layer) is Conv2d:  # PyTorch's own again, which is what folding and fx know
            layer.__class__ = nn.Conv2d
    _fold_batch_norms(frozen)
    reference = next(frozen.parameters(), torch.empty(0))  # tells device and dtype
    if reference.device.type == "cpu":
        # After folding, which gives convolutions their biases.
        for name, shapes in _input_shapes(frozen, reference.new_zeros(1, *shape)).items():
            conv = frozen.get_submodule(name)
            if _is_small(conv, shapes):
                frozen.set_submodule(name, _MapLinear(conv, *shapes))
        use_conv2d(frozen)
    for layer in frozen.modules() if dtype else ():
        # Batch norms that were not folded away stay in fp32, as autocast leaves them.
        norm = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        if isinstance(getattr(layer, "weight", None), torch.Tensor) and not norm:
            layer.to(dtype)
    return frozen.to(memory_format=torch.channels_last)  # 3x3 and 7x7 then give conv2d.cpp's format from NCHW too


def _fold_batch_norms(network: nn.Module) -> None:
    """Replace each batch norm that alone reads a convolution's result: scale and shift go into the convolution."""
    nodes = fx.Tracer().trace(network).nodes  # symbolic_trace's GraphModule would keep the unfolded weights alive
    calls = collections.Counter(node.target for node in nodes if node.op == "call_module")
    modules = dict(network.named_modules())
    for node in nodes:
        norm = modules.get(node.target) if node.op == "call_module" else None
        # Without running statistics it uses each batch's own, in eval mode too.
        if type(norm) is not nn.BatchNorm2d or not norm.track_running_stats:
            continue
        before = node.args[0]
        conv = modules.get(before.target) if before.op == "call_module" else None
        # A convolution that others read too, or that serves in two places, must keep its own result.
        if type(conv) is nn.Conv2d and len(before.users) == 1 and calls[before.target] == calls[node.target] == 1:
            network.set_submodule(before.target, fuse_conv_bn_eval(conv, norm))
            # Not removed: the network's own forward() still calls it.
            network.set_submodule(node.target, nn.Identity())


def _input_shapes(network: nn.Module, x: torch.Tensor) -> dict[str, set[torch.Size]]:
    """The (C, H, W) that each usual convolution of the network meets when it sees x, by the convolution's name."""
    shapes: dict[str, set[torch.Size]] = {}
    hooks = []
    for name, layer in network.named_modules():
        if type(layer) is nn.Conv2d and is_usual(layer):
            # A set: a layer that is used twice may meet maps of two sizes.
            note = shapes.setdefault(name, set()).add
            hooks.append(layer.register_forward_pre_hook(lambda _, inputs, note=note: note(inputs[0].shape[1:])))
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return shapes


def _is_small(conv: nn.Conv2d, shapes: set[torch.Size]) -> bool:
    """Whether a convolution that meets inputs of these shapes is fastest as one matrix product, which fits one size."""
    places = [H * W for _, H, W in shapes]
    # A pixel costs the matrix H W products, the convolution k k, though on 2x2 maps most taps of a 3x3 kernel meet
    # nothing but padding.
    return len(places) == 1 and places[0] <= min(_FEW_PLACES, conv.kernel_size[0] ** 2)


class _MapLinear(nn.Module):
    """A convolution of maps of one size as the matrix [out places, in places] that it is. Nothing trains it."""

    def __init__(self, conv: nn.Conv2d, shape: torch.Size):
        super().__init__()
        C, H, W = self.shape = shape
        k, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        rows, columns = ((side + 2 * padding - k) // stride + 1 for side in (H, W))
        self.out_shape = rows, columns, conv.out_channels
        # Pairs of places that no tap connects stay 0.
        matrix = conv.weight.new_zeros(*self.out_shape, H, W, C)
        for row, column, i, j in itertools.product(range(rows), range(columns), range(H), range(W)):
            down, right = i - stride * row + padding, j - stride * column + padding  # the tap that this place meets
            if 0 <= down < k and 0 <= right < k:
                matrix[row, column, :, i, j] = conv.weight[:, :, down, right]
        self.register_buffer("weight", matrix.view(rows * columns * conv.out_channels, -1))
        bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
        self.register_buffer("bias", bias.repeat(rows * columns))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(f"the network was frozen for another size: a layer got {[*x.shape]}, not {[*self.shape]}")
        # In the order in which channels_last lies in memory: nothing is copied.
        y = F.linear(x.permute(0, 2, 3, 1).flatten(1), self.weight, self.bias)
        return y.view(-1, *self.out_shape).permute(0, 3, 1, 2)
