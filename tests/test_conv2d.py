"""The convolutions of ops against PyTorch's in float64, to second order; what is chosen or refused; frozen networks."""

import collections
import contextlib
import copy
import importlib
import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import grad, gradcheck, gradgradcheck

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ops import Conv2d, conv2d, conv_transpose2d, freeze, no_weight_gradients, use_conv2d

module = importlib.import_module("ops.conv2d")  # ops.conv2d is the function

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


# A ResNet's first convolution, and maps of few places: what covers a map, or a part of it, and what lies beyond.
@pytest.mark.parametrize(
    ("x", "weight", "stride", "padding"),
    [
        ((2, 3, 8, 6), (16, 3, 7, 7), 2, 3),
        ((2, 5, 2, 2), (4, 5, 3, 3), 1, 1),
        ((2, 5, 2, 2), (4, 5, 3, 3), 2, 1),
        ((2, 5, 1, 4), (4, 5, 3, 3), 1, 2),
        ((2, 5, 2, 1), (4, 5, 1, 1), 1, 0),
        ((2, 5, 1, 1), (4, 5, 3, 3), 1, 1),
    ],
)
def test_first_and_last_layers_of_a_resnet_to_second_order(x, weight, stride, padding):
    called, ours = [], [module._from_image, module._by_places]
    inputs = randn(*x), randn(*weight, seed=1), randn(weight[0], seed=2)

    def f(*tensors):
        with pytest.MonkeyPatch.context() as patch:
            for function in ours:
                patch.setattr(module, function.__name__, lambda *a, g=function: (called.append(g), g(*a))[1])
            return conv2d(*tensors, stride, padding)

    got, want = f(*inputs), F.conv2d(*inputs, stride, padding)
    assert called == [ours[x[1] != 3]]
    torch.testing.assert_close(got, want)
    g = randn(*want.shape, seed=3)
    for a, b in zip(grad(got, inputs, g), grad(want, inputs, g), strict=True):
        torch.testing.assert_close(a, b)
    assert gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("x", "weight", "stride", "padding"),
    [
        ((2, 5, 2, 2), (4, 5, 1, 1), 1, 2),
        ((2, 5, 2, 2), (4, 5, 3, 3), 1, 4),
        ((2, 5, 2, 2), (4, 5, 3, 1), 1, 1),
        ((2, 5, 2, 2), (4, 5, 1, 2), 1, 0),
        ((0, 3, 8, 8), (16, 3, 7, 7), 2, 3),
        ((0, 5, 2, 2), (4, 5, 3, 3), 1, 1),
    ],
)
def test_odd_convolutions_of_small_maps_are_pytorchs(x, weight, stride, padding):
    """Windows that lie on padding alone, kernels that are not square, batches without images."""
    x, weight = randn(*x), randn(*weight, seed=1)
    got, want = conv2d(x, weight, None, stride, padding), F.conv2d(x, weight, None, stride, padding)
    torch.testing.assert_close(got, want)
    for a, b in zip(grad(got.sum(), (x, weight)), grad(want.sum(), (x, weight)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("k", "stride"), KERNELS)
def test_few_pixels_in_bf16_are_matrix_products(transposed, k, stride, monkeypatch):
    """Result and gradients without PyTorch's convolutions, exact but for the rounding of bf16, in channels_last."""
    ours, theirs = pairs(transposed)
    inputs, options = case(transposed, k, stride, 2, 32, 48, 7, 8, 1, torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = theirs(*exact, *options)
    g = randn(*want.shape, seed=9, dtype=torch.bfloat16)
    wanted = [want, *grad(want, exact, g.double())]
    asked = collections.Counter()

    def count(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a: asked.update([name]) or function(*a))

    for owner, name in ((F, "conv2d"), (F, "conv_transpose2d"), (torch.nn.grad, "conv2d_weight")):
        count(owner, name)
    ours(*inputs, *options)
    assert asked  # small weights
    asked.clear()
    monkeypatch.setattr(module, "_LARGE", 0)
    got = ours(*inputs, *options)
    assert not got._is_view()  # else a ReLU could not change it in place
    for a, b in zip([got, *grad(got, inputs, g)], wanted, strict=True):
        assert a.dtype == torch.bfloat16 and (a.ndim == 1 or a.is_contiguous(**LAST))
        torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=2**-7 * float(b.detach().std()))
    assert not asked
    for other in (inputs[0].detach()[:0], inputs[0].detach().contiguous()):  # empty, and of another memory order
        got, want = (conv(other, *inputs[1:], *options) for conv in (ours, theirs))
        assert got.shape == want.shape and got.stride() == want.stride()
    asked.clear()
    many = torch.cat([inputs[0].detach()] * 120).requires_grad_()  # so many that the windows would take longer
    got = ours(many, *inputs[1:], *options)
    grad(got, [many, inputs[1]], torch.ones_like(got))
    assert set(asked) == {"conv2d", "conv_transpose2d", "conv2d_weight"}


def test_weight_gradient_by_windows_is_differentiable(monkeypatch):
    """Its only caller that asks for that is autograd, in float64, which takes the other way."""
    monkeypatch.setattr(module, "_is_few", lambda *a, **o: True)
    x, g, weight = randn(2, 3, 6, 5), randn(2, 4, 3, 3), randn(4, 3, 3, 3)
    gradient = lambda x, g: module._weight_gradient(x, g, weight, 2, 1, "auto")  # noqa: E731
    torch.testing.assert_close(gradient(x, g), torch.nn.grad.conv2d_weight(x, weight.shape, g, stride=2, padding=1))
    assert gradcheck(gradient, (x, g)) and gradgradcheck(gradient, (x, g))


def test_autocast_leaves_float64():
    x, weight = randn(2, 16, 8, 8), randn(16, 16, 3, 3, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv2d(x, weight).dtype == F.conv2d(x, weight).dtype == torch.float64


def test_a_network_that_uses_conv2d_trains_as_before():
    """A ResNet's loss and gradients are PyTorch's but for rounding, its weights keep their names, and a copy has its
    own; what conv2d does not serve stays."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18().double().to(**LAST)
    plain = copy.deepcopy(network)
    use_conv2d(network)
    twin = copy.deepcopy(network)
    assert kinds(network)["Conv2d"] == 20 and all(type(m) is not nn.Conv2d for m in network.modules())
    assert list(network.state_dict()) == list(plain.state_dict())
    x, results = randn(8, 3, 64, 64), []
    for net in (network, plain):
        loss = net(x).square().mean()
        results.append([loss, *grad(loss, list(net.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 * b.abs().max().item())
    with torch.no_grad():
        network.conv1.weight.zero_()
    assert isinstance(twin.conv1, Conv2d) and twin.conv1(x).abs().max() > 0 == network.conv1(x).abs().max()
    others = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, (3, 1)), nn.Conv2d(4, 4, 3, device="meta"))
    use_conv2d(others)
    assert all(type(layer) is nn.Conv2d for layer in others)


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
    x, weight, bias = randn(2, 16, 8, 8), randn(16, 16, 3, 3), randn(16)
    for op in (conv2d, conv_transpose2d):
        with no_weight_gradients():
            inside = grad(op(x, weight, bias, padding=1).sum(), (x, weight, bias), allow_unused=True)
        assert inside[0] is not None and inside[1:] == (None, None)
        assert grad(op(x, weight, padding=1).sum(), weight)[0] is not None
        with pytest.raises(ZeroDivisionError), no_weight_gradients():
            raise ZeroDivisionError
        assert grad(op(x, weight, padding=1).sum(), weight)[0] is not None


# The generator's last layer, and the gradient of a discriminator's first one: 7x7 to the three channels of an image.


def image_case(transposed, sides, dtype=torch.float64):
    x, bias = randn(4, 16, *sides, dtype=dtype), randn(3, seed=1, dtype=dtype)
    return x, randn(*((16, 3) if transposed else (3, 16)), 7, 7, seed=2, dtype=dtype), bias


@pytest.mark.parametrize("transposed", [False, True])
def test_to_images(transposed):
    """In every implementation, for even sides and odd ones, output and gradients; in float32 as in training."""
    ours, theirs = pairs(transposed)
    for impl, sides, dtype in itertools.product(
        ("auto", "ref", "cpp"), ((12, 18), (9, 12)), (torch.float64, torch.float32)
    ):
        inputs = image_case(transposed, sides, dtype)
        if impl == "cpp" and sides[0] % 2:
            with pytest.raises(RuntimeError, match="needs channels_last"):
                ours(*inputs, padding=3, impl=impl)
            continue
        exact = [t.detach().double().requires_grad_() for t in inputs]
        got, want = ours(*inputs, padding=3, impl=impl), theirs(*exact, padding=3)
        g, tolerance = randn(*want.shape, seed=9), 1e-11 if dtype == torch.float64 else 2e-4
        for a, b in zip([got, *grad(got, inputs, g.to(dtype))], [want, *grad(want, exact, g)], strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.double(), b, rtol=0, atol=float(tolerance * b.detach().std()))


@pytest.mark.parametrize("transposed", [False, True])
def test_derivatives_of_both_orders_to_and_from_images(transposed, monkeypatch):
    """On the fast path: by name where C++ serves the op itself, by 'auto' where it serves the gradient."""
    ours, _ = pairs(transposed)
    inputs = image_case(transposed, (16, 16))
    assert gradcheck(lambda *t: ours(*t, padding=3, impl="cpp"), inputs, fast_mode=True)
    assert gradgradcheck(lambda *t: ours(*t, padding=3, impl="cpp"), inputs, fast_mode=True)
    monkeypatch.setattr(module, "_FAST", (torch.float64,))
    runs, run = [], module._run
    monkeypatch.setattr(module, "_run", lambda *arguments: runs.append(arguments) or run(*arguments))
    x, weight = randn(4, 3, 16, 16), randn(*((3, 16) if transposed else (16, 3)), 7, 7, seed=2)
    assert gradcheck(lambda *t: ours(*t, padding=3), (x, weight), fast_mode=True)
    assert gradgradcheck(lambda *t: ours(*t, padding=3), (x, weight), fast_mode=True)
    assert runs, "the fast path did not run"


@pytest.mark.parametrize("transposed", [False, True])
def test_ref_is_pytorchs_own(transposed):
    """Bit for bit, the gradients of both orders too."""
    ours, theirs = pairs(transposed)
    cases = [(image_case(transposed, (12, 18), torch.float32), dict(padding=3))]
    cases += [(case(transposed, 3, 2, 4, 32, 16, 8, 8, 1, torch.float32)[0], dict(stride=2, padding=1))]
    for inputs, options in cases:
        results = []
        for y in (ours(*inputs, **options, impl="ref"), theirs(*inputs, **options)):
            first = grad(y.sin().sum(), inputs, create_graph=True)
            results.append([y, *first, *grad(first[0].square().sum(), inputs)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_other_devices_have_our_derivatives_for_r1_alone():
    """Elsewhere PyTorch's autograd is cheaper to call; for R1 its double backward is what is slow."""
    with FakeTensorMode():
        x, weight = (torch.empty(2, 16, 8, 8, device="cuda", requires_grad=True) for _ in range(2))
        assert type(conv2d(x, weight).grad_fn).__name__ == "ConvolutionBackward0"
        with no_weight_gradients():
            assert type(conv2d(x, weight).grad_fn).__name__ == "_ConvBackward"


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


@pytest.mark.parametrize("impl", ["auto", "cpp"])
@pytest.mark.parametrize("conv", [conv2d, conv_transpose2d])
def test_what_does_not_go_together_is_left_to_pytorch(conv, impl, monkeypatch):
    monkeypatch.setattr(module, "c_function", lambda *a: pytest.fail("C++ would read beyond these"))
    x, weight, bias = (randn(*s, dtype=torch.float32).detach() for s in ((1, 32, 16, 16), (32, 32, 3, 3), (32,)))
    with pytest.raises(pytest.fail.Exception):  # it is asked for what does
        conv(x, weight, bias, padding=1, impl=impl)
    for wrong in (
        (x[:, :16].contiguous(memory_format=torch.channels_last), weight),
        (x, weight, bias[:16]),
        (x, weight, bias.double()),
        (x, weight, bias.to("meta")),
        (x, weight.to("meta")),
    ):
        with contextlib.suppress(RuntimeError):  # nearly all of these
            conv(*wrong, padding=1, impl=impl)


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


# Frozen networks.


def trained(network):
    """Batch norms that change something, as after training."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.track_running_stats:
            layer.running_mean.normal_(std=0.1), layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2), nn.init.normal_(layer.bias, std=0.1)
    return network.double()


def kinds(network):
    """How many layers of each class a network has; 'torch Conv2d' are PyTorch's own convolutions."""
    names = ("torch " * (type(layer) is nn.Conv2d) + type(layer).__name__ for layer in network.modules())
    return collections.Counter(names)


# Whether by the convolutions of float32, or by PyTorch's, as float64 runs; at 72 px the smallest maps have nine pixels.
@pytest.mark.parametrize(
    ("name", "size", "fast"),
    [("resnet18", 32, False), ("resnet18", 72, True), ("resnet34", 32, True), ("resnet50", 32, True)],
)
def test_frozen_resnets_are_the_same_function(name, size, fast, monkeypatch):
    """Output and gradient with respect to the input, in float64 to rounding."""
    monkeypatch.setattr(module, "_FAST", (torch.float64,) * fast)
    network = trained(getattr(torchvision.models, name)())
    if name == "resnet34":
        use_conv2d(network)  # as an encoder in training
    before = {key: value.clone() for key, value in network.state_dict().items()}
    frozen = freeze(network, (3, size, size))
    x = randn(8, 3, size, size)
    got, want = frozen(x), network.eval()(x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())
    got, want = (grad(y.square().sum(), x)[0] for y in (got, want))
    assert (got - want).norm() < 1e-9 * want.norm()
    found = kinds(frozen)
    assert found["Conv2d"] > 1 and found["torch Conv2d"] == found["BatchNorm2d"] == 0
    assert (found["_MapLinear"] > 0) == (size < 72)
    assert type(frozen) is type(network) and frozen.fc.in_features == network.fc.in_features
    assert not any(p.requires_grad for p in frozen.parameters())
    for key, value in network.state_dict().items():  # the network itself is as it was
        assert torch.equal(value, before[key]), key


def test_a_frozen_network_with_groups():
    network = trained(torchvision.models.shufflenet_v2_x0_5())
    x = randn(2, 3, 64, 64)
    torch.testing.assert_close(freeze(network, (3, 64, 64))(x), network.eval()(x), rtol=1e-9, atol=1e-9)


class Shared(nn.Module):
    """Everything that must not be folded or rewritten."""

    def __init__(self):
        super().__init__()
        self.twice, self.read = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3, track_running_stats=i != 1) for i in range(4))
        self.odd = nn.Conv2d(3, 3, (3, 1), padding="same", padding_mode="reflect", dilation=2)

    def forward(self, x):
        h = self.norms[0](self.twice(x)) + self.norms[1](self.twice(F.avg_pool2d(x, 4).repeat(1, 1, 4, 4)))
        read = self.read(h)
        return self.norms[3](self.odd(self.norms[2](read) + read))


def test_a_network_that_shares_layers_is_frozen_right():
    network = trained(Shared())
    frozen, x = freeze(network, (3, 8, 8)), randn(2, 3, 8, 8)
    torch.testing.assert_close(frozen(x), network.eval()(x))
    assert kinds(frozen)["BatchNorm2d"] == 3 and kinds(frozen)["torch Conv2d"] == 1 and kinds(frozen)["Conv2d"] == 2


def test_frozen_for_one_size():
    frozen = freeze(torchvision.models.resnet18(), (3, 64, 64))
    with pytest.raises(ValueError, match=r"another size: a layer got \[2, 512, 3, 3\], not \[512, 2, 2\]"):
        frozen(torch.zeros(2, 3, 96, 96))


def test_frozen_elsewhere_than_on_the_cpu():
    """Folded, in channels_last, and otherwise PyTorch's own convolutions."""
    frozen = freeze(torchvision.models.resnet18().to("meta"), (3, 64, 64))
    found = kinds(frozen)
    assert found["torch Conv2d"] == 20 and found["BatchNorm2d"] == 0
    assert all(c.bias is not None for c in frozen.modules() if isinstance(c, nn.Conv2d))
    assert frozen.layer1[0].conv1.weight.is_contiguous(**LAST)
