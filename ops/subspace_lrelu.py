"""Fused EigenGAN subspace modulation: subspace_lrelu(h, coef, maps, bias, slope), one pass forward and one backward.

A generator block of EigenGAN (He et al. 2021, eq. 1) adds conv(phi_b) to its activations, phi_b = U (L * z_b) + mu. The
convolution is linear, so conv(phi_b) = sum_k coef[b, k] maps[k], where maps are the convolved columns of U L and mu,
without bias, and coef = [z, 1]. That takes K convolutions instead of B. This op computes the sum, the bias and the
activation.

There are three implementations: the PyTorch reference, Triton for NVIDIA GPUs (below) and C++ for the CPU
(subspace_lrelu.cpp). For the gradients Triton keeps the output, C++ only its signs, one bit per element.
"""

import torch
import torch.nn.functional as F

from .build import DTYPES, acc_dtype, as_dtype, c_function, choose, dense, empty_signs, format_of, tl, triton


def subspace_lrelu(
    h: torch.Tensor, coef: torch.Tensor, maps: torch.Tensor, bias: torch.Tensor, slope: float = 0.2, impl: str = "auto",
    inplace: bool = False,
) -> torch.Tensor:  # fmt: skip
    """y = lrelu(h + sum_k coef[b, k] maps[k] + bias), lrelu(v) = v if v > 0 else slope * v.

    h: [B, C, H, W], NCHW or channels_last; float32, bfloat16, float16 (all computed in float32) or float64; any
    strides, B may be 0. coef: [B, K], maps: [K, C, H, W], bias: [C]; any floating dtype. maps are converted to the
    dtype of h, and copied if their memory format differs from that of h; coef and bias are converted to the dtype of
    the computation. slope: at least 0. impl: 'auto' (Triton on CUDA, C++ on the CPU, the reference with one warning
    where that cannot run), 'ref', 'triton', 'cpp'. inplace: the fused implementations may write y over h. Then h must
    not be a leaf, and no other gradient may need it; the gradient of a convolution does not need its output.

    Returns y in the shape, dtype and memory format of h. Differentiable to any order with respect to h, coef, maps and
    bias. The first order is fused and skips what needs no gradient; higher orders are composed of PyTorch ops. No
    atomics: the same input gives the same bits. torch.compile sees a single operator.

    Raises ValueError for shapes and devices and TypeError for dtypes that do not fit, RuntimeError with the reason if
    the implementation asked for cannot run.
    """
    fits = h.ndim == 4 and coef.ndim == 2 and len(coef) == len(h) and bias.ndim == 1 and len(bias) == h.shape[1]
    fits = fits and h.device == coef.device == maps.device == bias.device
    # The kernels check nothing: they would read beyond tensors that are too small.
    if not fits or maps.shape != (coef.shape[1], *h.shape[1:]):
        got = ", ".join(f"{[*t.shape]} on {t.device}" for t in (h, coef, maps, bias))
        needed = "h [B, C, H, W], coef [B, K], maps [K, C, H, W], bias [C] on one device"
        raise ValueError(f"subspace_lrelu needs {needed}, got {got}")
    if h.dtype not in DTYPES or not (
        coef.is_floating_point() and maps.is_floating_point() and bias.is_floating_point()
    ):
        raise TypeError(
            f"subspace_lrelu needs floating-point tensors, got {h.dtype}, {coef.dtype}, {maps.dtype}, {bias.dtype}"
        )
    # A negative slope changes signs, but the gradient is told from the sign of the output.
    if slope < 0:
        raise ValueError(f"subspace_lrelu needs slope >= 0, got {slope}")
    impl = choose(impl, h.device.type)
    acc = acc_dtype(h.dtype)
    h = dense(h)  # the kernels walk through memory without looking at strides
    # The kernels walk h and the maps side by side, so both have one order in memory.
    coef, bias = as_dtype(coef, acc).contiguous(), as_dtype(bias, acc).contiguous()
    maps = as_dtype(maps, h.dtype).contiguous(memory_format=format_of(h))
    if impl == "ref":
        # Summed in acc and rounded once, as in the kernels.
        return F.leaky_relu(h.to(acc) + _mix(coef, maps) + bias.view(-1, 1, 1), slope).to(h.dtype)
    inplace = inplace and not torch.compiler.is_compiling()  # its operators may not write over what they are given
    # Where no gradient will be asked for, C++ need not write the signs.
    keep = torch.is_grad_enabled() and (
        h.requires_grad or coef.requires_grad or maps.requires_grad or bias.requires_grad
    )
    return _SubspaceLrelu.apply(h, coef, maps, bias, float(slope), impl, inplace, keep)


