"""Fused bias + leaky ReLU: bias_lrelu(x, bias, slope) in one pass over x, and its gradients in one pass each.

There are three implementations: the PyTorch reference, Triton for NVIDIA GPUs (below) and C++ for the CPU
(bias_lrelu.cpp). A leaky ReLU does not change signs, so the sign of its output tells the slope, and x need not be kept
for the gradient: Triton keeps the output, C++ one bit per element.

Two kernels serve all orders. The derivative of the backward pass is the backward pass with a bias added to its input,
and the derivative of that is the backward pass again.
"""

import torch
import torch.nn.functional as F

from .build import DTYPES, acc_dtype, as_dtype, c_function, choose, dense, empty_signs, format_of, tl, triton


def bias_lrelu(
    x: torch.Tensor, bias: torch.Tensor, slope: float = 0.2, impl: str = "auto", inplace: bool = False
) -> torch.Tensor:
    """y = lrelu(x + bias), with one bias per channel; lrelu(v) = v if v > 0 else slope * v.

    x: [B, C, H, W], NCHW or channels_last, or [B, C]; float32, bfloat16, float16 (all computed in float32) or float64;
    any strides, B may be 0. bias: [C], any floating dtype. slope: at least 0. impl: 'auto' (Triton on CUDA, C++ on the
    CPU, the reference with one warning where that cannot run), 'ref', 'triton', 'cpp'. inplace: the fused
    implementations may write y over x. Then x must not be a leaf, and no other gradient may need it; the gradient of a
    convolution does not need its output.

    Returns y in the shape, dtype and memory format of x. Differentiable to any order with respect to x and bias, and
    every order is fused. No atomics: the same input gives the same bits. torch.compile sees a single operator.

    Raises ValueError for shapes and devices and TypeError for dtypes that do not fit, RuntimeError with the reason if
    the implementation asked for cannot run.
    """
    # The kernels check nothing: they would read beyond a bias that is too short.
    if x.ndim not in (2, 4) or bias.ndim != 1 or len(bias) != x.shape[1] or bias.device != x.device:
        raise ValueError(
            "bias_lrelu needs x [B, C, H, W] or [B, C] and bias [C] on one device, "
            f"got {[*x.shape]} on {x.device} and {[*bias.shape]} on {bias.device}"
        )
    if x.dtype not in DTYPES or not bias.is_floating_point():
        raise TypeError(f"bias_lrelu needs floating-point tensors, got {x.dtype} and {bias.dtype}")
    # A negative slope changes signs, but the gradient is told from the sign of the output.
    if slope < 0:
        raise ValueError(f"bias_lrelu needs slope >= 0, got {slope}")
    impl = choose(impl, x.device.type)
    acc = acc_dtype(x.dtype)
    bias = as_dtype(bias, acc)
    if impl == "ref":
        v = as_dtype(x, acc) + (bias if x.ndim == 2 else bias.view(-1, 1, 1))
        return F.leaky_relu(v, slope).to(x.dtype)  # rounded once, as in the kernels
    inplace = inplace and not torch.compiler.is_compiling()  # its operators may not write over what they are given
    # Where no gradient will be asked for, C++ need not write the signs.
    keep = torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad)
    return _BiasLrelu.apply(dense(x), bias.contiguous(), float(slope), impl, inplace, keep)


def _view(x: torch.Tensor) -> tuple[int, int, int]:
    """(outer, C, inner) of dense memory: (B, C, H*W) for NCHW, (B*H*W, C, 1) for channels_last and [B, C]."""
    C = x.shape[1]
    inner = x.shape[2] * x.shape[3] if x.ndim == 4 and C > 0 and x.is_contiguous() else 1
    return x.numel() // max(C * inner, 1), C, inner  # 1: for an x without elements


# Gradients. The slope m = (y > 0 ? 1 : slope) is constant almost everywhere, so the backward pass has a derivative with
# respect to g alone. `positive` tells m: it is y for Triton, and one bit per element for C++.


