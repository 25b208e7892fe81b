"""2-D convolution and its transpose, by Winograd's method on the CPU, with gradients that R1 can differentiate fast.

A drop-in for F.conv2d and F.conv_transpose2d with square kernels. Implementations: PyTorch's own, and C++ for the CPU
(conv2d.cpp), which needs a quarter to a half of the multiplications for 3x3 and 4x4 kernels on channels_last tensors.
"""

import contextlib
import ctypes
import functools

import torch
import torch.nn.functional as F

from .build import c_function, choose

_DTYPES = (torch.float32, torch.float64)
# What 'auto' takes C++ for. float64 is for checks, and there a sum of zeros should be 0, as usual, and not 1e-17: a
# leaky ReLU would tell them apart.
_FAST = (torch.float32,)


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: int = 1, padding: int = 0,
    impl: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """F.conv2d(x, weight, bias, stride, padding).

    x: [B, C, H, W], weight: [N, C, k, k], bias: [N] or None, of one floating dtype; under autocast they are cast as
    F.conv2d casts them. impl: 'auto' (C++ where it is the faster one, see below, else PyTorch's), 'ref' (PyTorch's),
    'cpp'.

    Returns [B, N, (H + 2 padding - k) // stride + 1, ...]. Differentiable to any order; a second derivative through the
    gradient by x, as in R1, is again made of convolutions, not of torch's double backward, which takes the batch for
    channels and whole maps for kernels. Same input and same number of threads, same bits.

    C++ serves float32 on the CPU (by name float64 too), channels_last, channels in multiples of 16, kernels of 1, 3 and
    4 pixels at stride 1, of 1, 3, 4, 7 and 8 at stride 2. In float32 its largest error is about ten times that of a
    usual convolution, 1e-5 to 1e-4 of the result's standard deviation.

    Raises RuntimeError with the reason if 'cpp' cannot run, ValueError for an unknown impl.
    """
    x, weight, bias = _autocast(x, weight, bias)
    impl = _choose(impl, x.device.type)
    if torch.compiler.is_compiling():
        return F.conv2d(x, weight, bias, stride, padding)
    return _Conv.apply(x, weight, bias, stride, padding, impl)


def conv_transpose2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: int = 1, padding: int = 0,
    output_padding: int = 0, impl: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """F.conv_transpose2d(x, weight, bias, stride, padding, output_padding): as conv2d, with weight [C, N, k, k]."""
    x, weight, bias = _autocast(x, weight, bias)
    impl = _choose(impl, x.device.type)
    if torch.compiler.is_compiling():
        return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding)
    out = [(s - 1) * stride - 2 * padding + weight.shape[2] + output_padding for s in x.shape[2:]]
    return _ConvTranspose.apply(x, weight, bias, stride, padding, out, impl)


@contextlib.contextmanager
def no_weight_gradients():
    """Within it, gradients by weights are left out: autograd.grad by the input alone would throw them away."""
    global _by_weight
    before, _by_weight = _by_weight, False
    try:
        yield
    finally:
        _by_weight = before


_by_weight = True


def _choose(impl, device):
    """'ref', 'cpp', or 'auto' where C++ can run."""
    if impl not in ("auto", "ref", "cpp"):
        raise ValueError(f"impl must be auto, ref or cpp for a convolution, got {impl!r}")
    if impl == "auto" and device != "cpu":
        return "ref"  # cuDNN has Winograd's method itself
    return impl if choose(impl, device) == "cpp" else "ref"


def _autocast(*tensors):
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return [t if t is None else t.to(torch.get_autocast_dtype(device)) for t in tensors]


def _channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last)


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
    """Gradients of x, weight and bias; that of x is again one of the two functions, the other one."""
    (x, weight), (stride, padding, impl) = ctx.saved_tensors, ctx.options
    want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
    g = g.contiguous(memory_format=torch.channels_last) if _channels_last(x) else g
    dx = dweight = None
    if want_x and transposed:
        dx = _Conv.apply(g, weight, None, stride, padding, impl)
    elif want_x:
        dx = _ConvTranspose.apply(g, weight, None, stride, padding, x.shape[2:], impl)
    if want_weight and _by_weight:
        larger, smaller = (g, x) if transposed else (x, g)
        dweight = _weight_gradient(larger, smaller, weight, stride, padding, impl)
    return dx, dweight, g.sum((0, 2, 3)) if want_bias else None


# What runs.


