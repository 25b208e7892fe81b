"""2-D convolution and its transpose: Winograd's method on the CPU, and gradients that R1 can differentiate fast.

conv2d and conv_transpose2d replace F.conv2d and F.conv_transpose2d for square kernels. On the CPU, conv2d.cpp computes
the shapes that it serves, with a quarter to a half of the multiplications for kernels of 3x3 and 4x4. In bf16 on CPUs
few pixels of many channels are matrix products. PyTorch computes all other shapes and all other devices.

PyTorch's own double backward of a convolution is slow: it takes the batch for channels and whole maps for kernels. Here
the gradient with respect to the input is again one of the two ops, so every order of derivative is a convolution of a
usual shape.
"""

import contextlib
import ctypes
import functools
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from .build import c_function, choose

_DTYPES = (torch.float32, torch.float64)  # what conv2d.cpp is compiled for
# What impl='auto' takes C++ for. float64 is for checks: there a sum of zeros should be 0, as PyTorch's is, and not
# Winograd's 1e-17, because a leaky ReLU would tell the two apart.
_FAST = (torch.float32,)

# The kernel sizes that conv2d.cpp serves, by stride. At stride 2 it cuts a kernel of k pixels into 2x2 phases of k / 2.
_KERNELS = {1: (1, 3, 4), 2: (1, 3, 4, 7, 8)}
_VECTOR = 16  # channels must fill vectors: 16 float32 in 64 bytes
_MOST_CHANNELS = 2048  # conv2d.cpp's kMost
# Where 'auto' takes C++: settings, not sharp limits. Forward and backward on one AVX-512 core, 3x3 kernels break even
# at about 4 tiles, and where they save a third of the multiplications. For 1x1 C++ is within an eighth of PyTorch.
_LEAST_TILES, _TILE_COST = 16, 1.25
_MOST_PIXELS = 4096  # for 1x1 kernels
_FEW_PLACES = 4  # up to so many pixels of a map, a matrix product for each is faster
# When matrix products replace PyTorch's convolutions in bf16: up to so many pixels for each channel of the smaller map.
# On AMX, weight gradients of 256 to 256 channels took a fifth of the time with 2, and 0.9 with 8. The others gain where
# the weights outgrow the cache: 512 to 512 channels took 0.3 with 0.6, and 0.4 to 0.6 with 4.
_PIXELS_GRADIENT, _PIXELS_OTHERS, _LARGE = 8, 4, 2**20


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: int = 1, padding: int = 0,
    impl: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """F.conv2d(x, weight, bias, stride, padding).

    x: [B, C, H, W], weight: [N, C, k, k], bias: [N] or None, all of one floating dtype. Under autocast they are cast
    as F.conv2d casts them. impl: 'auto' (C++ on the CPU where it is faster, else PyTorch), 'cpp', or 'ref', which is
    F.conv2d itself, with PyTorch's own derivatives.

    Returns [B, N, (H + 2 padding - k) // stride + 1, (W + 2 padding - k) // stride + 1]. Differentiable to any order.
    The same input on the same number of threads gives the same bits. On CUDA, 'auto' has our derivatives within
    `no_weight_gradients` only.

    C++ serves float32 on the CPU (also float64 if impl='cpp'), channels_last, with C and N in multiples of 16, kernels
    of 1, 3 and 4 pixels at stride 1 and of 1, 3, 4, 7 and 8 at stride 2; also 7x7 to the 3 channels of an image at
    stride 1, padding 3 and even sides. In float32 its largest error is about ten times that of a usual convolution:
    1e-5 to 1e-4 of the result's standard deviation.

    Raises RuntimeError with the reason if 'cpp' cannot run, ValueError for an unknown impl.
    """
    x, weight, bias = _autocast(x, weight, bias)
    impl = _choose(impl, x.device.type)
    # torch.compile cannot trace calls into C++.
    if impl == "ref" or torch.compiler.is_compiling() or not _fit(x, weight, bias, weight.shape[1::-1]):
        return F.conv2d(x, weight, bias, stride, padding)
    out = _out(x, weight, stride, padding)
    if impl == "cpp":
        _check_cpp(x, weight, out, stride, padding, False)
    # 'cpp' by name is C++ for these very shapes, or an error: only 'auto' takes the detours below.
    if impl == "auto" and _is_from_image(x, weight, stride, padding):
        return _from_image(x, weight, bias)
    if impl == "auto" and _is_small(x, weight, padding, out):
        return _by_places(x, weight, bias, stride, padding, out)
    return _Conv.apply(x, weight, bias, stride, padding, impl)


