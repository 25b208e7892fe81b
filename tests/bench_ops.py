"""Times of the fused ops against eager PyTorch and torch.compile, at the shapes of the networks at 64 px, batch 32.

    python tests/bench_ops.py [--quick]

Other benchmarks call op_rows(). The contestants take turns, so that a busy machine slows all of them alike, and
medians are compared. Eager PyTorch is each op's own reference (impl='ref'), which already knows channels_last;
torch.compile compiles the same reference.
"""

import ctypes
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ops import bias_lrelu, conv2d, conv_transpose2d, subspace_lrelu

BASIS = 7  # k + 1 convolved maps
SUBSPACE_SHAPES = [(32, 256, 4, 4), (32, 128, 8, 8), (32, 64, 16, 16), (32, 32, 32, 32), (32, 16, 64, 64)]  # generator
BIAS_SHAPES = [*SUBSPACE_SHAPES, (32, 256)]  # global discriminator
# Input, output channels, kernel, stride, transposed: a generator's convolutions, and those of both discriminators.
CONVOLUTIONS = [(shape, shape[1], 3, 1, False) for shape in SUBSPACE_SHAPES]
CONVOLUTIONS += [((B, C, H, H), C // 2, 3, 2, True) for B, C, H, _ in SUBSPACE_SHAPES[:-1]]
CONVOLUTIONS += [((32, 64, 16, 16), 128, 3, 2, False), ((32, 128, 16, 16), 256, 4, 2, False)]
CONVOLUTIONS += [((32, 256, 8, 8), 512, 4, 1, False)]
SECONDS = 1.0  # measured per shape and pass, all contestants together


def keep_memory() -> None:
    """glibc keeps freed memory, as in training: page faults would otherwise be most of what is timed."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped on its own (M_MMAP_THRESHOLD cannot pass 32 MiB)
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass


def race(contestants: dict, seconds: float, synchronize) -> dict[str, list[float]]:
    """Seconds per call. Contestants take turns; the first call of a turn is not counted, because it pays for what the
    contestant before left in the caches and for threads that it let fall asleep."""
    times = {name: [] for name in contestants}
    for run in contestants.values():  # warm up, compile
        for _ in range(3):
            run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 10:
        for name, run in contestants.items():
            run()
            synchronize()
            for _ in range(4):
                start = time.perf_counter()
                run()
                synchronize()
                times[name].append(time.perf_counter() - start)
    return times


def rows_of(times: dict[str, list[float]], what: str, op: str, shape: list[int], dtype: str, kind: str) -> list[dict]:
    """A row for each contestant of a race, compared with the one named eager, and with compile if it ran."""
    medians, rows = {name: statistics.median(t) for name, t in times.items()}, []
    for name, t in times.items():
        q1, _, q3 = statistics.quantiles(t, n=4)
        compiled_by = medians["compile"] / medians[name] if "compile" in medians else None
        rows.append(
            {
                "what": f"{what}: {name}",
                "ratio": medians["eager"] / medians[name],
                "spread": [medians["eager"] / q3, medians["eager"] / q1],
                "note": f"{compiled_by:.2f} of compiled" if compiled_by else "",
                "op": op,
                "shape": shape,
                "dtype": dtype,
                "pass": kind,
                "impl": name,
                "ms": medians[name] * 1e3,
                "ms_q1": q1 * 1e3,
                "ms_q3": q3 * 1e3,
                "n": len(t),
                "vs_compile": compiled_by,
            }
        )
    return rows


def op_rows(quick: bool, device: str = "cpu") -> list[dict]:
    """One row an op, shape, dtype, pass and implementation, with ms (median), ms_q1, ms_q3 (quartiles), n (calls),
    ratio (to eager) and vs_compile (times faster, in medians; None where torch.compile cannot: double backward).

    Passes: 'forward' without gradient; 'forward+backward' to all that training differentiates (coef is noise);
    'double backward' is forward, backward with create_graph and backward through that, as R1 does. channels_last; fp32,
    and bf16 for the two passes that run in it.
    """
    keep_memory()
    fused = "triton" if device == "cuda" else "cpp"
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    rows = []
    for op, shapes in ((bias_lrelu, BIAS_SHAPES), (subspace_lrelu, SUBSPACE_SHAPES)):
        chosen = shapes[1:-1:2] if quick else shapes
        for shape, dtype in [(s, torch.float32) for s in chosen] + [(s, torch.bfloat16) for s in chosen]:
            make = torch.Generator().manual_seed(0)

            def randn(*size, grad=True, dtype=dtype):
                t = torch.randn(*size, generator=make).to(device, dtype)  # noqa: B023
                return (t.to(memory_format=torch.channels_last) if t.ndim == 4 else t).requires_grad_(grad)

            x, bias, g, gx = randn(*shape), randn(shape[1], dtype=None), randn(*shape), randn(*shape, grad=False)
            inputs = (x, bias)
            if op is subspace_lrelu:
                inputs = (x, randn(shape[0], BASIS, grad=False, dtype=None), randn(BASIS, *shape[1:]), bias)
            wanted = [t for t in inputs if t.requires_grad]
            torch._dynamo.reset()
            compiled = torch.compile(lambda *a: op(*a, impl="ref"), dynamic=False, fullgraph=True)  # noqa: B023
            functions = {
                "eager": lambda *a: op(*a, impl="ref"),  # noqa: B023
                "compile": compiled,
                fused: lambda *a: op(*a, impl=fused),  # noqa: B023
            }
            for kind in ("forward", "forward+backward", "double backward"):
                # subspace_lrelu's is composed of PyTorch ops, no loss needs it; R1, which needs bias_lrelu's, is fp32.
                if kind == "double backward" and (op is subspace_lrelu or dtype != torch.float32):
                    continue

                def contestant(function, kind=kind, inputs=inputs, wanted=wanted, g=g, gx=gx):
                    def run():
                        if kind == "forward":
                            with torch.no_grad():
                                function(*inputs)
                        elif kind == "forward+backward":
                            torch.autograd.grad(function(*inputs), wanted, g)
                        else:
                            grads = torch.autograd.grad(function(*inputs), inputs[:1], g, create_graph=True)
                            torch.autograd.grad(grads, g, gx)

                    return run

                entries = {
                    n: contestant(f) for n, f in functions.items() if n != "compile" or kind != "double backward"
                }
                times = race(entries, SECONDS / 4 if quick else SECONDS, synchronize)
                what = f"{op.__name__} {'x'.join(map(str, shape))} {str(dtype)[6:]}, {kind}"
                rows += rows_of(times, what, op=op.__name__, shape=list(shape), dtype=str(dtype)[6:], kind=kind)
    return rows + convolution_rows(quick, device, synchronize)


def convolution_rows(quick: bool, device: str, synchronize) -> list[dict]:
    """Forward + backward of the convolutions in fp32, channels_last, against PyTorch's own; rows as op_rows'."""
    rows = []
    for shape, outputs, k, stride, transposed in CONVOLUTIONS[1::5] if quick else CONVOLUTIONS:
        make = torch.Generator().manual_seed(0)

        def randn(*size):
            t = torch.randn(*size, generator=make).to(device)  # noqa: B023
            return t.contiguous(memory_format=torch.channels_last).requires_grad_()

        options = (stride, 1, 1) if transposed else (stride, 1)
        inputs = randn(*shape), randn(*((shape[1], outputs) if transposed else (outputs, shape[1])), k, k)
        ours, eager = (conv_transpose2d, F.conv_transpose2d) if transposed else (conv2d, F.conv2d)
        g = randn(*eager(*inputs, None, *options).shape)
        entries = {
            name: lambda f=f: torch.autograd.grad(f(*inputs, None, *options), inputs, g)  # noqa: B023
            for name, f in (("eager", eager), ("auto", ours))
        }
        times = race(entries, SECONDS / 4 if quick else SECONDS, synchronize)
        op, kind = f"{ours.__name__} {k}x{k}/{stride}", "forward+backward"
        what = f"{op} {'x'.join(map(str, shape))} to {outputs} channels, {kind}"
        rows += rows_of(times, what, op=op, shape=list(shape), dtype="float32", kind=kind)
    return rows


if __name__ == "__main__":
    line = "{:22s} {:15s} {:9s} {:17s} {:8s} {:>8} {:>8} {:>8} {:>8} {:>9}"
    print(line.format("op", "shape", "dtype", "pass", "impl", "ms", "q1", "q3", "x eager", "x compile"))
    for row in op_rows("--quick" in sys.argv, "cuda" if torch.cuda.is_available() else "cpu"):
        numbers = [f"{row[k]:.3f}" for k in ("ms", "ms_q1", "ms_q3")]
        ratios = ["" if row[k] is None else f"{row[k]:.2f}" for k in ("ratio", "vs_compile")]
        shape = "x".join(map(str, row["shape"]))
        print(line.format(row["op"], shape, row["dtype"], row["pass"], row["impl"], *numbers, *ratios))
