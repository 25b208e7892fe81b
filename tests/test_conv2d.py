"""The convolutions of ops against PyTorch's in float64, to second order; what is chosen when; what is refused."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad, gradcheck, gradgradcheck

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ops import conv2d, conv_transpose2d, no_weight_gradients

LAST = dict(memory_format=torch.channels_last)
KERNELS = [(1, 1), (3, 1), (4, 1), (1, 2), (3, 2), (4, 2), (7, 2), (8, 2)]  # size, stride


def randn(*size, seed=0, dtype=torch.float64):
    t = torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return (t.contiguous(**LAST) if t.ndim == 4 else t).requires_grad_()


def pairs(transposed):
    return (conv_transpose2d, F.conv_transpose2d) if transposed else (conv2d, F.conv2d)


def case(transposed, k, stride, B, C, N, H, W, seed, dtype=torch.float64):
    """x, weight, bias and the arguments after them, for one of the two ops."""
    padding = seed % 3 if k > 1 else 0
    x, bias = randn(B, C, H, W, seed=seed, dtype=dtype), randn(N, seed=seed + 1, dtype=dtype)
    weight = randn(*((C, N) if transposed else (N, C)), k, k, seed=seed + 2, dtype=dtype)
    return (x, weight, bias), (stride, padding, seed % stride) if transposed else (stride, padding)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("k", "stride"), KERNELS)
def test_cpp_matches_torch_over_random_shapes(transposed, k, stride):
    """Output and gradients, in float64 to 1e-11 and in float32 to 2e-4 of their standard deviation: with few tiles and
    many channels, and the other way round, which go different ways; more than fit a vector; odd sides."""
    ours, theirs = pairs(transposed)
    make = torch.Generator().manual_seed(k * stride)
    shapes = [(3, 128, 144, 8, 9), (2, 16, 16, 33, 21)]
    shapes += [
        tuple(int(torch.randint(lo, hi, (), generator=make)) for lo, hi in ((1, 9), (1, 5), (1, 5), (8, 19), (8, 19)))
    ]
    shapes[2] = shapes[2][0], 16 * shapes[2][1], 16 * shapes[2][2], *shapes[2][3:]
    for seed, shape in enumerate(shapes):
        inputs, options = case(transposed, k, stride, *shape, seed)
        want = theirs(*inputs, *options)
        g = randn(*want.shape, seed=9)
        wanted = [want, *grad(want, inputs, g)]
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-4)):
            leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
            got = ours(*leaves, *options, impl="cpp")
            assert got.dtype == dtype and got.is_contiguous(**LAST)
            for a, b in zip([got, *grad(got, leaves, g.to(dtype))], wanted, strict=True):
                assert a.shape == b.shape
                torch.testing.assert_close(a.double(), b, rtol=0, atol=float(tolerance * b.detach().std()))


@pytest.mark.parametrize(
    ("transposed", "k", "stride"), [(t, *ks) for t, ks in itertools.product((False, True), KERNELS[1:6])]
)
def test_derivatives_of_both_orders(transposed, k, stride):
    ours, _ = pairs(transposed)
    inputs, options = case(transposed, k, stride, 2, 16, 16, 6, 5, seed=1)

    def f(x, weight, bias):
        return ours(x, weight, bias, *options, impl="cpp")

    assert gradcheck(f, inputs, fast_mode=True)
    assert gradgradcheck(f, inputs, fast_mode=True)


# inputs, outputs, kernel, stride, padding
@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 1, 3), (4, 6, 3, 2, 1), (2, 3, 4, 2, 1), (3, 2, 4, 1, 1), (16, 16, 3, 2, 1)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_equal_torchs_to_second_order(shape, transposed):
    inputs, outputs, k, *options = shape
    ours, theirs = pairs(transposed)
    weight = randn(*((inputs, outputs) if transposed else (outputs, inputs)), k, k, seed=1)
    for sides in ((8, 8), (10, 7)):
        x, results = randn(2, inputs, *sides), []
        for f in (ours, theirs):
            y = f(x, weight, None, *options)
            g = grad(y.square().sum(), (x, weight), create_graph=True)
            results.append((y, *g, *grad(g[0].square().sum() + g[1].sum(), (x, weight))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["auto", "ref", "cpp"])
def test_r1_through_two_layers(impl):
    """The gradient of a gradient's norm by the weights, as R1 takes it, against torch's own double backward."""
    x = randn(8, 16, 16, 16)
    weights = [randn(32, 16, 3, 3, seed=1), randn(16, 32, 4, 4, seed=2)]

    def penalty(convolve, context):
        h = torch.tanh(convolve(x, weights[0], None, 2, 1))
        with context:
            (g,) = grad(convolve(h, weights[1], None, 1, 1).square().sum(), x, create_graph=True)
        return grad(g.square().sum(), weights)

    def with_impl(*arguments):
        return conv2d(*arguments, impl=impl)

    for a, b in zip(penalty(with_impl, no_weight_gradients()), penalty(F.conv2d, torch.enable_grad()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())


def test_no_weight_gradients_leaves_them_out_within_only():
    x, weight = randn(2, 16, 8, 8), randn(16, 16, 3, 3)
    for op in (conv2d, conv_transpose2d):
        with no_weight_gradients():
            inside = grad(op(x, weight, padding=1).sum(), (x, weight), allow_unused=True)
        assert inside[0] is not None and inside[1] is None
        assert grad(op(x, weight, padding=1).sum(), weight)[0] is not None
        with pytest.raises(ZeroDivisionError), no_weight_gradients():
            raise ZeroDivisionError
        assert grad(op(x, weight, padding=1).sum(), weight)[0] is not None


def test_convolution_to_images():
    """Three channels from a 7x7 kernel, in both implementations, with even sides and odd ones."""
    for impl, sides in itertools.product(("auto", "ref"), ((12, 18), (9, 12))):
        inputs, _ = case(True, 7, 1, 4, 16, 3, *sides, seed=0)
        got = conv_transpose2d(*inputs, padding=3, impl=impl)
        want = F.conv_transpose2d(*inputs, padding=3)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
        for a, b in zip(grad(got.square().sum(), inputs), grad(want.square().sum(), inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * b.abs().max().item())


def test_auto_takes_the_faster_one():
    """C++ where it saves work; where it does not, or cannot run, PyTorch's own result bit for bit."""
    x, weight = randn(8, 32, 16, 16, dtype=torch.float32), randn(32, 32, 3, 3, dtype=torch.float32)
    fused, usual = conv2d(x, weight, padding=1), F.conv2d(x, weight, padding=1)
    assert torch.equal(fused, conv2d(x, weight, padding=1, impl="cpp")) and not torch.equal(fused, usual)
    assert torch.equal(conv2d(x, weight, padding=1, impl="ref"), usual)
    for h, w in (
        (x[:, :, :2, :2].contiguous(**LAST), weight),  # four pixels of a tile of sixteen
        (x.contiguous(), weight),  # NCHW
        (x[:, :20].contiguous(**LAST), weight[:, :20]),  # channels that do not fill vectors
        (x.bfloat16(), weight.bfloat16()),
        (x.double(), weight.double()),
        (x[:0], weight),
    ):
        assert torch.equal(conv2d(h, w, padding=1), F.conv2d(h, w, padding=1))