def conv_transpose2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: int = 1, padding: int = 0,
    output_padding: int = 0, impl: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """F.conv_transpose2d(x, weight, bias, stride, padding, output_padding): as conv2d, with weight [C, N, k, k].

    Returns [B, N, (H - 1) stride - 2 padding + k + output_padding, (W - 1) stride - 2 padding + k + output_padding].
    """
    x, weight, bias = _autocast(x, weight, bias)
    impl = _choose(impl, x.device.type)
    # A transposed convolution's weight has its inputs first, [C, N, k, k].
    if impl == "ref" or torch.compiler.is_compiling() or not _fit(x, weight, bias, weight.shape[:2]):
        return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding)
    out = [(s - 1) * stride - 2 * padding + weight.shape[2] + output_padding for s in x.shape[2:]]
    if impl == "cpp":
        _check_cpp(x, weight, out, stride, padding, True)
    return _ConvTranspose.apply(x, weight, bias, stride, padding, out, impl)


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d by `conv2d`: for square kernels, without groups and dilation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return conv2d(x, self.weight, self.bias, self.stride[0], self.padding[0])


def use_conv2d(network: nn.Module) -> None:
    """Make a network on the CPU run its convolutions by `conv2d` where that can: they become `Conv2d`, in place.

    On other devices nothing changes. Names, weights and results stay, but for rounding. An encoder of ResNet-18 trains
    twice to three and a half times as fast.
    """
    for layer in network.modules():
        # type(), because a subclass may compute something else.
        if type(layer) is nn.Conv2d and layer.weight.device.type == "cpu" and is_usual(layer):
            # Only the method changes: weights, names, hooks and optimisers that know them stay.
            layer.__class__ = Conv2d


def is_usual(conv: nn.Conv2d) -> bool:
    """Whether conv2d can run it."""
    # Padding can also be a word, 'same' or 'valid'.
    same = all(isinstance(pair, tuple) and pair[0] == pair[1] for pair in (conv.kernel_size, conv.stride, conv.padding))
    return same and conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"


@contextlib.contextmanager
def no_weight_gradients():
    """Within it, these ops compute no gradients with respect to weights and biases (impl='ref' does as PyTorch does).

    For R1, whose inner autograd.grad asks for the input's gradient alone: autograd cannot tell a custom op so, and the
    others would be computed and thrown away. Enter it for the forward pass too.
    """
    # Not thread-local: on GPUs autograd runs backward passes in threads of its own.
    global _weight_gradients
    before, _weight_gradients = _weight_gradients, False
    try:
        yield
    finally:
        _weight_gradients = before


_weight_gradients = True  # what `no_weight_gradients` switches


def _fit(x, weight, bias, channels):
    """Whether these go together, with `channels` in and out and a square kernel; PyTorch takes or refuses the rest."""
    fit = x.ndim == weight.ndim == 4 and x.shape[1] == channels[0] and x.device == weight.device
    fit = fit and weight.shape[2] == weight.shape[3]  # the derivatives here are those of square kernels
    return fit and (bias is None or (bias.shape == channels[1:] and bias.dtype == x.dtype and bias.device == x.device))


def _choose(impl, device):
    """'ref' for F.conv2d itself; else the backend within our derivatives: 'cpp', 'auto' (C++ if faster) or 'torch'."""
    if impl not in ("auto", "ref", "cpp"):
        raise ValueError(f"impl must be auto, ref or cpp for a convolution, got {impl!r}")
    if impl == "auto" and device != "cpu":
        # cuDNN has Winograd's method itself. Our derivatives cost Python calls, so only R1 gets them.
        return "ref" if _weight_gradients else "torch"
    if impl == "auto" and choose(impl, device) == "ref":
        return "torch"
    choose(impl, device)  # raises if 'cpp' cannot run
    return impl