class _BiasLrelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, slope, impl, inplace, keep):
        if inplace:
            ctx.mark_dirty(x)  # autograd then raises where another gradient needs the old x
            y, signs = _run_forward(x, bias, slope, impl, keep, x)
        else:
            y, signs = _forward(x, bias, slope, impl, keep)
        # The bias is kept for its shape and dtype alone: no derivative depends on its values.
        ctx.save_for_backward(signs if impl == "cpp" else y, bias)
        ctx.slope, ctx.impl, ctx.format = slope, impl, format_of(x)
        return y

    @staticmethod
    def backward(ctx, g):
        positive, bias = ctx.saved_tensors
        g = g.contiguous(memory_format=ctx.format)  # it may come expanded from a sum, or in another order
        # A raw kernel has no derivative of its own: R1 would silently lose what passes through this op.
        if torch.is_grad_enabled():  # create_graph=True
            # detach: y has a history, but its sign counts as a constant.
            dx, db = _Backward.apply(g, positive.detach(), bias, ctx.slope, ctx.impl)
        else:
            dx, db = _masked(g, positive, None, True, ctx.slope, ctx.impl)
        return dx, db, None, None, None, None


class _Backward(torch.autograd.Function):
    """dx = g * m, db = sum of dx over all but the channel.

    Its derivative with respect to x and bias is zero. So a penalty like R1 sends no gradient below this point. The
    bias, if given, gets zeros and not None: Adam then counts the step for it, as it does with PyTorch's own ops.
    """

    @staticmethod
    def forward(ctx, g, positive, bias, slope, impl):
        ctx.save_for_backward(positive, bias)
        ctx.slope, ctx.impl, ctx.format = slope, impl, format_of(g)
        ctx.shape, ctx.dtype = g.shape, g.dtype
        ctx.set_materialize_grads(False)  # R1 sends a gradient to dx alone: no zeros for db
        return _masked(g, positive, None, True, slope, impl)

    @staticmethod
    def backward(ctx, gdx, gdb):
        positive, bias = ctx.saved_tensors
        if gdx is None and gdb is None:
            return None, None, None, None, None
        if gdx is None:
            # Only db was differentiated. What comes back through it is masked like the rest.
            gdx = torch.zeros(ctx.shape, dtype=ctx.dtype, device=gdb.device)
        gdx = gdx.contiguous(memory_format=ctx.format)
        gdb = None if gdb is None else gdb.contiguous()
        dbias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        return _DoubleBackward.apply(gdx, gdb, positive, ctx.slope, ctx.impl), None, dbias, None, None


class _DoubleBackward(torch.autograd.Function):
    """dg = (gdx + gdb) * m."""

    @staticmethod
    def forward(ctx, gdx, gdb, positive, slope, impl):
        ctx.save_for_backward(positive)
        ctx.slope, ctx.impl, ctx.format, ctx.bias = slope, impl, format_of(gdx), gdb is not None
        return _masked(gdx, positive, gdb, False, slope, impl)[0]

    @staticmethod
    def backward(ctx, g):
        (positive,) = ctx.saved_tensors
        # Of (gdx + gdb) * m, the derivative by gdx is g * m, by gdb its sum: the first order again.
        dx, db = _Backward.apply(g.contiguous(memory_format=ctx.format), positive, None, ctx.slope, ctx.impl)
        return dx, db if ctx.bias else None, None, None, None


# What runs. Eager calls skip the custom operator and its overhead; torch.compile needs it.


def _forward(*arguments):
    return (_forward_op if torch.compiler.is_compiling() else _run_forward)(*arguments)


def _masked(*arguments):
    return (_masked_op if torch.compiler.is_compiling() else _run_masked)(*arguments)


