"""t-SNE's forces and neighbourhoods against their definition in float64, in every implementation.

test_ops.py runs this file a second time under Triton's interpreter.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ops.build
from ops import tsne_forces, tsne_neighbourhoods

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
IMPLS = ["ref"] + ["triton"] * (CUDA or ops.build.INTERPRET) + ["cpp"] * (not CUDA)

impls = pytest.mark.parametrize("impl", IMPLS)


def cloud(n, dims, seed=0, scale=3.0):
    """Symmetric affinities [n, n] with sum 1 and points [3, n], float32."""
    make = torch.Generator().manual_seed(seed)
    p, y = torch.rand(n, n, generator=make) ** 4, torch.zeros(3, n)
    y[:dims] = scale * torch.randn(dims, n, generator=make)
    p = (p + p.T).fill_diagonal_(0)
    return (p / p.sum().clamp(min=1e-30)).to(DEVICE), y.to(DEVICE)


def definition(p, y, dims):
    """The three sums pair by pair, in float64."""
    p, y, v = p.double(), y.double(), dims - 1
    d = y[:, :, None] - y[:, None, :]
    w = 1 / (1 + d.square().sum(0) / v)
    q = (w ** ((v + 1) / 2)).fill_diagonal_(0)
    return (p * w * d).sum(2), (q * w * d).sum(2), q.sum()


@impls
@pytest.mark.parametrize("dims", [2, 3])
def test_matches_the_definition(impl, dims):
    """For numbers of points around the sizes of vectors and tiles (C++ has tiles of 512); near points, and far ones."""
    for n in (1, 2, 15, 16, 17, 131) + (257,) * (not ops.build.INTERPRET) + (513, 1030) * (impl == "cpp"):
        for scale in (1e-4, 3.0, 100.0):
            p, y = cloud(n, dims, n, scale)
            got, want = tsne_forces(p, y, dims, impl), definition(p, y, dims)
            for a, b in zip(got[:2], want, strict=False):
                assert a.dtype == torch.float32 and a.shape == (3, n)
                torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5 * b.abs().max().item())
            assert got[2].dtype == torch.float64 and got[2].shape == ()
            torch.testing.assert_close(got[2], want[2], rtol=1e-6, atol=0)


@impls
@pytest.mark.parametrize("dims", [2, 3])
def test_gradient_of_the_divergence(impl, dims):
    """2 (v + 1) / v (attract - repel / total) is what autograd makes of KL(P || Q)."""
    p, y = cloud(97, dims)
    leaf, v = y.double().requires_grad_(), dims - 1
    distances = (leaf[:, :, None] - leaf[:, None, :]).square().sum(0)
    log_q = torch.log1p(distances / v) * (-(v + 1) / 2)
    q = log_q.exp() * (1 - torch.eye(97, dtype=torch.float64, device=DEVICE))
    (torch.special.xlogy(p.double(), p.double()) - p.double() * (log_q - q.sum().log())).sum().backward()
    attract, repel, total = tsne_forces(p, y, dims, impl=impl)
    found = 2 * (v + 1) / v * (attract - repel / total)
    torch.testing.assert_close(found.double(), leaf.grad, rtol=0, atol=1e-5 * leaf.grad.abs().max().item())


@impls
def test_two_points_by_hand(impl):
    """At distance 2 in space: w = 1 / 3, q = 3^-1.5."""
    y = torch.tensor([[0.0, 2.0], [0, 0], [0, 0]], device=DEVICE)
    p = torch.tensor([[0.0, 0.5], [0.5, 0]], device=DEVICE)
    attract, repel, total = tsne_forces(p, y, 3, impl)
    assert total.item() == pytest.approx(2 * 3**-1.5, rel=1e-6)
    for found, pull in ((attract, 0.5 / 3), (repel, 3**-2.5)):
        torch.testing.assert_close(found.cpu(), torch.tensor([[-2 * pull, 2 * pull], [0, 0], [0, 0]]))


@impls
def test_the_diagonal_is_not_used_and_strides_do_not_matter(impl):
    p, y = cloud(40, 3)
    want = tsne_forces(p, y, impl=impl)
    wide = torch.zeros(40, 80, device=DEVICE)
    wide[:, ::2] = p.clone().fill_diagonal_(7.0)
    for a, b in zip(tsne_forces(wide[:, ::2], y.T.contiguous().T, impl=impl), want, strict=True):
        assert torch.equal(a, b)


@impls
def test_no_points(impl):
    attract, repel, total = tsne_forces(torch.zeros(0, 0, device=DEVICE), torch.zeros(3, 0, device=DEVICE), impl=impl)
    assert attract.shape == repel.shape == (3, 0) and total.item() == 0


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made within it."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.skipif(ops.build.INTERPRET, reason="the interpreter copies what the kernel reads")
@impls
def test_nothing_of_n_times_n_is_made(impl, monkeypatch):
    monkeypatch.setattr(sys.modules["ops.tsne"], "_BLOCK", 2000)
    p, y = cloud(300, 3)
    tsne_forces(p, y, impl=impl)  # what is loaded the first time stays out
    with Largest() as made:
        tsne_forces(p, y, impl=impl)
    assert made.elements <= (2000 if impl == "ref" else 3 * 300)


@impls
def test_same_bits_again(impl):
    p, y = cloud(150, 3)
    for a, b in zip(tsne_forces(p, y, impl=impl), tsne_forces(p, y, impl=impl), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(CUDA, reason="about CPU threads")
def test_same_bits_for_any_number_of_threads():
    p, y = cloud(1301, 3)  # three tiles a side
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(tsne_forces(p, y, impl="cpp"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(CUDA, reason="about the CPU")
def test_only_one_triangle_of_p_is_read():
    """Which is why p must be symmetric."""
    p, y = cloud(600, 3)
    for a, b in zip(tsne_forces(p.triu(), y, impl="cpp"), tsne_forces(p, y, impl="cpp"), strict=True):
        assert torch.equal(a, b)


# Neighbourhoods.

NEIGHBOURS = ["ref"] + ["cpp"] * (not CUDA)


def shares(d, first, perplexity):
    """The same by bisection in float64."""
    d, own = d.double().cpu(), torch.arange(first, first + len(d))[:, None]
    d = d.scatter(1, own, torch.inf) - d.scatter(1, own, torch.inf).amin(1, keepdim=True)
    low, high = torch.full((len(d), 1), -60.0).double(), torch.full((len(d), 1), 60.0).double()
    for _ in range(100):
        p = torch.softmax(-((low + high) / 2).exp() * d, 1)
        wide = torch.special.entr(p).sum(1, keepdim=True) > torch.tensor(perplexity).double().log()
        low, high = torch.where(wide, (low + high) / 2, low), torch.where(wide, high, (low + high) / 2)
    return p


@pytest.mark.parametrize("impl", NEIGHBOURS)
@pytest.mark.parametrize("n", [7, 15, 16, 17, 500])
def test_neighbourhoods_have_the_perplexity(impl, n):
    """Of all rows at once and of a few in the middle; near points, and far ones."""
    make = torch.Generator().manual_seed(n)
    for scale, perplexity in ((1e-3, 5.0), (1.0, 2.5), (100.0, 5.0), (1.0, n / 2)):
        x = scale * torch.randn(n, 5, generator=make, dtype=torch.float64)
        d = (x[:, None] - x).square().sum(2).float().to(DEVICE)
        want = shares(d, 0, perplexity)
        for first, rows in ((0, n), (3, 2)):
            found = d[first : first + rows].clone()
            tsne_neighbourhoods(found, first, perplexity, impl)
            assert not found[range(rows), range(first, first + rows)].any()
            torch.testing.assert_close(found.double().cpu(), want[first : first + rows], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(
                torch.special.entr(found).sum(1).exp(), torch.full((rows,), perplexity).to(DEVICE), rtol=2e-5, atol=0
            )


@pytest.mark.parametrize("impl", NEIGHBOURS)
def test_neighbours_at_one_distance_have_equal_shares(impl):
    for distance in (0.0, 2.0):
        d = torch.full((40, 40), distance, device=DEVICE).fill_diagonal_(0)
        tsne_neighbourhoods(d, 0, 30.0, impl)
        torch.testing.assert_close(d, torch.full_like(d, 1 / 39).fill_diagonal_(0))


def test_arguments_are_checked():
    p, y = cloud(8, 3)
    for wrong in (
        lambda: tsne_forces(p, y.T),
        lambda: tsne_forces(p[:7], y),
        lambda: tsne_forces(p, y.to("meta")),
        lambda: tsne_forces(p, y, 4),
        lambda: tsne_forces(p, y, impl="c"),
        lambda: tsne_neighbourhoods(p[0], 0, 3.0),
        lambda: tsne_neighbourhoods(p.T[:, :4], 0, 3.0),
        lambda: tsne_neighbourhoods(p, 1, 3.0),
        lambda: tsne_neighbourhoods(p, 0, 8.0),
        lambda: tsne_neighbourhoods(p, 0, 3.0, "triton"),
    ):
        with pytest.raises(ValueError):
            wrong()
    for wrong in (
        lambda: tsne_forces(p.double(), y),
        lambda: tsne_forces(p.double(), y.double(), impl="cpp"),
        lambda: tsne_neighbourhoods(p.double(), 0, 3.0),
    ):
        with pytest.raises(TypeError, match="float32"):
            wrong()
    assert tsne_forces(p.double(), y.double(), impl="ref")[0].dtype == torch.float64
    with pytest.raises(RuntimeError, match="C\\+\\+ ops need CPU tensors"):
        tsne_forces(p.to("meta"), y.to("meta"), impl="cpp")