def test_what_is_refused():
    x, weight = randn(2, 16, 8, 8), randn(16, 16, 5, 5)
    with pytest.raises(ValueError, match="auto, ref or cpp for a convolution, got 'triton'"):
        conv2d(x, weight, impl="triton")
    with pytest.raises(RuntimeError, match=r"kernel that it knows, .* weight \[16, 16, 5, 5\] at stride 1"):
        conv2d(x, weight, impl="cpp")
    with pytest.raises(RuntimeError, match="needs channels_last"):
        conv_transpose2d(x.contiguous(), weight[:, :, :3, :3], impl="cpp")


def test_same_bits_again_and_right_on_any_number_of_threads():
    inputs, options = case(False, 3, 1, 4, 64, 96, 12, 12, seed=1, dtype=torch.float32)
    threads = torch.get_num_threads()

    def run(n):
        torch.set_num_threads(n)
        y = conv2d(*inputs, *options, impl="cpp")
        return [y, *grad(y.square().sum(), inputs)]

    try:
        one, two, three = run(1), run(2), run(3)
        for a, b in zip(two, run(2), strict=True):
            assert torch.equal(a, b)
        for a, b, c in zip(one, two, three, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * a.abs().max().item())
            torch.testing.assert_close(a, c, rtol=0, atol=1e-5 * a.abs().max().item())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("transposed", [False, True])
def test_autocast_and_compile(transposed):
    ours, theirs = pairs(transposed)
    inputs, options = case(transposed, 3, 2, 4, 32, 16, 8, 8, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(*inputs, *options), theirs(*inputs, *options)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for a, b in zip(grad(got.float().sum(), inputs), grad(want.float().sum(), inputs), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=2**-7 * b.abs().max().item())
    compiled = torch.compile(lambda *a: ours(*a, *options).square().sum(), backend="aot_eager", fullgraph=True)
    for a, b in zip(
        grad(compiled(*inputs), inputs), grad(theirs(*inputs, *options).square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())
