"""The fused ops against float64, to second order, in every implementation; the C++ build; what Triton compiles to.

Without a CUDA device the Triton kernels run under Triton's interpreter, in a second pytest process of this same file:
the interpreter has to be chosen before the ops are imported.
"""

import json
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.autograd import grad, gradcheck, gradgradcheck

import ops.build
from ops import bias_lrelu, subspace_lrelu

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
IMPLS = ["ref"] + ["triton"] * (CUDA or ops.build.INTERPRET) + ["cpp"] * (not CUDA)
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# A rounding of the output (half a unit in the last place of each dtype), and of sums computed in fp32.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = list(TOLERANCE)

impls = pytest.mark.parametrize("impl", IMPLS)
formats = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)


def tensors(B, C, H, W, K, dtype=torch.float64, memory_format=torch.contiguous_format, seed=0, parameters=None):
    """h, coef, maps, bias with gradients; h and maps in dtype, coef and bias in the dtype of the parameters."""
    make = torch.Generator().manual_seed(seed)

    def randn(*size, dtype):
        t = torch.randn(*size, generator=make, dtype=torch.float64).to(DEVICE, dtype)
        return (t.to(memory_format=memory_format) if t.ndim == 4 else t).requires_grad_()

    parameters = parameters or dtype
    return (
        randn(B, C, H, W, dtype=dtype),
        randn(B, K, dtype=parameters),
        randn(K, C, H, W, dtype=dtype),
        randn(C, dtype=parameters),
    )


def plain_bias(x, bias):
    return F.leaky_relu(x + bias.view(1, -1, *[1] * (x.ndim - 2)), 0.2)


def plain_subspace(h, coef, maps, bias):
    return F.leaky_relu(h + torch.einsum("bk,kchw->bchw", coef, maps) + bias.view(1, -1, 1, 1), 0.2)


def check(op, plain, inputs, impl, dtype):
    """Output and gradients against the plain formula in float64."""
    y = op(*inputs, impl=impl)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    z = plain(*exact)
    assert y.dtype == dtype and y.shape == z.shape
    assert y.ndim == 2 or [y.is_contiguous(memory_format=f) for f in FORMATS.values()] == [
        inputs[0].is_contiguous(memory_format=f) for f in FORMATS.values()
    ]
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(DEVICE, dtype)
    got, want = [y, *grad(y, inputs, g)], [z, *grad(z, exact, g.double())]
    for a, b, t in zip(got, want, [y, *inputs], strict=True):
        assert a.dtype == t.dtype and a.shape == t.shape
        scale = b.detach().abs().max()
        torch.testing.assert_close(a.double(), b, rtol=0, atol=4 * float(TOLERANCE[dtype] * scale))


@impls
@formats
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_over_random_shapes(impl, memory_format, dtype):
    make = torch.Generator().manual_seed(DTYPES.index(dtype))
    for i in range(4 if impl == "triton" and not CUDA else 12):
        B, C, H, W, K = (int(torch.randint(1, n, (), generator=make)) for n in (41, 20, 9, 9, 10))
        h, coef, maps, bias = tensors(B, C, H, W, K, dtype, memory_format, i, parameters=ops.build.acc_dtype(dtype))
        check(bias_lrelu, plain_bias, (h, bias), impl, dtype)
        check(subspace_lrelu, plain_subspace, (h, coef, maps, bias), impl, dtype)
    check(bias_lrelu, plain_bias, (h.detach()[:, :, 0, 0].requires_grad_(), bias), impl, dtype)


@pytest.mark.skipif(CUDA or ops.build.triton is None, reason="Triton runs here")
def test_triton_that_cannot_start_falls_back(monkeypatch):
    """No driver here; elsewhere it may be a C compiler that is missing."""
    monkeypatch.setattr(ops.build, "INTERPRET", False)
    ops.build._why_not.cache_clear()
    try:
        with pytest.warns(UserWarning, match="fall back to the PyTorch reference on cuda: Triton cannot start: "):
            assert ops.build.choose("auto", "cuda") == "ref"
        with pytest.raises(RuntimeError, match="cannot run on cuda tensors: Triton cannot start"):
            ops.build.choose("triton", "cuda")
    finally:
        ops.build._why_not.cache_clear()