def _run_forward(x, bias, slope, impl, keep, y=None):
    """y and, for C++ with `keep`, its signs; else a tensor without elements in their place."""
    y = torch.empty_like(x) if y is None else y
    signs = _empty_signs(x, impl, keep)
    if x.numel() == 0:  # no memory, so no pointers for a kernel
        return y, signs
    if impl == "triton":
        with torch.cuda.device_of(x):  # Triton launches on the current device, which may be another
            _triton_forward(x, bias, y, slope)
    else:
        run = c_function("bias_lrelu", x.dtype, "ppppiiid")
        # A null pointer tells C++ to write no signs.
        run(x.data_ptr(), bias.data_ptr(), y.data_ptr(), signs.data_ptr() if keep else None, *_view(x), slope)
    return y, signs


def _empty_signs(x, impl, keep):
    outer, C, inner = _view(x)
    # As bias_lrelu.cpp has them: a map of NCHW starts a new word, channels_last is one long row.
    rows, columns = (1, outer * C) if inner == 1 else (outer * C, inner)
    return empty_signs(x, rows, columns if keep and impl == "cpp" else 0)


def _run_masked(
    g: torch.Tensor, positive: torch.Tensor, bias: torch.Tensor | None, reduce: bool, slope: float, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx = (g + bias) * m, and its sum over all but the channel (if reduce, else an empty tensor)."""
    dx, db = _empty_gradients(g, positive, bias, reduce, slope, impl)
    if g.numel() == 0:
        return dx, db.zero_()
    if impl == "triton":
        with torch.cuda.device_of(g):
            _triton_masked(g, positive, bias, dx, db, slope)
    else:
        run = c_function("bias_lrelu_masked", g.dtype, "pppppiiid")
        b = None if bias is None else bias.data_ptr()
        # Null pointers again: no bias to add, no sums wanted.
        run(g.data_ptr(), positive.data_ptr(), b, dx.data_ptr(), db.data_ptr() if reduce else None, *_view(g), slope)
    return dx, db


def _empty_gradients(g, positive, bias, reduce, slope, impl):
    # No elements in place of None: a custom operator returns tensors only.
    return torch.empty_like(g), g.new_empty(g.shape[1] if reduce else 0, dtype=acc_dtype(g.dtype))


# One operator to torch.compile. It declares that no argument changes, so it never runs in place.
@torch.library.custom_op("infoscc::bias_lrelu", mutates_args=())
def _forward_op(
    x: torch.Tensor, bias: torch.Tensor, slope: float, impl: str, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _run_forward(x, bias, slope, impl, keep)


# What torch.compile traces with: shapes and formats, without data.
_forward_op.register_fake(lambda x, bias, slope, impl, keep: (torch.empty_like(x), _empty_signs(x, impl, keep)))
_masked_op = torch.library.custom_op("infoscc::bias_lrelu_masked", _run_masked, mutates_args=())
_masked_op.register_fake(_empty_gradients)


# Triton. Memory is seen as a matrix [rows, cols]: channels_last is [B*H*W, C], NCHW is [B*C, H*W]. A tile of it has
# 1024 elements: with 128 threads that is 8 per thread, two 16-byte accesses in float32 and one in bfloat16.

if triton is not None:

    @triton.jit
    def _forward_kernel(
        x, bias, y, rows, cols, C, SLOPE: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
    ):
        """Reads x and writes y once: 2 n elements, the minimum. The bias comes from the cache."""
        across = tl.cdiv(cols, COLS)  # tiles per row; a single grid axis, because CUDA ends the second at 65,535
        r = ((tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS))[:, None]
        c = ((tl.program_id(0) % across) * COLS + tl.arange(0, COLS))[None, :]
        at = r.to(tl.int64) * cols + c  # 128 images of 16 channels at 1024 px are 2**31 elements
        inside = (r < rows) & (c < cols)
        b = tl.load(bias + c, mask=c < cols, other=0) if LAST else tl.load(bias + r % C, mask=r < rows, other=0)
        # In the bias's dtype, at least float32; rounded to that of y at the end.
        v = tl.load(x + at, mask=inside).to(b.dtype) + b
        tl.store(y + at, tl.where(v > 0, v, v * SLOPE).to(y.dtype.element_ty), mask=inside)

    # The number of tiles differs with each batch and size of image: as a constant, or specialised as Triton does with
    # the integers 1 and multiples of 16, it would have the kernel compiled for one after the other.
    @triton.jit(do_not_specialize=["loops"])
    def _masked_kernel(
        g, y, bias, dx, part, rows, cols, C, loops, ACC: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr,
        ROWS: tl.constexpr, COLS: tl.constexpr
    ):  # fmt: skip
        """Reads g and y and writes dx once: 3 n elements, the minimum. The partial sums of the bias gradient are
        written and read once more: B C elements for NCHW, n / (4 ROWS) for channels_last, where ROWS = 1024 / C.

        For channels_last a program walks down `loops` tiles and writes the sums of its columns to part [row programs,
        C]. For NCHW it walks along its rows and writes their sums to part [B, C]. torch.sum adds the parts.
        """
        # A sum for each place of a tile: threads need each other only once, after the loop.
        acc = tl.zeros([ROWS, COLS], dtype=ACC)
        for i in range(loops):
            if LAST:
                r = ((tl.program_id(0) * loops + i) * ROWS + tl.arange(0, ROWS))[:, None]
                c = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
            else:
                r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
                c = (i * COLS + tl.arange(0, COLS))[None, :]
            at = r.to(tl.int64) * cols + c
            inside = (r < rows) & (c < cols)
            d = tl.load(g + at, mask=inside, other=0).to(ACC)
            if bias is not None:
                if LAST:
                    d += tl.load(bias + c, mask=c < cols, other=0)
                else:
                    d += tl.load(bias + r % C, mask=r < rows, other=0)
            # A leaky ReLU keeps signs, so y tells on which side of 0 its argument was.
            d = tl.where(tl.load(y + at, mask=inside, other=0) > 0, d, d * SLOPE)
            tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
            acc += tl.where(inside, d, 0)  # a bias was added outside as well
        # Parts rather than atomics: sums in a fixed order give the same bits each time.
        if part is not None:
            if LAST:
                c = tl.program_id(1) * COLS + tl.arange(0, COLS)
                tl.store(part + tl.program_id(0).to(tl.int64) * cols + c, tl.sum(acc, 0), mask=c < cols)
            else:
                r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
                tl.store(part + r, tl.sum(acc, 1), mask=r < rows)


def _tiles(x):
    """rows, cols, whether the channels are the columns, and a tile's rows and columns."""
    outer, C, inner = _view(x)
    rows, cols = (outer, C) if inner == 1 else (outer * C, inner)
    # tl.arange takes powers of two only.
    COLS = min(triton.next_power_of_2(cols), 1024)
    return rows, cols, inner == 1, 1024 // COLS, COLS


def _triton_forward(x, bias, y, slope):
    rows, cols, last, ROWS, COLS = _tiles(x)
    grid = (triton.cdiv(rows, ROWS) * triton.cdiv(cols, COLS),)
    _forward_kernel[grid](x, bias, y, rows, cols, x.shape[1], slope, last, ROWS, COLS)


def _triton_masked(g, y, bias, dx, db, slope):
    rows, cols, last, ROWS, COLS = _tiles(y)
    tiles, C = triton.cdiv(rows, ROWS), y.shape[1]
    # At most 1024 programs, so that few parts are left to add; at least 4 tiles each, so that parts stay a small share.
    loops = max(4, triton.cdiv(tiles, 1024)) if last else triton.cdiv(cols, COLS)
    # The second axis, C / 1024 at most, stays far below its limit of 65,535.
    grid = (triton.cdiv(tiles, loops), triton.cdiv(cols, COLS)) if last else (tiles, 1)
    # channels_last: a row for each program. NCHW: a number for each map, [B, C].
    part = None if db.numel() == 0 else db.new_empty(grid[0] if last else rows // C, C)
    acc = tl.float64 if y.dtype == torch.float64 else tl.float32
    _masked_kernel[grid](g, y, bias, dx, part, rows, cols, C, loops, acc, slope, last, ROWS, COLS)
    if part is not None:
        torch.sum(part, 0, out=db)