def _autocast(*tensors):
    """The tensors as autocast casts a convolution's."""
    # By hand: autocast casts for F.conv2d, but not for an autograd.Function.
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _out(x, weight, stride, padding):
    """Height and width of conv2d's result."""
    return [(s + 2 * padding - weight.shape[2]) // stride + 1 for s in x.shape[2:]]


def _channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives. The two functions are each other's gradient with respect to the input.


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, impl):
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding, impl
        return _forward(x, weight, bias, stride, padding, impl)

    @staticmethod
    def backward(ctx, g):
        return *_backward(ctx, g, False), None, None, None


class _ConvTranspose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, out, impl):
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding, impl
        return _transposed(x, weight, bias, stride, padding, out, impl)

    @staticmethod
    def backward(ctx, g):
        return *_backward(ctx, g, True), None, None, None, None


def _backward(ctx, g, transposed):
    """Gradients with respect to x, weight and bias; None for those that nobody wants."""
    (x, weight), (stride, padding, impl) = ctx.saved_tensors, ctx.options
    want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
    # The C++ needs it; autograd hands over NCHW gradients, for instance from a sum.
    g = g.contiguous(memory_format=torch.channels_last) if _channels_last(x) else g
    dx = dweight = dbias = None
    if want_x and transposed:
        dx = _Conv.apply(g, weight, None, stride, padding, impl)
    elif want_x:
        # Its size is given, because at stride 2 two sizes of x have results of one size.
        dx = _ConvTranspose.apply(g, weight, None, stride, padding, x.shape[2:], impl)
    # want_weight says that the weight requires gradients, not that anybody asks for this one.
    if want_weight and _weight_gradients:
        # The transpose of a convolution is one whose input and output have changed places.
        larger, smaller = (g, x) if transposed else (x, g)
        dweight = _weight_gradient(larger, smaller, weight, stride, padding, impl)
    if want_bias and _weight_gradients:
        dbias = g.sum((0, 2, 3))  # a pass of its own, but short: 0.2 ms for 8 MB on two cores
    return dx, dweight, dbias


# ---------------------------------------------------------------------------------------------------------------------
# What runs.


def _forward(x, weight, bias, stride, padding, impl):
    """conv2d without derivatives."""
    out = _out(x, weight, stride, padding)
    # Before `_geometry`, which refuses 3 channels: they are no multiple of 16.
    if _is_to_image(weight.shape[0], weight.shape[2], stride, padding, out) and impl != "torch":
        return _to_image(x, weight, bias, impl)
    if _is_few(x, weight, out, impl):
        return _multiply_windows(x, weight, bias, stride, padding, out)
    geometry = _geometry(x, weight, out, stride, padding, False, impl)
    if geometry is None:
        return F.conv2d(x, weight, bias, stride, padding)
    return _run(x, weight, bias, weight.shape[0], out, geometry)


def _transposed(x, weight, bias, stride, padding, out, impl):
    """conv_transpose2d without derivatives; `out` is the size of its result."""
    if _is_to_image(weight.shape[1], weight.shape[2], stride, padding, out) and impl != "torch":
        return _to_image(x, _reversed(weight), bias, impl)
    if _is_few(x, weight, x.shape[2:], impl):
        return _add_windows(x, weight, bias, stride, padding, out)
    geometry = _geometry(x, weight, out, stride, padding, True, impl)
    if geometry is None:
        # The output_padding that gives this size.
        rest = [o - (s - 1) * stride + 2 * padding - weight.shape[2] for o, s in zip(out, x.shape[2:], strict=True)]
        return F.conv_transpose2d(x, weight, bias, stride, padding, rest)
    return _run(x, weight, bias, weight.shape[1], out, geometry)


