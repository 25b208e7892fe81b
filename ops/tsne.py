"""What takes the time in exact t-SNE: tsne_forces(p, y, dims), the forces of one iteration in one pass over P,
and tsne_neighbourhoods(d, first, perplexity), which makes the rows of P out of squared distances.

With the affinities P of the data and the kernel q(y_i, y_j) of the points, the gradient of t-SNE (van der Maaten and
Hinton 2008) is an attraction weighted by P less a repulsion weighted by q / sum q. The first op returns both sums and
sum q. It has three implementations: the PyTorch
reference, Triton for NVIDIA GPUs (below) and C++ for the CPU (tsne.cpp), which computes each pair of points once. None
makes anything of size [N, N]. The second op runs once, so a GPU takes the reference.
"""

import math

import torch

from .build import c_function, choose, tl, triton

_BLOCK = 2**20  # elements of the reference's temporaries, 4 MB each


@torch.no_grad()
def tsne_forces(
    p: torch.Tensor, y: torch.Tensor, dims: int = 3, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(attract, repel, total) of the points y for the affinities p: sums over the other points j of every point i.

    d_ij = y_i - y_j, v = dims - 1 are the degrees of freedom, w_ij = 1 / (1 + |d_ij|^2 / v), and the kernel is
    q_ij = w_ij^((v + 1) / 2).

        attract_i = sum_j p_ij w_ij d_ij,    repel_i = sum_j q_ij w_ij d_ij,    total = sum_ij q_ij over i != j.

    So 2 (v + 1) / v (attract - repel / total) is the gradient of KL(P || Q).

    p: float32 [N, N], symmetric (C++ reads what is above its diagonal); the diagonal is not used. y: float32 [3, N],
    its last row 0 if dims is 2. dims: 2 or 3. impl: 'auto' (Triton on CUDA, C++ on the CPU, the reference with one
    warning where that cannot run), 'ref' (float64 too), 'triton', 'cpp'.

    Returns attract and repel [3, N] like y, and total, a float64 scalar on the device. No derivatives. The same input
    gives the same bits.

    Raises ValueError for shapes or dims that do not fit, TypeError for dtypes, RuntimeError with the reason if
    the implementation asked for cannot run.
    """
    n = y.shape[-1]
    if y.ndim != 2 or len(y) != 3 or p.shape != (n, n) or p.device != y.device:
        raise ValueError(
            "tsne_forces needs p [N, N] and y [3, N] on one device, "
            f"got {[*p.shape]} on {p.device} and {[*y.shape]} on {y.device}"
        )
    if dims not in (2, 3):
        raise ValueError(f"tsne_forces knows dims 2 and 3, got {dims}")
    # float64 is for checks: the kernels have float32 alone.
    if p.dtype != y.dtype or y.dtype not in ((torch.float32, torch.float64) if impl == "ref" else (torch.float32,)):
        raise TypeError(f"tsne_forces needs float32 tensors, got {p.dtype} and {y.dtype}")
    impl = choose(impl, y.device.type)
    if impl == "ref":
        return _reference(p, y, dims)
    p, y = p.contiguous(), y.contiguous()  # the kernels are told no strides
    attract, repel = torch.empty_like(y), torch.empty_like(y)
    # The kernel's sum, or for Triton its sums over each point's others.
    kernel = y.new_zeros(1, dtype=torch.float64) if impl == "cpp" else y.new_zeros(n)
    if n == 0:
        pass
    elif impl == "triton":
        with torch.cuda.device_of(y):
            _triton_forces(p, y, attract, repel, kernel, dims)
    else:
        pointers = (t.data_ptr() for t in (p, y, attract, repel, kernel))
        c_function("tsne_forces", torch.float32, "pppppii")(*pointers, n, dims)
    return attract, repel, kernel.sum(dtype=torch.float64)  # many small terms, added in float64


def _reference(p, y, dims):
    """The sums as they are defined, for a block of points i at a time."""
    n, v = y.shape[1], dims - 1
    attract, repel = torch.zeros_like(y), torch.zeros_like(y)
    total = torch.zeros((), dtype=torch.float64, device=y.device)
    block = max(1, _BLOCK // max(n, 1))  # rows at a time: temporaries of 4 MB, whatever N is
    for start in range(0, n, block):
        rows = slice(start, start + block)
        # Differences: distances by a matrix product lose the digits of close pairs.
        d = [y[c, rows, None] - y[c] for c in range(dims)]
        w = 1 / (1 + sum(di.square() for di in d) / v)
        q = w * w.sqrt() if dims == 3 else w.clone()  # w^((v + 1) / 2)
        q.diagonal(start).zero_()  # a point's kernel with itself is left out of the total
        total += q.sum(dtype=torch.float64)
        a, r = p[rows] * w, q * w
        for c in range(dims):
            attract[c, rows], repel[c, rows] = (a * d[c]).sum(1), (r * d[c]).sum(1)
    return attract, repel, total


@torch.no_grad()
def tsne_neighbourhoods(d: torch.Tensor, first: int, perplexity: float, impl: str = "auto") -> None:
    """Turns rows of squared distances into t-SNE's conditional probabilities p_j|i, in place.

    p_j|i = exp(-beta_i d_ij) / sum over j != i, p_i|i = 0, with the beta_i whose entropy is log(perplexity) to 1e-5.
    It is found by Newton's method on log(beta_i), kept in brackets by bisection.

    d: float32 [rows, N], contiguous, at least 0: from the points first .. first + rows - 1 to all N. perplexity: the
    effective number of neighbours, at least 1 and less than N. impl: 'auto' (C++ on the CPU, else the reference),
    'ref', 'cpp'.

    Raises ValueError for arguments that do not fit, TypeError for dtypes, RuntimeError with the reason if the
    implementation asked for cannot run.
    """
    if d.ndim != 2 or not d.is_contiguous() or not 0 <= first <= d.shape[1] - len(d):
        raise ValueError(
            f"tsne_neighbourhoods needs contiguous d [rows, N], N >= first + rows, got {[*d.shape]}, {first}"
        )
    if not 1 <= perplexity < d.shape[1]:
        raise ValueError(f"tsne_neighbourhoods needs a perplexity from 1 to less than {d.shape[1]}, got {perplexity:g}")
    if d.dtype != torch.float32:
        raise TypeError(f"tsne_neighbourhoods needs float32, got {d.dtype}")
    if impl == "triton":
        raise ValueError("tsne_neighbourhoods has no 'triton'")
    # It runs once for each t-SNE: on a GPU that is not worth a kernel.
    impl = "ref" if impl == "auto" and d.device.type != "cpu" else choose(impl, d.device.type)
    if impl == "cpp":
        run = c_function("tsne_neighbourhoods", torch.float32, "piiid")
        run(d.data_ptr(), len(d), d.shape[1], first, math.log(perplexity))
        return
    # A point's distance to itself: left out of the minimum and of the sums.
    own = torch.arange(len(d), device=d.device), torch.arange(first, first + len(d), device=d.device)
    target = math.log(perplexity)
    # Only differences count: from the nearest at 0 on, exp() neither overflows nor loses all its terms.
    d[own] = torch.inf
    d -= d.amin(1, keepdim=True)
    d[own] = 0
    # Start where the mean distance counts as one, with brackets far around it.
    log_beta = -d.mean(1, keepdim=True).clamp(min=1e-30).log()  # 1e-30: all points in one place
    low, high = log_beta - 40, log_beta + 40  # a factor of 10^17 either way
    for _ in range(60):  # enough for bisection alone; Newton's method takes a handful
        beta = log_beta.clamp(max=80).exp()  # exp(89) overflows: where all points are one
        e = torch.exp(-beta * d)
        e[own] = 0
        total = e.sum(1, keepdim=True)  # exp(0) of the nearest keeps it at 1 or more
        # From here on e holds the shares, which are the result once all rows are found.
        ed = e.div_(total) * d
        mean = ed.sum(1, keepdim=True)
        gap = total.log() + beta * mean - target  # entropy minus what it should be
        found = gap.abs() < 1e-5  # as scikit-learn's tolerance
        if found.all():
            break
        # Too much entropy means too many neighbours: beta must grow.
        low, high = torch.where(gap > 0, log_beta, low), torch.where(gap > 0, high, log_beta)
        # By log(beta) the entropy falls at the rate beta^2 var(d); steps above 1 would go beyond where that holds.
        variance = ed.mul_(d).sum(1, keepdim=True) - mean.square()
        step = log_beta + (gap / (beta.square() * variance)).clamp(-1, 1)
        step = torch.where((step > low) & (step < high), step, (low + high) / 2)
        log_beta = torch.where(found, log_beta, step)  # a found row stays, however long others take
    d.copy_(e)


# ---------------------------------------------------------------------------------------------------------------------
# Triton. A program walks along a few rows of P, tile by tile; the sums stay in registers until the end.

_ROWS, _COLS = 4, 128  # 4 elements per thread: one 16-byte load of P, and 28 registers for the seven tiles of sums

if triton is not None:

    @triton.jit
    def _forces_kernel(
        p, y, attract, repel, kernel, n, DIMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
    ):  # fmt: skip
        """Reads P once, 4 n^2 bytes, the minimum; y, which the cache holds, n / ROWS times.

        attract and repel [3, n]; kernel [n] takes each point's sum over the others.
        """
        i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        x0 = tl.load(y + i, mask=i < n, other=0)[:, None]
        x1 = tl.load(y + n + i, mask=i < n, other=0)[:, None]
        # In the plane this row is 0, so one kernel serves both.
        x2 = tl.load(y + 2 * n + i, mask=i < n, other=0)[:, None]
        # A sum for each place of a tile: threads need each other only once, after the loop.
        total = tl.zeros([ROWS, COLS], dtype=tl.float32)
        a0, a1, a2, r0, r1, r2 = total, total, total, total, total, total
        for start in range(0, n, COLS):
            j = start + tl.arange(0, COLS)
            d0 = x0 - tl.load(y + j, mask=j < n, other=0)[None, :]
            d1 = x1 - tl.load(y + n + j, mask=j < n, other=0)[None, :]
            d2 = x2 - tl.load(y + 2 * n + j, mask=j < n, other=0)[None, :]
            square = d0 * d0 + d1 * d1 + d2 * d2
            if DIMS == 2:
                w = 1 / (1 + square)
                q = w
            else:
                root = tl.rsqrt(1 + 0.5 * square)  # v = 2: w^(3/2) without a power
                w = root * root
                q = w * root
            # Beyond the end, p is read as 0, and so is q set: neither sum needs another mask.
            others = (j[None, :] < n) & (i[:, None] != j[None, :])
            q = tl.where(others, q, 0)
            total += q
            # p's diagonal needs no mask: whatever it holds is multiplied by a distance of 0.
            inside = (i[:, None] < n) & (j[None, :] < n)
            # 64 bits: from 46,341 points on, P has more than 2^31 elements.
            a = tl.load(p + i[:, None].to(tl.int64) * n + j[None, :], mask=inside, other=0) * w
            r = q * w
            a0 += a * d0
            a1 += a * d1
            a2 += a * d2
            r0 += r * d0
            r1 += r * d1
            r2 += r * d2
        tl.store(kernel + i, tl.sum(total, 1), mask=i < n)
        tl.store(attract + i, tl.sum(a0, 1), mask=i < n)
        tl.store(attract + n + i, tl.sum(a1, 1), mask=i < n)
        tl.store(attract + 2 * n + i, tl.sum(a2, 1), mask=i < n)
        tl.store(repel + i, tl.sum(r0, 1), mask=i < n)
        tl.store(repel + n + i, tl.sum(r1, 1), mask=i < n)
        tl.store(repel + 2 * n + i, tl.sum(r2, 1), mask=i < n)


def _triton_forces(p, y, attract, repel, kernel, dims):
    n = y.shape[1]
    _forces_kernel[(triton.cdiv(n, _ROWS),)](p, y, attract, repel, kernel, n, dims, _ROWS, _COLS)