def _mix(coef, maps):
    """sum_k coef[b, k] maps[k] -> [B, C, H, W], in the dtype of coef and the memory format of maps."""
    last = not maps.is_contiguous()  # then channels_last: `subspace_lrelu` knows no third order
    flat = (maps.permute(0, 2, 3, 1) if last else maps).to(coef.dtype)
    # In full precision, as the kernels sum: autocast would round both factors to 16 bits.
    with torch.autocast(maps.device.type, enabled=False):
        out = (coef @ flat.flatten(1)).view(len(coef), *flat.shape[1:])
    return out.permute(0, 3, 1, 2) if last else out


# Gradients. `positive` tells the slope m = (y > 0 ? 1 : slope): it is y for Triton, and one bit per element for C++.


class _SubspaceLrelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, coef, maps, bias, slope, impl, inplace, keep):
        if inplace:
            ctx.mark_dirty(h)  # autograd then raises where another gradient needs the old h
            y, signs = _run_forward(h, coef, maps, bias, slope, impl, keep, h)
        else:
            y, signs = _forward(h, coef, maps, bias, slope, impl, keep)
        # Not h: the sign of y gives the slope, and all else is linear in h.
        ctx.save_for_backward(signs if impl == "cpp" else y, coef, maps)
        ctx.slope, ctx.impl = slope, impl
        return y

    @staticmethod
    def backward(ctx, g):
        positive, coef, maps = ctx.saved_tensors
        _, want_coef, want_maps, want_bias, *_ = ctx.needs_input_grad
        g = g.contiguous(memory_format=format_of(maps))  # it may come expanded from a sum, or in another order
        # In training coef is drawn, and its gradient skipped; the search for a picture's z needs it.
        wanted = want_coef, want_maps, want_bias
        # A raw kernel has no derivative of its own: R1 would silently lose what passes through this op.
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _Backward.apply(g, positive.detach(), coef, maps, *wanted, ctx.slope, ctx.impl)
        else:
            gradients = _backward(g, positive, coef, maps, *wanted, ctx.slope, ctx.impl)
        dh, dcoef, dmaps, dbias = gradients
        dcoef, dmaps, dbias = dcoef if want_coef else None, dmaps if want_maps else None, dbias if want_bias else None
        return dh, dcoef, dmaps, dbias, None, None, None, None


class _Backward(torch.autograd.Function):
    """With m constant almost everywhere: dh = g * m, dcoef[b, k] = <dh[b], maps[k]>,
    dmaps[k] = sum_b coef[b, k] dh[b], dbias[c] = sum of dh over all but the channel."""

    @staticmethod
    def forward(ctx, g, positive, coef, maps, want_coef, want_maps, want_bias, slope, impl):
        # dcoef and dmaps are products with g * m, so their derivatives need g.
        ctx.save_for_backward(g, positive, coef, maps)
        ctx.slope, ctx.impl = slope, impl
        return _backward(g, positive, coef, maps, want_coef, want_maps, want_bias, slope, impl)

    @staticmethod
    def backward(ctx, gdh, gdcoef, gdmaps, gdbias):
        """dg = q * m, where q is the sum of what reaches dh through all four outputs.

        dcoef also depends on maps, and dmaps on coef, so these two get gradients as well.
        """
        g, positive, coef, maps = ctx.saved_tensors
        if ctx.impl == "cpp":  # its backward pass of ones unpacks the bits
            ones = torch.ones_like(g, dtype=coef.dtype)
            m = _run_backward(ones, positive, coef, maps, False, False, False, ctx.slope, ctx.impl)[0]
        else:
            # In coef's dtype: in float64 a slope of 0.2 rounded to float32 would show.
            m = torch.where(positive > 0, coef.new_ones(()), ctx.slope)
        dh = g.to(coef.dtype) * m
        q, to_coef, to_maps = gdh.to(coef.dtype), None, None
        # What was not wanted in the first order came back with no elements, and so does its gradient.
        if gdcoef.numel():
            q = q + _mix(gdcoef, maps)
            to_maps = torch.einsum("bk,bchw->kchw", gdcoef, dh).to(maps.dtype)
        if gdmaps.numel():
            q = q + _mix(coef, gdmaps)
            to_coef = torch.einsum("bchw,kchw->bk", dh, gdmaps.to(coef.dtype))
        if gdbias.numel():
            q = q + gdbias.view(-1, 1, 1)
        return (q * m).to(g.dtype), None, to_coef, to_maps, None, None, None, None, None