def _forward(x, weight, bias, stride, padding, impl):
    out = [(s + 2 * padding - weight.shape[2]) // stride + 1 for s in x.shape[2:]]
    geometry = _geometry(x, weight, out, stride, padding, False, impl)
    if geometry is None:
        return F.conv2d(x, weight, bias, stride, padding)
    return _run(x, weight, bias, weight.shape[0], out, geometry)


def _transposed(x, weight, bias, stride, padding, out, impl):
    if weight.shape[1:] == (3, 7, 7) and (stride, padding) == (1, 3) and out[0] % 2 == out[1] % 2 == 0:
        return _to_image(x, weight, bias, impl)
    geometry = _geometry(x, weight, out, stride, padding, True, impl)
    if geometry is None:
        rest = [o - (s - 1) * stride + 2 * padding - weight.shape[2] for o, s in zip(out, x.shape[2:], strict=True)]
        return F.conv_transpose2d(x, weight, bias, stride, padding, rest)
    return _run(x, weight, bias, weight.shape[1], out, geometry)


def _weight_gradient(x, g, weight, stride, padding, impl):
    """Gradient of conv2d(x, weight) by its weight; differentiable as torch's where gradients are enabled."""
    geometry = None
    if not torch.is_grad_enabled() and _channels_last(g):
        geometry = _geometry(x, weight, list(g.shape[2:]), stride, padding, False, impl)
    if geometry is None:
        return torch.nn.grad.conv2d_weight(x, weight.shape, g, stride, padding)
    dweight = torch.empty_like(weight)
    c_function("conv2d_weight_gradient", x.dtype, "pppp")(x.data_ptr(), g.data_ptr(), dweight.data_ptr(), geometry)
    return dweight


def _run(x, weight, bias, channels, out, geometry):
    y = torch.empty(len(x), channels, *out, dtype=x.dtype, memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    pointers = x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()
    c_function("conv2d", x.dtype, "ppppp")(*pointers, geometry)
    return y


def _to_image(x, weight, bias, impl):
    """F.conv_transpose2d(x, weight, bias, padding=3) for weight [C, 3, 7, 7] and even sides, 2x2 pixels at once.

    Three output channels would leave most of a vector empty. The kernel, shifted to each of four pixels and padded to
    8x8, gives them as 12 channels at stride 2: the same sums. Four channels of zeros fill the vector.
    """
    kernel = weight.flip(2, 3).transpose(0, 1)
    shifted = [F.pad(kernel, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)]
    blocks = torch.cat((*shifted, torch.zeros_like(shifted[0])[:1].expand(4, -1, -1, -1)))
    y = _forward(x, blocks.contiguous(memory_format=torch.channels_last), None, 2, 3, impl)
    y = y.permute(0, 2, 3, 1)[..., :12].unflatten(3, (2, 2, 3)).transpose(2, 3)  # [B, H / 2, 2, W / 2, 2, 3]
    y = y.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    return y if bias is None else y + bias.view(-1, 1, 1)


def _geometry(x, weight, out, stride, padding, transposed, impl):
    """What conv2d.cpp's Shape holds, or None for PyTorch's own; RuntimeError if impl is 'cpp' and it cannot."""
    if impl == "ref":
        return None
    fits = x.dtype in _DTYPES and weight.dtype == x.dtype and x.device.type == "cpu"
    fits = fits and _channels_last(x) and x.numel() > 0
    geometry, gain = None, False
    if fits:
        geometry, gain = _shape(x.shape, weight.shape, weight.stride(), tuple(out), stride, padding, transposed)
    if impl == "cpp" and geometry is None:
        choose("cpp", x.device.type)
        raise RuntimeError(
            "impl='cpp' needs channels_last tensors of float32 or float64, channels in multiples of 16, and a square "
            f"kernel that it knows, got x {[*x.shape]} {x.dtype} and weight {[*weight.shape]} at stride {stride}"
        )
    return geometry if impl == "cpp" or (gain and x.dtype in _FAST) else None


@functools.lru_cache(maxsize=1024)
def _shape(x, weight, strides, out, stride, padding, transposed):
    """The numbers of Shape from the shapes of x and weight, and whether C++ is the faster one."""
    (B, C, H, W), k, (OH, OW) = x, weight[2], out
    N = weight[1] if transposed else weight[0]
    fits = k in {1: (1, 3, 4), 2: (1, 3, 4, 7, 8)}.get(stride, ()) and weight[3] == k and min(out) > 0
    if not fits or C % 16 or N % 16 or max(C, N) > 2048:
        return None, False
    R = -(-k // stride)
    M = 4 if R > 1 else 1
    inner, outer = (1, stride) if transposed else (stride, 1)
    offsets, taps = [], []
    for phase in range(stride):
        if transposed:  # output row stride * q + phase takes tap t from input row q + (phase + padding - t) / stride
            mine = [t for t in reversed(range(k)) if (phase + padding - t) % stride == 0]
            offsets.append((phase + padding - mine[0]) // stride if mine else 0)
        else:  # output row q takes tap t from input row stride * q + t - padding
            mine = list(range(phase, k, stride))
            offsets.append(phase - padding)
        taps.append(mine + [-1] * (4 - len(mine)))
    offsets, taps = (2 * offsets)[:2], (2 * taps)[:2]
    rows, columns = (-(-s // outer) for s in out)
    by_n, by_k = (strides[1], strides[0]) if transposed else (strides[0], strides[1])
    numbers = [R, B, H, W, C, OH, OW, N, inner, outer, rows, columns, by_k, by_n, strides[2], strides[3]]
    numbers += [*offsets, *taps[0], *taps[1]]
    tiles = B * -(-rows // M) * -(-columns // M)
    places = sum(M + R - 1 - (t[R - 1] < 0) for t in taps[:stride]) ** 2  # multiplications a tile and pair of channels
    saves = tiles <= 4096 if R == 1 else 1.25 * places * tiles < B * rows * columns * k * k
    return (ctypes.c_int64 * len(numbers))(*numbers), saves and tiles >= 16