def _weight_gradient(x, g, weight, stride, padding, impl):
    """Gradient of conv2d(x, weight) with respect to weight. Differentiable, by PyTorch, where gradients are enabled."""
    if _is_to_image(weight.shape[0], weight.shape[2], stride, padding, g.shape[2:]) and impl != "torch":
        # As that of a convolution from g to x: PyTorch is then nearly five times as fast.
        N, C, k, _ = weight.shape
        return _reversed(torch.nn.grad.conv2d_weight(g, (C, N, k, k), x, stride, padding))
    if _is_few(x, weight, g.shape[2:], impl, gradient=True):
        windows = _windows(x, weight.shape[2], stride, padding).flatten(0, 2)
        dweight = g.permute(0, 2, 3, 1).flatten(0, 2).T @ windows
        return dweight.unflatten(1, (*weight.shape[2:], -1)).permute(0, 3, 1, 2)  # channels_last
    geometry = None
    # With create_graph it must be differentiable, which the C++ alone is not.
    if not torch.is_grad_enabled() and _channels_last(g):
        geometry = _geometry(x, weight, list(g.shape[2:]), stride, padding, False, impl)
    if geometry is None:
        return torch.nn.grad.conv2d_weight(x, weight.shape, g, stride, padding)
    dweight = torch.empty_like(weight)
    c_function("conv2d_weight_gradient", x.dtype, "pppp")(x.data_ptr(), g.data_ptr(), dweight.data_ptr(), geometry)
    return dweight