# What runs. Eager calls skip the custom operator and its overhead; torch.compile needs it.


def _forward(*arguments):
    return (_forward_op if torch.compiler.is_compiling() else _run_forward)(*arguments)


def _backward(*arguments):
    return (_backward_op if torch.compiler.is_compiling() else _run_backward)(*arguments)


def _run_forward(h, coef, maps, bias, slope, impl, keep, y=None):
    """y and, for C++ with `keep`, its signs; else a tensor without elements in their place."""
    y = torch.empty_like(h) if y is None else y
    signs = _empty_signs(h, impl, keep)
    if h.numel() == 0:  # no memory, so no pointers for a kernel
        return y, signs
    if impl == "triton":
        with torch.cuda.device_of(h):  # Triton launches on the current device, which may be another
            _triton_forward(h, coef, maps, bias, y, slope)
    else:
        run = c_function("subspace_lrelu", h.dtype, "ppppppiiiiid")
        # Tensors without elements stand for null pointers: C++ skips what they would hold.
        pointers = [t.data_ptr() if t.numel() else None for t in (h, coef, maps, bias, y, signs)]
        run(*pointers, *_sizes(h, coef), slope)
    return y, signs


def _empty_signs(h, impl, keep):
    B = h.shape[0]
    return empty_signs(h, B, h.numel() // B if keep and impl == "cpp" and B else 0)


def _run_backward(
    g: torch.Tensor,
    positive: torch.Tensor,
    coef: torch.Tensor,
    maps: torch.Tensor,
    want_coef: bool,
    want_maps: bool,
    want_bias: bool,
    slope: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of h, coef, maps and bias; what is not wanted comes back with no elements."""
    outputs = _empty_gradients(g, positive, coef, maps, want_coef, want_maps, want_bias, slope, impl)
    if g.numel() == 0:
        return tuple(t.zero_() for t in outputs)
    if impl == "triton":
        with torch.cuda.device_of(g):
            _triton_backward(g, positive, coef, maps, *outputs, slope)
    else:
        run = c_function("subspace_lrelu_backward", g.dtype, "ppppppppiiiiid")
        pointers = [t.data_ptr() if t.numel() else None for t in (g, positive, coef, maps, *outputs)]
        run(*pointers, *_sizes(g, coef), slope)
    return outputs


def _empty_gradients(g, positive, coef, maps, want_coef, want_maps, want_bias, slope, impl):
    # In place of None: a custom operator returns tensors only.
    def nothing(t):
        return t.new_empty(0)

    return (
        torch.empty_like(g),
        torch.empty_like(coef) if want_coef else nothing(coef),
        torch.empty_like(maps) if want_maps else nothing(maps),
        coef.new_empty(g.shape[1]) if want_bias else nothing(coef),
    )


def _sizes(h, coef):
    """B, C, H*W, K, and whether the channels are last in memory."""
    B, C, H, W = h.shape
    return B, C, H * W, coef.shape[1], not h.is_contiguous()


# One operator to torch.compile. It declares that no argument changes, so it never runs in place.
@torch.library.custom_op("infoscc::subspace_lrelu", mutates_args=())
def _forward_op(
    h: torch.Tensor, coef: torch.Tensor, maps: torch.Tensor, bias: torch.Tensor, slope: float, impl: str, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _run_forward(h, coef, maps, bias, slope, impl, keep)


# What torch.compile traces with: shapes and formats, without data.
_forward_op.register_fake(
    lambda h, coef, maps, bias, slope, impl, keep: (torch.empty_like(h), _empty_signs(h, impl, keep))
)
_backward_op = torch.library.custom_op("infoscc::subspace_lrelu_backward", _run_backward, mutates_args=())
_backward_op.register_fake(_empty_gradients)


# Triton. A map is a row of P = C * H * W places in the order of memory, and h a matrix [B, P]. A program works on a
# tile of IMAGES x PLACES, so that it reads each map once for all its images.

if triton is not None:

    @triton.jit
    def _forward_kernel(
        h, coef, maps, bias, y, B, P, C, S, K: tl.constexpr, SLOPE: tl.constexpr, LAST: tl.constexpr,
        EVEN: tl.constexpr, IMAGES: tl.constexpr, PLACES: tl.constexpr
    ):  # fmt: skip
        """Moves 2 B P elements of h and y, and K ceil(B / IMAGES) P of maps. Only K P of those come from memory:
        programs that read the same maps follow each other, so the cache has the rest. EVEN: tiles fit, and nothing is
        masked."""
        # Groups of images count fastest: programs that run side by side read the same maps.
        groups = tl.cdiv(B, IMAGES)
        b = tl.program_id(0) % groups * IMAGES + tl.arange(0, IMAGES)
        p = tl.program_id(0) // groups * PLACES + tl.arange(0, PLACES)
        # 64 bits for the place in memory: 128 images of 16 channels at 1024 px are 2**31 elements.
        at = b[:, None].to(tl.int64) * P + p[None, :]
        images = None if EVEN else b < B
        places = None if EVEN else p < P
        inside = None if EVEN else images[:, None] & places[None, :]
        # The channel of a place is its fastest index in channels_last, its slowest in NCHW.
        base = tl.load(bias + (p % C if LAST else p // S), mask=places)
        v = tl.load(h + at, mask=inside).to(base.dtype) + base[None, :]
        for k in tl.static_range(K):  # unrolled: a map's load need not wait for the sum of the one before
            m = tl.load(maps + p, mask=places).to(base.dtype)
            v += tl.load(coef + b * K + k, mask=images)[:, None] * m[None, :]
            maps += P
        tl.store(y + at, tl.where(v > 0, v, v * SLOPE).to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(
        g, y, coef, maps, dh, part_coef, part_maps, part_bias, B, P, K: tl.constexpr, SLOPE: tl.constexpr,
        IMAGES: tl.constexpr, PLACES: tl.constexpr
    ):  # fmt: skip
        """For B <= 128, moves 3 B P elements of g, y and dh and K P of dmaps: the minimum. With more images, partial
        sums of dmaps are written and read, 2 K ceil(B / 128) P elements. dbias adds 2 ceil(B / 128) P. dcoef reads
        maps, K P, and adds 2 B K P / PLACES.

        part_maps [batch programs, K, P], part_bias [batch programs, P], part_coef [place programs, B, K]; None where
        the gradient is not wanted. torch.sum adds the parts.
        """
        b = tl.program_id(1) * IMAGES + tl.arange(0, IMAGES)
        p = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
        at, inside = b[:, None].to(tl.int64) * P + p[None, :], (b[:, None] < B) & (p[None, :] < P)
        d = tl.load(g + at, mask=inside, other=0).to(coef.dtype.element_ty)
        # A leaky ReLU keeps signs, so y tells on which side of 0 its argument was. Outside, d is 0 and adds nothing.
        d = tl.where(tl.load(y + at, mask=inside, other=0) > 0, d, d * SLOPE)
        tl.store(dh + at, d.to(dh.dtype.element_ty), mask=inside)
        group = tl.program_id(1).to(tl.int64)
        # Parts rather than atomics: sums in a fixed order give the same bits each time.
        if part_bias is not None:
            tl.store(part_bias + group * P + p, tl.sum(d, 0), mask=p < P)
        for k in tl.static_range(K):
            if part_maps is not None:
                dm = tl.sum(tl.load(coef + b * K + k, mask=b < B, other=0)[:, None] * d, 0)
                tl.store(part_maps + (group * K + k) * P + p, dm.to(part_maps.dtype.element_ty), mask=p < P)
            if part_coef is not None:
                m = tl.load(maps + p, mask=p < P, other=0).to(d.dtype)
                at_coef = (tl.program_id(0).to(tl.int64) * B + b) * K + k
                tl.store(part_coef + at_coef, tl.sum(m[None, :] * d, 1), mask=b < B)
                maps += P  # only dcoef reads maps, so only here


# Every thread moves 16 bytes at once, for a single image as well.


def _forward_tile(B, P, itemsize):
    """IMAGES and PLACES of a forward program of 128 threads, for h [B, P] of elements of itemsize bytes.

    A thread has the same places in all images of the tile: maps then go from memory to where they are needed, without a
    barrier. Fewer images where else there were too few programs for all multiprocessors.
    """
    # 2^23 elements in float32 are 2,048 programs, 15 for each of an H200's 132 multiprocessors.
    return min(triton.next_power_of_2(B), 8 if B * P >= 2**23 else 2), 128 * 16 // itemsize


def _backward_tile(B):
    """The same of a backward program, of one warp. Up to 128 images fit: then no sums of maps leave the registers."""
    # tl.arange takes powers of two only.
    IMAGES = min(triton.next_power_of_2(B), 128)
    # 2048 / 32 threads: 64 elements each. 256: at least 8 each, the 16 bytes of bfloat16.
    return IMAGES, min(max(64, 256 // IMAGES), 2048 // IMAGES)  # at most 64 elements per thread: more would spill


def _triton_forward(h, coef, maps, bias, y, slope):
    B, C, S, K, last = _sizes(h, coef)
    IMAGES, PLACES = _forward_tile(B, C * S, h.itemsize)
    grid = (triton.cdiv(C * S, PLACES) * triton.cdiv(B, IMAGES),)
    even = C * S % PLACES == 0 and B % IMAGES == 0  # whole tiles need no masks
    _forward_kernel[grid](h, coef, maps, bias, y, B, C * S, C, S, K, slope, last, even, IMAGES, PLACES)


def _triton_backward(g, y, coef, maps, dh, dcoef, dmaps, dbias, slope):
    B, C, S, K, last = _sizes(y, coef)
    IMAGES, PLACES = _backward_tile(B)
    grid = (triton.cdiv(C * S, PLACES), triton.cdiv(B, IMAGES))  # the short one second: CUDA ends it at 65,535
    part_coef = coef.new_empty(grid[0], B, K) if dcoef.numel() else None
    # One row of programs has all images, so its sums are the gradient itself.
    part_maps = (dmaps if grid[1] == 1 else coef.new_empty(grid[1], K, C * S)) if dmaps.numel() else None
    part_bias = coef.new_empty(grid[1], C * S) if dbias.numel() else None
    # With one warp the sums over images stay in the registers of a thread, except for one shuffle.
    _backward_kernel[grid](
        g, y, coef, maps, dh, part_coef, part_maps, part_bias, B, C * S, K, slope, IMAGES, PLACES, num_warps=1
    )
    if dcoef.numel():
        torch.sum(part_coef, 0, out=dcoef)
    if dmaps.numel() and grid[1] > 1:
        # The parts are in the order of memory, which in channels_last is [H, W, C].
        shape = (maps.shape[0], *maps.shape[2:], C) if last else maps.shape
        sums = part_maps.sum(0).view(shape)
        dmaps.copy_(sums.permute(0, 3, 1, 2) if last else sums)
    if dbias.numel():
        # A channel's places are a column in channels_last, a row in NCHW.
        torch.sum(part_bias.view(-1, C) if last else part_bias.sum(0).view(C, S), 0 if last else 1, out=dbias)