@pytest.mark.skipif("cpp" not in IMPLS, reason="no C++ op here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cpp_converts_like_torch(dtype):
    """Every value of the type widened, and floats of every kind rounded, bit for bit. Only float32's subnormals
    stay out: training has the processor flush them, on some threads of this process if a test before trained."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[None]
    every = torch.where(every.float().abs() < 2**-126, 0, every)  # bfloat16's subnormals are float32's
    widened = bias_lrelu(every, torch.zeros(2**16), 1.0, impl="cpp")  # slope 1, bias 0: y = x
    torch.testing.assert_close(widened, every, rtol=0, atol=0, equal_nan=True)
    make = torch.Generator().manual_seed(0)
    floats = torch.randint(-(2**31), 2**31, (2**18,), generator=make).to(torch.int32).view(torch.float32)
    between = every[0].float() * torch.tensor([[1 + 2**-9], [1 + 2**-12], [1 - 2**-12]])  # halfway, or nearly
    floats = torch.cat((floats, between.flatten(), torch.tensor([65519.0, 65520, 65536, 2**-25, 1.0001 * 2**-25])))
    floats = torch.where(floats.abs() < 2**-126, 0, floats)
    rounded = bias_lrelu(torch.zeros(1, len(floats), dtype=dtype), floats, 1.0, impl="cpp")[0]
    torch.testing.assert_close(rounded, floats.to(dtype), rtol=0, atol=0, equal_nan=True)


@impls
@pytest.mark.parametrize("shape", [(40, 8, 5, 5, 7), (2, 600, 2, 3, 2), (1, 2, 36, 36, 8), (130, 3, 3, 3, 2)])
@formats
def test_matches_float64_where_tiles_repeat(impl, memory_format, shape):
    inputs = tensors(*shape, torch.float32, memory_format)
    check(bias_lrelu, plain_bias, (inputs[0], inputs[3]), impl, torch.float32)
    check(subspace_lrelu, plain_subspace, inputs, impl, torch.float32)


@pytest.mark.skipif("triton" not in IMPLS, reason="needs a GPU or Triton's interpreter")
@pytest.mark.parametrize("B", [16, 19])
@formats
def test_large_tensors_of_triton(monkeypatch, memory_format, B):
    """They take tiles of more images, without masks where the tiles fit."""
    module, tiles = sys.modules["ops.subspace_lrelu"], []
    monkeypatch.setattr(module, "_forward_tile", lambda *sizes: tiles.append(sizes) or (8, 256))
    inputs = tensors(B, 8, 8, 8, 7, torch.float32, memory_format)
    check(subspace_lrelu, plain_subspace, inputs, "triton", torch.float32)
    assert (B, 512, 4) in tiles


@impls
@formats
def test_first_and_second_order_gradients(impl, memory_format):
    fast = (
        impl == "triton" and not CUDA
    )  # projections of the Jacobians in place of all their entries: the interpreter is slow
    h, coef, maps, bias = tensors(2, 3, 2, 3, 4, memory_format=memory_format)
    for inputs, op in (((h, bias), bias_lrelu), ((h, coef, maps, bias), subspace_lrelu)):

        def function(*t, op=op):
            return op(*t, impl=impl)

        assert gradcheck(function, inputs, fast_mode=fast)
        assert gradgradcheck(function, inputs, fast_mode=fast)


@impls
@formats
def test_second_order_is_exact_in_float64(impl, memory_format):
    """gradgradcheck allows more than the rounding of the slope to float32 makes."""
    inputs = tensors(2, 3, 2, 3, 4, memory_format=memory_format)
    results = []
    for function in (lambda *t: subspace_lrelu(*t, slope=0.1, impl=impl), lambda *t: subspace_lrelu(*t, 0.1, "ref")):
        first = grad(function(*inputs).pow(2).sum(), inputs, create_graph=True)
        results.append(grad(sum(d.pow(2).sum() for d in first), inputs))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@impls
def test_third_order_gradients_of_bias_lrelu(impl):
    h, _, _, bias = tensors(2, 3, 2, 2, 1)

    def first(x, b):
        return grad(bias_lrelu(x, b, impl=impl).pow(3).sum(), (x, b), create_graph=True)

    assert gradgradcheck(first, (h, bias), fast_mode=True)


@impls
def test_a_penalty_ends_at_the_activation(impl):
    """With R1 of a score linear in y no gradient reaches what the activation takes, and its bias gets zeros."""
    x, w, bias = (
        torch.randn(*s, dtype=torch.float64, device=DEVICE, requires_grad=True) for s in ((8, 3), (3, 5), (5,))
    )
    h = x @ w
    reached = []
    h.register_hook(reached.append)
    r1 = grad(bias_lrelu(h, bias, impl=impl).sum(), x, create_graph=True)[0].square().sum()
    reached.clear()
    r1.backward()
    assert w.grad.abs().min() > 0 and torch.equal(bias.grad, torch.zeros_like(bias))
    assert impl == "ref" or not reached


@impls
@formats
def test_gradient_penalty_in_a_network(impl, memory_format):
    """R1 through two layers: the penalty and its gradient in the weights are those of plain PyTorch."""
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64, device=DEVICE).to(memory_format=memory_format).requires_grad_()
    w1, w2 = (torch.randn(5, c, 3, 3, dtype=torch.float64, device=DEVICE, requires_grad=True) for c in (3, 5))
    b1, b2 = (torch.randn(5, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2))

    def penalty(act):
        y = act(F.conv2d(act(F.conv2d(x, w1), b1), w2), b2).square().sum()
        r1 = grad(y, x, create_graph=True)[0].square().sum()
        return [r1, *grad(r1, (w1, b1, w2, b2))]

    for a, b in zip(penalty(lambda v, b: bias_lrelu(v, b, impl=impl)), penalty(plain_bias), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-9)


@impls
def test_gradient_at_zero_and_slope(impl):
    x = torch.tensor([[0.0, -1.0, 2.0]], device=DEVICE, requires_grad=True)
    zero = torch.zeros(3, device=DEVICE)
    for slope in (0.0, 0.2, 1.0):
        y = bias_lrelu(x, zero, slope, impl)
        z = F.leaky_relu(x, slope)
        assert torch.equal(y, z) and torch.equal(grad(y.sum(), x)[0], grad(z.sum(), x)[0])


@impls
def test_only_wanted_gradients(impl):
    h, coef, maps, bias = tensors(3, 4, 2, 2, 7)
    every = grad(subspace_lrelu(h, coef, maps, bias, impl=impl).sin().sum(), (h, coef, maps, bias))
    for i in range(4):
        inputs = [t if i == j else t.detach() for j, t in enumerate((h, coef, maps, bias))]
        (one,) = grad(subspace_lrelu(*inputs, impl=impl).sin().sum(), inputs[i])
        torch.testing.assert_close(one, every[i], rtol=1e-12, atol=1e-12)


@impls
@formats
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (9, 50, 61, 40), (2, 1500, 17, 23)])
def test_in_place_and_large_results(impl, memory_format, shape):
    """Over the input's memory or not, and from 2 MiB on, where C++ passes the cache by: the same numbers."""
    if ops.build.INTERPRET and shape[0] != 3:
        pytest.skip("minutes under the interpreter, and nothing of Triton's depends on size")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
        h, coef, maps, bias = tensors(*shape, 7, dtype, memory_format, parameters=torch.float32)
        cases = (bias_lrelu, plain_bias, (h, bias)), (subspace_lrelu, plain_subspace, (h, coef, maps, bias))
        for op, plain, inputs in cases:
            z = plain(*(t.double() for t in inputs))
            g = torch.randn_like(h)
            expected = z, *grad(z, inputs, g.double())
            for inplace in (False, True):
                x = h.clone() if inplace else h  # clone: no leaf
                y = op(x, *inputs[1:], impl=impl, inplace=inplace)
                assert (y.data_ptr() == x.data_ptr()) == (inplace and impl != "ref")
                for t, e in zip((y, *grad(y, inputs, g)), expected, strict=True):
                    torch.testing.assert_close(t.double(), e.double(), rtol=0, atol=tolerance * e.abs().max().item())


@impls
@formats
def test_empty_and_strided(impl, memory_format):
    h, coef, maps, bias = tensors(0, 3, 2, 2, 7, memory_format=memory_format)
    for y, inputs in (
        (bias_lrelu(h, bias, impl=impl), (h, bias)),
        (subspace_lrelu(h, coef, maps, bias, impl=impl), (h, coef, maps, bias)),
    ):
        assert y.shape == h.shape
        for d, t in zip(grad(y.sum(), inputs), inputs, strict=True):
            assert d.shape == t.shape and not d.any()
    for shape in ((2, 3, 0, 4, 5), (2, 0, 4, 4, 5)):  # maps without elements
        inputs = tensors(*shape, memory_format=memory_format)
        y = subspace_lrelu(*inputs, impl=impl)
        first = grad(y.sum(), inputs, create_graph=True)
        assert y.shape == inputs[0].shape and [d.shape for d in first] == [t.shape for t in inputs]
    h, coef, maps, bias = tensors(4, 6, 5, 5, 7, memory_format=memory_format)
    cut = (
        h[::2, 1:4, 1:, ::2],
        coef[::2],
        maps[:, 1:4, 1:, ::2].transpose(2, 3).contiguous().transpose(2, 3),
        bias[::2],
    )
    for y, z in (
        (bias_lrelu(cut[0], cut[3], impl=impl), plain_bias(cut[0], cut[3])),
        (subspace_lrelu(*cut, impl=impl), plain_subspace(*cut)),
    ):
        torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
        # sum() hands back a gradient with no strides of its own
        for a, b in zip(grad(y.sum(), (h, bias)), grad(z.sum(), (h, bias)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(CUDA, reason="about CPU threads")
@formats
def test_same_bits_for_any_number_of_threads(memory_format):
    h, coef, maps, bias = tensors(16, 24, 17, 17, 7, torch.float32, memory_format)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            y, z = bias_lrelu(h, bias, impl="cpp"), subspace_lrelu(h, coef, maps, bias, impl="cpp")
            results.append([y, z, *grad(y.sin().sum(), (h, bias)), *grad(z.sin().sum(), (h, coef, maps, bias))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@impls
@formats
def test_autocast_and_mixed_dtypes(impl, memory_format):
    h, coef, maps, bias = tensors(4, 6, 3, 3, 7, torch.float32, memory_format)
    half = h.detach().bfloat16().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        for y, inputs in (
            (bias_lrelu(half, bias, impl=impl), (half, bias)),
            (subspace_lrelu(half, coef, maps, bias, impl=impl), (half, coef, maps, bias)),
        ):
            assert y.dtype == torch.bfloat16
            assert [d.dtype for d in grad(y.float().sum(), inputs)] == [t.dtype for t in inputs]
        # Activations in float32 are not rounded on the way.
        exact = plain_subspace(*(t.double() for t in (h, coef, maps, bias)))
        torch.testing.assert_close(subspace_lrelu(h, coef, maps, bias, impl=impl).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["ref", "triton" if CUDA else "cpp"])
@formats
def test_compiles_without_a_graph_break(impl, memory_format):
    inputs = tensors(4, 6, 4, 4, 7, torch.float32, memory_format)

    def function(h, coef, maps, bias):
        return bias_lrelu(subspace_lrelu(h * 1.5, coef, maps, bias, impl=impl), bias, impl=impl) * 2

    torch._dynamo.reset()
    # All but Inductor's own code, which takes half a minute of a CPU; what it relies on is the next test.
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if impl == "triton" else "aot_eager")
    y, z = compiled(*inputs), function(*inputs)
    assert y.stride() == z.stride()
    for a, b in zip([y, *grad(y.square().sum(), inputs)], [z, *grad(z.square().sum(), inputs)], strict=True):
        torch.testing.assert_close(a, b)


@formats
def test_compilers_are_told_the_shapes_and_formats_of_the_results(memory_format):
    impl, fused = "triton" if CUDA else "cpp", torch.ops.infoscc
    h, coef, maps, bias = (t.detach() for t in tensors(4, 6, 4, 4, 7, torch.float32, memory_format))
    y, signs = fused.bias_lrelu(h, bias, 0.2, impl, True)
    positive = signs if impl == "cpp" else y
    for operator, arguments in (
        *((fused.bias_lrelu, (h, bias, 0.2, impl, keep)) for keep in (True, False)),
        *((fused.subspace_lrelu, (h, coef, maps, bias, 0.2, impl, keep)) for keep in (True, False)),
        *((fused.bias_lrelu_masked, (h, positive, None, reduce, 0.2, impl)) for reduce in (True, False)),
        (fused.bias_lrelu_masked, (h, positive, bias, False, 0.2, impl)),
        *((fused.subspace_lrelu_backward, (h, positive, coef, maps, *wanted, 0.2, impl))
          for wanted in ((True, True, True), (False, True, False))),
    ):  # fmt: skip
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_arguments_are_checked():
    h, coef, maps, bias = tensors(2, 3, 2, 2, 4)
    for wrong in (
        lambda: bias_lrelu(h[0], bias),
        lambda: bias_lrelu(h, bias[:2]),
        lambda: bias_lrelu(h, bias, slope=-0.1),
        lambda: bias_lrelu(h, bias, impl="cuda"),
        lambda: bias_lrelu(h, bias.detach().to("meta")),  # on another device: its pointer would be read here
        lambda: subspace_lrelu(h, coef.detach().to("meta"), maps, bias),
        lambda: subspace_lrelu(h, coef, maps.detach().to("meta"), bias),
        lambda: subspace_lrelu(h, coef, maps, bias.detach().to("meta")),
        lambda: subspace_lrelu(h, coef[:1], maps, bias),
        lambda: subspace_lrelu(h, coef, maps[:3], bias),
        lambda: subspace_lrelu(h, coef, maps, bias[:1]),
    ):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(TypeError):
        bias_lrelu(h.detach().long(), bias)
    with pytest.raises(RuntimeError, match="C\\+\\+ ops need CPU tensors"):
        bias_lrelu(h.detach().to("meta"), bias.detach().to("meta"), impl="cpp")
    if not CUDA and not ops.build.INTERPRET:
        with pytest.raises(RuntimeError, match="CUDA"):
            bias_lrelu(h, bias, impl="triton")


def test_auto_takes_the_fused_op():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.build.choose("auto", DEVICE) == ("triton" if CUDA else "cpp")


# How it is built. Each of these runs in new processes, from a copy, with its own empty cache.

USE = """
import sys, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from ops.bias_lrelu import bias_lrelu
    x, b = torch.randn(3, 5, 4, 4), torch.randn(5)
    y, z = bias_lrelu(x, b), bias_lrelu(x, b)
assert torch.allclose(y, torch.nn.functional.leaky_relu(x + b.view(-1, 1, 1), 0.2))
try:
    bias_lrelu(x, b, impl="cpp")
    print("cpp runs")
except RuntimeError as e:
    print("cpp raises:", e)
print("warnings:", [str(w.message) for w in caught if "fused" in str(w.message)])
"""


def process(folder, path=None, **env):
    keep = {k: v for k, v in os.environ.items() if k not in ("CXX", "TRITON_INTERPRET", "PYTHONPATH")}
    keep |= {"TORCH_EXTENSIONS_DIR": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **env}
    if path is not None:
        keep["PATH"] = str(path)
    return subprocess.Popen(
        [sys.executable, "-c", USE], cwd=folder, env=keep, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def copy_one_op(folder):
    (folder / "ops").mkdir()
    for name in ("build.py", "half.h", "vector.h", "lrelu.h", "bias_lrelu.py", "bias_lrelu.cpp"):
        shutil.copy(ROOT / "ops" / name, folder / "ops")


def test_copied_alone_without_a_compiler(tmp_path):
    shutil.copytree(ROOT / "ops", tmp_path / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "bin").mkdir()
    out, err = process(tmp_path, tmp_path / "bin").communicate(timeout=300)
    assert "cpp raises:" in out and "no C++ compiler" in out, out + err
    assert out.count("no C++ compiler") == 2 and out.count("fall back") == 1, out + err  # one error, one warning


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.long
def test_one_op_copied_alone_builds_after_a_killed_build_and_in_several_processes(tmp_path):
    copy_one_op(tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in ("c++", "as", "ld"):  # and no ninja: it is found beside the interpreter
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    killed = process(tmp_path, tmp_path / "bin")
    while not list(tmp_path.glob("cache/*/build_*/*.ninja")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not list(tmp_path.glob("cache/*/*.so"))
    together = [process(tmp_path, tmp_path / "bin") for _ in range(2)]
    results = [p.communicate(timeout=300) for p in together]
    assert all("cpp runs\nwarnings: []" in out for out, _ in results), results
    assert sum(err.count("Compiling") for _, err in results) == 1, results
    assert len(list(tmp_path.glob("cache/*/*.so"))) == 1


def test_a_failed_compilation_gives_its_reason(tmp_path):
    copy_one_op(tmp_path)
    (tmp_path / "ops" / "bias_lrelu.cpp").write_text("this is not C++\n")
    out, err = process(tmp_path).communicate(timeout=300)
    assert "cpp raises:" in out and "compilation of the C++ ops failed" in out and out.count("fall back") == 1, (
        out + err
    )


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An empty temporary folder of the system's, and no folder named for extensions."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "tmp"


def no_home(monkeypatch, tmp_path):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def home_is_a_file(monkeypatch, tmp_path):
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def named_folder_is_a_file(monkeypatch, tmp_path):
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "home" / "extensions"))


@pytest.mark.parametrize("trouble", [no_home, home_is_a_file, named_folder_is_a_file])
def test_where_home_cannot_be_written_a_private_temporary_folder_serves(
    trouble, temporary, tmp_path, monkeypatch, capsys
):
    trouble(monkeypatch, tmp_path)
    folder = Path(ops.build._writable_folder())
    assert folder.parent == temporary and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert f"cannot be written ({'no home' if trouble is no_home else 'Not a dir'}" in capsys.readouterr().err
    assert ops.build._writable_folder() == str(folder)  # the next process finds the same
    for spoil in (lambda: folder.chmod(0o755), lambda: replace_by_link(folder), lambda: replace_by_file(folder)):
        spoil()
        with pytest.raises(RuntimeError, match="no private folder of this user: remove it, or set TORCH_EXTENSIONS"):
            ops.build._writable_folder()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert ops.build._writable_folder() == str(tmp_path / "extensions" / "infoscc_ops")


def test_a_private_folder_of_another_user_is_refused(temporary, tmp_path, monkeypatch):
    home_is_a_file(monkeypatch, tmp_path)
    Path(ops.build._writable_folder())
    owner = os.getuid()
    (temporary / f"infoscc_ops_{owner}").rename(temporary / f"infoscc_ops_{owner + 1}")
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(RuntimeError, match="no private folder of this user"):
        ops.build._writable_folder()


def replace_by_link(folder):
    folder.rename(folder.with_suffix(".other"))
    folder.symlink_to(folder.with_suffix(".other"))


def replace_by_file(folder):
    folder.unlink()
    folder.write_text("")


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_builds_where_home_cannot_be_written(tmp_path):
    """The fast op, not the reference, and one line that says where; the second process builds nothing."""
    copy_one_op(tmp_path)
    build = tmp_path / "ops" / "build.py"
    build.write_text(build.read_text().replace('"-O3"', '"-O0"'))  # compiled in less time, and not timed
    (tmp_path / "home").write_text("")
    (tmp_path / "tmp").mkdir()
    env = dict(HOME=str(tmp_path / "home"), TORCH_EXTENSIONS_DIR="", XDG_CACHE_HOME="", TMPDIR=str(tmp_path / "tmp"))
    for compiled in (1, 0):
        out, err = process(tmp_path, **env).communicate(timeout=300)
        assert "cpp runs\nwarnings: []" in out and err.count("cannot be written (Not a directory): using") == 1, (
            out + err
        )
        assert err.count("Compiling") == compiled
    (folder,) = (tmp_path / "tmp").glob("infoscc_ops_*")
    assert len(list(folder.glob("*.so"))) == 1


def test_a_library_in_a_read_only_folder_is_taken(temporary, tmp_path, monkeypatch):
    """As where an administrator built it."""
    built = Path(ops.build.library()._name)
    path = tmp_path / "extensions" / "infoscc_ops" / built.name
    path.parent.mkdir(parents=True)
    shutil.copy(built, path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(ops.build, "_writable_folder", lambda: pytest.fail("it looked for another folder"))
    assert ops.build.library.__wrapped__()._name == str(path)


def test_key_follows_source_processor_and_version(tmp_path, monkeypatch):
    source = tmp_path / "a.cpp"
    source.write_text("int a;")
    keys = [ops.build._key([str(source)])]
    monkeypatch.setattr(ops.build, "_cpu", lambda: "flags: another processor")
    keys.append(ops.build._key([str(source)]))
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.append(ops.build._key([str(source)]))
    source.write_text("int b;")
    keys.append(ops.build._key([str(source)]))
    (tmp_path / "a.h").write_text("int c;")
    keys.append(ops.build._key([str(source)]))
    assert len(set(keys)) == 5


# Triton without a GPU.

needs_triton = pytest.mark.skipif(ops.build.triton is None, reason="needs Triton")


@needs_triton
@pytest.mark.skipif(CUDA or ops.build.INTERPRET, reason="the Triton tests run in this process")
@pytest.mark.long
def test_triton_under_its_interpreter():
    pytest_quietly = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*pytest_quietly, __file__, str(ROOT / "tests" / "test_tsne.py"), "-k", "triton and not test_triton"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "passed" in run.stdout, run.stdout[-3000:] + run.stderr[-1000:]


AHEAD = """
import contextlib, io, json, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import ops
bias, subspace, tsne = (sys.modules[f"ops.{name}"] for name in ("bias_lrelu", "subspace_lrelu", "tsne"))
tile = {"SLOPE": 0.2, "ROWS": 64, "COLS": 16, "LAST": True}
wide = {"SLOPE": 0.2, "ROWS": 2, "COLS": 512, "LAST": True}
flat = {"SLOPE": 0.2, "ROWS": 1, "COLS": 1024, "LAST": False}
sums = {"bias": None, "ACC": tl.float32}
mix = {"K": 7, "SLOPE": 0.2}
to_maps = mix | {"part_coef": None}
backward = {B: dict(zip(("IMAGES", "PLACES"), subspace._backward_tile(B))) for B in (1, 32, 64, 128)}
cases = {  # kernel, warps, constants, how many large tensors are read and written
    "bias forward, 16 channels": (bias._forward_kernel, 4, tile, 1, 1),
    "bias forward, 512 channels": (bias._forward_kernel, 4, wide, 1, 1),
    "bias backward, 16 channels": (bias._masked_kernel, 4, tile | sums, 2, 1),
    "bias backward, 512 channels": (bias._masked_kernel, 4, wide | sums, 2, 1),
    "bias backward, NCHW": (bias._masked_kernel, 4, flat | sums, 2, 1),
    "bias double backward": (bias._masked_kernel, 4, wide | {"part": None, "ACC": tl.float32}, 2, 1),
    "subspace forward, batch 1": (subspace._forward_kernel, 4, mix | {"LAST": True, "EVEN": False}, 1, 1),
    "subspace forward, batch 32": (subspace._forward_kernel, 4, mix | {"LAST": True, "EVEN": True}, 1, 1),
    "subspace forward, batch 33": (subspace._forward_kernel, 4, mix | {"LAST": True, "EVEN": False}, 1, 1),
    "subspace backward, batch 32": (subspace._backward_kernel, 1, to_maps | backward[32], 2, 1),
    "subspace backward, batch 64": (subspace._backward_kernel, 1, to_maps | backward[64], 2, 1),
    "subspace backward to all, batch 1": (subspace._backward_kernel, 1, mix | backward[1], 2, 1),
    "subspace backward to all, batch 128": (subspace._backward_kernel, 1, mix | backward[128], 2, 1),
    "t-SNE": (tsne._forces_kernel, 4, {"DIMS": 3, "ROWS": tsne._ROWS, "COLS": tsne._COLS}, 1, 0),
}
big = {"x", "y", "g", "dx", "h", "dh", "maps", "p", "part_maps"}
numbers = {"rows", "cols", "C", "S", "B", "P", "n", "loops"}
for arch, *kind in ((80, "fp32", 4), (90, "bf16", 2), (100, "bf16", 2)):
    for name, (kernel, warps, constants, reads, writes) in cases.items():
        dtype, size = ("fp32", 4) if kernel is tsne._forces_kernel else kind
        if kernel is subspace._forward_kernel:
            shape = subspace._forward_tile(int(name.split()[-1]), 2**19, size)
            constants = constants | dict(zip(("IMAGES", "PLACES"), shape))
        signature, values, hints = {}, {}, {}
        for i, argument in enumerate(kernel.arg_names):
            if argument in constants:
                signature[argument], values[(i,)] = "constexpr", constants[argument]
                continue
            signature[argument] = "i32" if argument in numbers else "*" + (dtype if argument in big else "fp32")
            if argument not in ("B", "loops"):  # the rest are multiples of 16: Triton sees that itself
                hints[(i,)] = [["tt.divisibility", 16]]
        source, target, log = ASTSource(kernel, signature, values, hints), GPUTarget("cuda", arch, 32), io.StringIO()
        with contextlib.redirect_stdout(log):  # what ptxas -v says: TRITON_DUMP_PTXAS_LOG
            ptx = triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"]
        elements = constants.get("IMAGES", constants.get("ROWS")) * constants.get("PLACES", constants.get("COLS"))
        vectors = elements * size // (32 * warps * 16)  # 16-byte accesses that a thread's share of a tile takes
        print(json.dumps({
            "name": f"{name}, {dtype}, sm_{arch}", "log": log.getvalue(),
            "loads": [ptx.count("ld.global.v4.b32"), reads * vectors],
            "stores": [ptx.count("st.global.v4.b32"), writes * vectors],
            "barriers": ptx.count("bar.sync"),
        }))
"""
# Registers of a thread, and barriers. 168 registers leave 12 warps on a multiprocessor, which memory needs to be kept
# busy. The other numbers are what Triton 3.8 needs, rounded up: a kernel that needs more has lost its layout. Older
# versions may take a few registers more, 178 for 168 in 3.6.
BUDGETS = {"bias": (40, 10), "subspace forward": (168, 0), "subspace backward": (168, 28), "t-SNE": (104, 28)}


@needs_triton
@pytest.mark.long
def test_triton_ahead_of_time_for_sm_80_90_and_100(tmp_path):
    """No spills, registers and barriers within budget, and every large tensor moves in 16-byte pieces: as many as a
    thread's share of a tile takes. For single images and large batches, for few channels and many, for all gradients.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    env |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DUMP_PTXAS_LOG": "1"}
    script = tmp_path / "ahead.py"
    script.write_text(AHEAD)
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) == 42
    triton_version = tuple(map(int, ops.build.triton.__version__.split(".")[:2]))
    for r in results:
        registers, barriers = next(budget for kind, budget in BUDGETS.items() if r["name"].startswith(kind))
        registers += 10 * (triton_version < (3, 8))
        assert "0 bytes spill stores, 0 bytes spill loads" in r["log"], r
        assert int(re.search(r"Used (\d+) registers", r["log"])[1]) <= registers and r["barriers"] <= barriers, r
        assert r["loads"][0] >= r["loads"][1] > 0 and r["stores"][0] >= r["stores"][1], r


@needs_triton
def test_one_kernel_serves_all_sizes(monkeypatch):
    """Batches and sizes of images reach the backward kernel of bias_lrelu at run time: it is compiled once."""
    module = sys.modules["ops.bias_lrelu"]
    kernel, constants, loops = module._masked_kernel, set(), set()
    names = list(kernel.arg_names)

    class Launch:
        def __getitem__(self, grid):
            def run(*arguments):
                given = dict(zip(names, arguments, strict=True))
                constants.add(tuple((k, str(v)) for k, v in given.items() if k.isupper() and k != "C"))
                loops.add(given["loops"])

            return run

    monkeypatch.setattr(module, "_masked_kernel", Launch())
    for size in (1, 4, 32, 128, 256):
        for B in (1, 3, 16, 64, 100):
            y = torch.empty(B, 16, size, size, device="meta").to(memory_format=torch.channels_last)
            module._triton_masked(y, y, None, y, y.new_empty(0), 0.2)
    assert len(loops) > 3 and len(constants) == 1
    if not ops.build.INTERPRET:
        assert next(p for p in kernel.params if p.name == "loops").do_not_specialize