def _run(x, weight, bias, channels, out, geometry):
    """Either op, by C++."""
    y = torch.empty(len(x), channels, *out, dtype=x.dtype, memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()  # C++ is told no strides of it
    pointers = x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()
    c_function("conv2d", x.dtype, "ppppp")(*pointers, geometry)
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Few pixels and many channels in bf16, as matrix products. PyTorch's convolutions take a time in proportion to the
# weights there, which they bring into an order of their own, however few the pixels.


def _is_few(x, weight, out, impl, gradient=False):
    """Whether matrix products compute it. out: the smaller map's sides; its channels are the first axis of weight."""
    if impl == "torch" or x.device.type != "cpu" or not (x.dtype == weight.dtype == torch.bfloat16):
        return False
    most = (_PIXELS_GRADIENT if gradient else _PIXELS_OTHERS) * weight.shape[0]
    few = len(x) * out[0] * out[1] <= most and (gradient or weight.numel() >= _LARGE)
    # Empty results are PyTorch's, which refuses some.
    return few and _channels_last(x) and len(x) > 0 and min(out) > 0


def _multiply_windows(x, weight, bias, stride, padding, out):
    """conv2d: every window's pixels by the kernel."""
    y = torch.empty(len(x), len(weight), *out, dtype=x.dtype, memory_format=torch.channels_last)
    windows, matrix = _windows(x, weight.shape[2], stride, padding).flatten(0, 2), _as_matrix(weight).T
    # Written into y: a result that is a view could not be changed in place by a ReLU that follows.
    pixels = y.permute(0, 2, 3, 1).flatten(0, 2)
    if bias is None:
        torch.mm(windows, matrix, out=pixels)
    else:
        torch.addmm(bias, windows, matrix, out=pixels)
    return y


def _windows(x, k, stride, padding):
    """The pixels that conv2d multiplies for each pixel of its result: [B, OH, OW, k * k * C]."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    return x.unfold(1, k, stride).unfold(2, k, stride).permute(0, 1, 2, 4, 5, 3).flatten(3)


def _as_matrix(weight):
    """[N, C, k, k] -> [N, k * k * C], which needs no copy in channels_last."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _add_windows(x, weight, bias, stride, padding, out):
    """conv_transpose2d: what each pixel adds to its window, then the sum of the windows, in float32."""
    k, (H, W) = weight.shape[2], x.shape[2:]
    parts = (x.permute(0, 2, 3, 1) @ _as_matrix(weight)).unflatten(3, (k, k, -1))
    # Room for the padding, and for a last window beyond what output_padding adds.
    sums = x.new_zeros(len(x), *(s + 2 * padding + stride for s in out), parts.shape[-1], dtype=torch.float32)
    for i, j in itertools.product(range(k), repeat=2):
        sums[:, i : i + stride * H : stride, j : j + stride * W : stride] += parts[:, :, :, i, j]
    if bias is not None:
        sums += bias
    sums = sums[:, padding : padding + out[0], padding : padding + out[1]].permute(0, 3, 1, 2)
    return torch.empty(sums.shape, dtype=x.dtype, memory_format=torch.channels_last).copy_(sums)


# ---------------------------------------------------------------------------------------------------------------------
# To images: three output channels would leave most of a vector empty.


def _is_to_image(channels, k, stride, padding, out):
    """Whether `_to_image` computes this convolution: 7x7 to three channels of the same, even sides."""
    return (channels, k, stride, padding) == (3, 7, 1, 3) and out[0] % 2 == out[1] % 2 == 0


def _to_image(x, weight, bias, impl):
    """conv2d(x, weight [3, C, 7, 7], bias, padding=3) of even sides, for 2x2 pixels of the result at once.

    The kernel, shifted to each of the four pixels and padded to 8x8, gives them as 12 channels at stride 2: the same
    sums. Four channels of zeros fill the vector.
    """
    shifted = [F.pad(weight, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)]
    blocks = torch.cat((*shifted, torch.zeros_like(shifted[0])[:1].expand(4, -1, -1, -1)))
    bias = None if bias is None else F.pad(bias.repeat(4), (0, 4))
    y = _forward(x, blocks.contiguous(memory_format=torch.channels_last), bias, 2, 3, impl)
    # 12 channels are 2 x 2 pixels of 3 colours: to their places, without the zeros.
    y = y.permute(0, 2, 3, 1)[..., :12].unflatten(3, (2, 2, 3)).transpose(2, 3)  # [B, H / 2, 2, W / 2, 2, 3]
    return y.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _reversed(weight):
    """The kernel [C, N, k, k] with which conv2d does at stride 1 what conv_transpose2d does with [N, C, k, k]."""
    return weight.flip(2, 3).transpose(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# From images, and of the smallest maps. Both are made of differentiable ops.


def _is_from_image(x, weight, stride, padding):
    """Whether `_from_image` computes this convolution: a ResNet's first, of images with even sides."""
    even = x.shape[2] % 2 == x.shape[3] % 2 == 0
    return even and len(x) > 0 and (*weight.shape[1:], stride, padding) == (3, 7, 7, 2, 3)


def _from_image(x, weight, bias):
    """conv2d(x, weight [N, 3, 7, 7], bias, stride=2, padding=3) of even sides, on blocks of 2x2 pixels.

    The kernel, grown to 8x8, is one of 4x4 blocks at stride 1. Pixels get a fourth channel of zeros, so that blocks
    have 16: that fills vectors and lets Winograd's method in.
    """
    # In front, three pixels of padding and one where the kernel grew; behind, even sides never read the third.
    x, weight = F.pad(x, (4, 2, 4, 2, 0, 1)), F.pad(weight, (1, 0, 1, 0, 0, 1))
    x, weight = (F.pixel_unshuffle(t, 2).contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return conv2d(x, weight, bias)


def _is_small(x, weight, padding, out):
    """Whether `_by_places` computes this convolution: of maps of few pixels, some of which every window covers."""
    return x.shape[2] * x.shape[3] <= _FEW_PLACES and padding < weight.shape[2] and min(out) > 0


def _by_places(x, weight, bias, stride, padding, out):
    """conv2d of small maps: for each place of the result, a matrix product of the pixels that its window covers.

    The rest of the window lies on padding, and others multiply that too: eight of 3x3 taps on a map of one pixel.
    """
    (H, W), k = x.shape[2:], weight.shape[2]
    # Channels last in both: pixels and taps then flatten to vectors in the same order.
    x, weight = x.permute(0, 2, 3, 1), weight.permute(2, 3, 1, 0)
    places = []
    for row, column in itertools.product(*map(range, out)):
        top, left = stride * row - padding, stride * column - padding
        down, right = range(max(0, top), min(H, top + k)), range(max(0, left), min(W, left + k))
        pixels = x[:, down.start : down.stop, right.start : right.stop]
        taps = weight[down.start - top : down.stop - top, right.start - left : right.stop - left]
        places.append(pixels.flatten(1) @ taps.flatten(0, 2))
    y = torch.stack(places, 1).unflatten(1, out).permute(0, 3, 1, 2)
    return y if bias is None else y + bias.view(-1, 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# What conv2d.cpp is told.


def _geometry(x, weight, out, stride, padding, transposed, impl):
    """The numbers of conv2d.cpp's Shape where C++ runs ('cpp': where it can, 'auto': where it is faster), else None."""
    fits = x.dtype in _DTYPES and weight.dtype == x.dtype and x.device.type == "cpu"
    # An x without elements has no memory to point to.
    if impl == "torch" or not (fits and _channels_last(x) and x.numel() > 0):
        return None
    geometry, gain = _shape(x.shape, weight.shape, weight.stride(), tuple(out), stride, padding, transposed)
    return geometry if impl == "cpp" or (gain and x.dtype in _FAST) else None


def _check_cpp(x, weight, out, stride, padding, transposed):
    """Raise RuntimeError if C++ cannot compute this; of its gradients C++ then computes those that it can."""
    k, channels = weight.shape[2], weight.shape[1 if transposed else 0]
    if _is_to_image(channels, k, stride, padding, out):  # what _to_image makes of it
        blocks = weight.new_empty(16, x.shape[1], 8, 8)
        geometry = _geometry(x, blocks, [s // 2 for s in out], 2, 3, False, "cpp")
    else:
        geometry = _geometry(x, weight, out, stride, padding, transposed, "cpp")
    if geometry is None:
        raise RuntimeError(
            "impl='cpp' needs channels_last tensors of float32 or float64, channels in multiples of 16, and a square "
            f"kernel that it knows, got x {[*x.shape]} {x.dtype} and weight {[*weight.shape]} at stride {stride}"
        )


@functools.lru_cache(maxsize=1024)  # a training step asks for the same few shapes over and over
def _shape(x, weight, strides, out, stride, padding, transposed):
    """(the numbers of Shape, whether C++ is faster) from the shapes of x and weight; None if C++ does not serve them.

    C++ walks the output in steps of `outer` pixels and the input in steps of `inner`; for a convolution outer is 1 and
    inner the stride, for a transposed one the other way round. The larger of the two has two phases in each direction,
    its even and its odd pixels. A phase meets only some rows of the kernel, its taps, starting at an offset.
    """
    (B, C, H, W), k, (OH, OW) = x, weight[2], out
    N = weight[1] if transposed else weight[0]
    # min(out) > 0: a kernel larger than the padded image is PyTorch's to refuse.
    fits = k in _KERNELS.get(stride, ()) and weight[3] == k and min(out) > 0
    if not fits or C % _VECTOR or N % _VECTOR or max(C, N) > _MOST_CHANNELS:
        return None, False
    R = -(-k // stride)  # taps of a phase
    # With 3x3, 36 products give 16 pixels that take 144; larger tiles save more and round worse.
    M = 4 if R > 1 else 1  # pixels of a tile's side
    # A convolution's input is the larger side, a transposed one's output.
    inner, outer = (1, stride) if transposed else (stride, 1)
    offsets, taps = [], []
    for phase in range(stride):
        if transposed:  # output row stride * q + phase takes tap t from input row q + (phase + padding - t) / stride
            mine = [t for t in reversed(range(k)) if (phase + padding - t) % stride == 0]
            offsets.append((phase + padding - mine[0]) // stride if mine else 0)
        else:  # output row q takes tap t from input row stride * q + t - padding
            mine = list(range(phase, k, stride))
            offsets.append(phase - padding)
        taps.append(mine + [-1] * (4 - len(mine)))  # -1: no tap; Shape has room for 4
    offsets, taps = (2 * offsets)[:2], (2 * taps)[:2]  # at stride 1 the only phase stands for both
    rows, columns = (-(-s // outer) for s in out)
    # C++ reads the weight as it lies: [C, N, k, k] or [N, C, k, k], in any memory format.
    by_n, by_k = (strides[1], strides[0]) if transposed else (strides[0], strides[1])
    # In the order of Shape in conv2d.cpp, which is no more than int64s.
    numbers = [R, B, H, W, C, OH, OW, N, inner, outer, rows, columns, by_k, by_n, strides[2], strides[3]]
    numbers += [*offsets, *taps[0], *taps[1]]
    tiles = B * -(-rows // M) * -(-columns // M)
    # Multiplications per tile and pair of channels. Without a last tap, the place at infinity needs none.
    places = sum(M + R - 1 - (t[R - 1] < 0) for t in taps[:stride]) ** 2
    # R = 1 saves no products. Else: ours, dearer by what transforming costs, against the usual ones.
    saves = tiles <= _MOST_PIXELS if R == 1 else _TILE_COST * places * tiles < B * rows * columns * k * k
    return (ctypes.c_int64 * len(numbers))(*numbers), saves and tiles >= _LEAST_TILES
