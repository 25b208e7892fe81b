"""What holds on a GPU, in at most ten minutes: a verdict for each part on a line of its own, and one JSON.

    python -m bench.gpu                       on the first GPU
    python -m bench.gpu --device cpu --quick  does every part run? Says what only a GPU can tell

Each part is a function that yields verdicts. A part that raises is a failure of that part alone.
"""

import contextlib
import functools
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import encoder as stage1
import gan
import training
from ops import bias_lrelu, no_weight_gradients, subspace_lrelu

from .baseline import PLAIN, PlainTrainer

ROOT = Path(__file__).parent.parent
SECONDS = 420  # after these nothing is begun: what torch.compile is at then may take two minutes more
LEAST = {"forward": 0.8, "backward": 0.7}  # of the rate of a copy of as many bytes

# Most launches of an update at 256 px with ResNet-50 and all of the augmentation, a twentieth above what was counted:
# at small sizes their number decides how long an update takes.
BUDGET = {
    "global": dict(discriminate_r1r2=670, discriminate=470, penalise=295, generate=660, regularise=760),
    "patch": dict(discriminate_r1r2=1785, discriminate=495, penalise=790, generate=640, regularise=760),
}


def verdict(what: str, value: float | None = None, ok: bool | None = None, note: str = "") -> dict:
    """A line of the report. ok: True or False where there is a limit, None where a figure or a remark is all."""
    return dict(what=what, value=value, ok=ok, note=note)


def line(row: dict) -> str:
    word = {True: "ok", False: "FAIL", None: "skip" if row["note"].startswith("skipped") else "--"}[row["ok"]]
    value = "" if row["value"] is None else f"{row['value']:.4g}"
    return f"{word:5} {row['what']:58} {value:>10}  {row['note']}".rstrip()


# ---------------------------------------------------------------------------------------------------------------------
# Launches, as torch dispatches them.


# Ops that launch nothing: they reserve memory, or give a tensor another name.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
# Ops whose result, or its size, the host must know before it goes on.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
# What autocast runs in 16 bits, so the dtype is counted too.
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward"}


class Launches(TorchDispatchMode):
    """Counts what is launched on a device within it. A convolution's gradients count one each, a view nothing.

    launches: number by op. products: matrix products and convolutions by op and dtype. waits: ops that wait for the
    device. copies: ops that copy between host and device. Triton's kernels are launched past the dispatcher: they count
    within `counting_triton`.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.launches: dict[str, int] = {}
        self.products: dict[str, int] = {}
        self.waits: list[str] = []
        self.copies: list[str] = []

    @property
    def total(self) -> int:
        return sum(self.launches.values())

    def add(self, name: str, times: int = 1) -> None:
        self.launches[name] = self.launches.get(name, 0) + times

    def call(self, function, args, kwargs):
        """Run an op."""
        return function(*args, **kwargs)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = self.call(function, args, kwargs)
        schema, tensors = function._schema, [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        space, name = schema.name.split("::")
        # A view shares memory with an argument and does not write to it.
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        kinds = {t.device.type for t in tensors}
        if self.device.type not in kinds or space in ("prim", "profiler") or name in FREE or views:
            return out
        if name in WAITS:
            self.waits.append(name)
        if name in ("_to_copy", "copy_") and len(kinds) > 1:
            self.copies.append(name)
        # The last argument of convolution_backward says which of its three gradients are wanted, each a launch.
        times = sum(args[-1]) if name == "convolution_backward" else 1
        if name in PRODUCTS:
            key = f"{name} {str(tensors[0].dtype)[6:]}"  # without 'torch.'
            self.products[key] = self.products.get(key, 0) + times
        self.add(name, times)
        return out


class CountedKernel:
    """A Triton kernel that counts its launches. runs: whether it also runs."""

    def __init__(self, kernel, count: Callable[[], None], runs: bool):
        self.kernel, self.count, self.runs = kernel, count, runs

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.count()
            return self.kernel[grid](*arguments, **options) if self.runs else None

        return launch


@contextlib.contextmanager
def counting_triton(count: Callable[[str], None], runs: bool = True) -> Iterator[None]:
    """Within it, each launch of a Triton kernel of bias_lrelu and subspace_lrelu calls count('triton')."""
    kept = []
    for op in ("bias_lrelu", "subspace_lrelu"):
        module = importlib.import_module(f"ops.{op}")  # ops.bias_lrelu is the function
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kept.append((module, name, getattr(module, name)))
            setattr(module, name, CountedKernel(kept[-1][2], lambda: count("triton"), runs))
    try:
        yield
    finally:
        for module, name, kernel in kept:
            setattr(module, name, kernel)


def all_updates(trainer: gan.Trainer, real: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """The four updates, and D's with both penalties in it, as calls without arguments."""

    return dict(
        discriminate_r1r2=lambda: trainer.discriminate(real, y, penalised=True),
        discriminate=lambda: trainer.discriminate(real, y),
        penalise=lambda: trainer.penalise(real, y),
        generate=trainer.generate,
        regularise=trainer.regularise,
    )


def count_updates(trainer: gan.Trainer, real: Tensor, y: Tensor, mode=Launches, runs: bool = True) -> dict:
    """What each update launches, after one of each that makes the optimisers' states: {update: Launches}."""
    counted = {}
    # The second round replaces the first in `counted`.
    for _ in range(2):
        for name, update in all_updates(trainer, real, y).items():
            with mode(trainer.run.device) as counted[name], counting_triton(counted[name].add, runs):
                update()
    return counted


# ---------------------------------------------------------------------------------------------------------------------
# What is measured: stage 3 with random weights.


def make_trainer(
    run: training.Run, size: int, batch: int, disc: str, backbone: str, **options
) -> tuple[gan.Trainer, Tensor, Tensor]:
    """A trainer of stage 3 on a frozen encoder of random weights, a batch of real images and its labels."""
    # Any seed: it makes the weights the same in every run of the check.
    torch.manual_seed(0)
    network = stage1.Encoder(backbone, "imagenet").eval()
    frozen = gan.frozen_encoder(network, size, run.device, run.dtype)
    classifier = nn.Linear(network.features, 3).to(run.device).requires_grad_(False)
    options = gan.default_options(size, batch=batch, disc=disc, **{"penalty": "r1", "graph": "off"} | options)
    trainer = gan.Trainer(options, run, torch.eye(3), "one-hot", frozen, classifier)
    # Noise: times and launches do not depend on what images show.
    real = torch.rand(batch, 3, size, size, device=run.device) * 2 - 1
    y = torch.eye(3, device=run.device).repeat(batch // 3 + 1, 1)[:batch]
    return trainer, real.contiguous(memory_format=torch.channels_last), y


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Within it, GPUs multiply fp32 matrices in TF32, or do not."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [b.allow_tf32 for b in backends]
    for b in backends:
        b.allow_tf32 = on
    try:
        yield
    finally:
        for b, value in zip(backends, before, strict=True):
            b.allow_tf32 = value


def seconds(call: Callable[[], object], device: torch.device, turns: int = 5, calls: int = 1) -> float:
    """Median seconds of a call, the device's own work included, after a first turn that compiles (0 turns: of that)."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(turns + 1):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times[1:] or times)


# ---------------------------------------------------------------------------------------------------------------------
# The parts. Each takes the run and `quick`, and yields verdicts.


def op_tests(run: training.Run, quick: bool) -> Iterator[dict]:
    """The tests of the ops, which take the GPU where there is one."""
    chosen = (
        ["tests/test_ops.py", "-k", "arguments_are_checked"] if quick else ["tests/test_ops.py", "tests/test_conv2d.py"]
    )
    command = [sys.executable, "-m", "pytest", "-q", *chosen, *([] if quick else ["tests/test_tsne.py"])]
    # 300 s at most, so that the other parts get some of SECONDS.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    yield verdict("tests of the ops", ok=done.returncode == 0, note=done.stdout.strip().splitlines()[-1])


def bandwidth(run: training.Run, quick: bool) -> Iterator[dict]:
    """Bytes that each kernel must move, as a share of the rate at which a copy moves as many.

    Backward passes are to all that training differentiates. Half a gigabyte fits no cache, and hides the host's work.
    """
    on_gpu, (B, C, S) = run.device.type == "cuda", (8, 16, 16) if quick else (128, 64, 128)

    def time_of(call: Callable[[], object]) -> float:
        return seconds(call, run.device, *((2, 1) if quick else (10, 10)))

    for dtype in (torch.float32, torch.bfloat16):
        make = functools.partial(torch.randn, device=run.device)
        x, g, maps = (
            make(*shape).to(dtype, memory_format=torch.channels_last)
            # 7 maps: the six of a subspace and its origin.
            for shape in ((B, C, S, S), (B, C, S, S), (7, C, S, S))
        )
        bias, coef, target = make(C).requires_grad_(), make(B, 7), torch.empty_like(x)
        # A copy reads and writes.
        copy = 2 * x.nbytes / time_of(lambda t=target, x=x: t.copy_(x))
        h, maps = x.detach().requires_grad_(), maps.requires_grad_()
        for name, op, inputs, extra in (
            ("bias_lrelu", bias_lrelu, (h, bias), 0),
            (
                "subspace_lrelu",
                lambda h, maps, bias, coef=coef: subspace_lrelu(h, coef, maps, bias),
                (h, maps, bias),
                maps.nbytes,
            ),
        ):
            y = op(*inputs)
            with torch.no_grad():
                forward = time_of(lambda op=op, inputs=inputs: op(*inputs))
            backward = time_of(lambda y=y, i=inputs, g=g: torch.autograd.grad(y, i, g, retain_graph=True))
            for kind, time_taken, moved in (
                ("forward", forward, 2 * x.nbytes + extra),
                (
                    "backward",
                    backward,
                    3 * x.nbytes + extra,
                ),  # coef wants no gradient: the maps' is written, they are not read
            ):
                share, least = moved / time_taken / copy, LEAST[kind]
                note = f"of a copy's rate, at least {least}" if on_gpu else "of a copy's rate; the limit is for GPUs"
                ok = share >= least if on_gpu and not quick else None
                yield verdict(f"{name} {kind}, {str(dtype)[6:]}", share, ok, note)


def waits(run: training.Run, quick: bool) -> Iterator[dict]:
    """16 iterations in which every wait for the device is an error."""
    for disc in ("global", "patch"):
        trainer, real, y = make_trainer(run, 32 if quick else 128, 2 if quick else 8, disc, "resnet18")
        # Warm up: first iterations compile kernels and make Adam's state, which may wait.
        for i in range(0 if quick else 2):
            trainer.iteration(i, real, y)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            for i in range(1 if quick else 16):  # one cycle of lazy R1
                trainer.iteration(i, real, y)
        finally:
            if run.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        on_gpu = run.device.type == "cuda"
        note = "" if on_gpu else "skipped: the iterations ran, but only a GPU can be waited for"
        yield verdict(f"no wait for the device, {disc}", ok=True if on_gpu else None, note=note)


def launches(run: training.Run, quick: bool) -> Iterator[dict]:
    """Dispatched launches of each update against the budget."""
    holds = run.device.type == "cuda" and not quick
    for disc, budget in BUDGET.items():
        size, batch, backbone = (256, 8, "resnet50") if holds else (32, 2, "resnet18")
        trainer, real, y = make_trainer(run, size, batch, disc, backbone)
        for update, counted in count_updates(trainer, real, y).items():
            note = f"at most {budget[update]}" if holds else "the budget is for 256 px on a GPU"
            if holds and counted.waits + counted.copies:
                # Either of them would stop the host in every iteration.
                note += f", with {' '.join(counted.waits + counted.copies)}"
            ok = counted.total <= budget[update] and not counted.waits + counted.copies if holds else None
            yield verdict(f"launches of {update}, {disc}", counted.total, ok, note)


def busy(run: training.Run, quick: bool) -> Iterator[dict]:
    """The default recipe: share of the time in which the GPU computes, kernels of an iteration, images per second."""
    if run.device.type != "cuda":
        yield verdict("busy share", note="skipped: there is no GPU to be busy")
        return
    from torch.profiler import ProfilerActivity, profile

    # 64 px, where launches decide, and 256 px, where the kernels do.
    for size, how in [(32, "auto")] if quick else [(64, "off"), (64, "auto"), (256, "off"), (256, "auto")]:
        trainer, real, y = make_trainer(run, size, 32, "global", "resnet18", penalty="r1r2", graph=how)
        # Warm up: graphs are captured at the third call.
        for i in range(16):
            trainer.iteration(i, real, y)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            start = time.perf_counter()
            for i in range(16):
                trainer.iteration(i, real, y)
            torch.cuda.synchronize()
            wall = time.perf_counter() - start
        kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        share = sum(e.time_range.elapsed_us() for e in kernels) / 1e6 / wall
        note = f"{len(kernels) / 16:.0f} kernels an iteration, {16 * 32 / wall:.0f} images/s"
        yield verdict(f"busy share at {size} px, batch 32, --graph {how}", share, note=note)


def graphs(run: training.Run, quick: bool) -> Iterator[dict]:
    """Updates as CUDA graphs: the same losses as eager ones from the same weights, and how much sooner."""
    if run.device.type != "cuda":
        yield verdict(
            "graphs equal eager updates", note="skipped: only a GPU has CUDA graphs; `make test` repeats records"
        )
        return
    exact = training.Run(run.device, None, 0)  # fp32: in bf16 cuDNN's choice of algorithm shows in the losses
    for penalty in ("r1r2", "r1"):
        losses, times = {}, {}
        for how in ("off", "auto"):
            trainer, real, y = make_trainer(exact, 64, 16, "global", "resnet18", penalty=penalty, graph=how)
            trainer.options["lr"] = 1e-6  # rounding would grow from step to step

            def iterate(i: int, trainer=trainer, real=real, y=y) -> dict[str, Tensor]:
                exact.reseed(16 * i)  # the same random numbers for both
                return trainer.iteration(i, real, y)

            with tf32(False):
                losses[how] = [{k: v.item() for k, v in iterate(i).items()} for i in range(50)]
                times[how] = seconds(lambda: [iterate(i) for i in range(16)], run.device)
        # On an H200, losses were 0.26 % apart and penalties 5 %: the limits are four times and twice that.
        for kind, limit, names in (  # a penalty jumps where a pre-activation changes its sign: 4 % after noise of 1e-6
            ("losses", 0.01, ("loss_d", "loss_g", "score_real", "score_fake", "H_y_given_e")),
            ("penalties", 0.1, ("r1", "r2")),
        ):
            apart = {}
            for name in losses["off"][0].keys() & set(names):  # the first iteration makes every update
                a, b = (
                    torch.tensor([stats[name] for stats in losses[how] if name in stats]) for how in ("off", "auto")
                )
                apart[name] = ((a - b).abs().max() / a.abs().max()).item()
            worst = max(apart.values())
            note = f"at most {limit}; graphs are {times['off'] / times['auto']:.2f} times as fast"
            yield verdict(f"{kind} of graphs against eager, --penalty {penalty}", worst, worst <= limit, note)


def r1_error(run: training.Run, quick: bool) -> Iterator[dict]:
    """Error of R1's weight gradient in fp32, and with TF32, relative to float64."""
    size = 32 if quick else 64
    trainer, real, _ = make_trainer(run, size, 8, "global", "resnet18", **PLAIN)
    # Not the biases: R1's gradient with respect to them is 0 almost everywhere.
    names = [n for n, _ in trainer.D.named_parameters() if "bias" not in n]

    def gradient(D: nn.Module, x: Tensor) -> Tensor:
        weights = [p for n, p in D.named_parameters() if n in names]
        x = x.detach().requires_grad_()
        with no_weight_gradients():
            score = D(x)
        found = torch.autograd.grad(gan.gradient_penalty(score, x), weights)
        return torch.cat([g.double().flatten() for g in found])

    single = {}
    for on in (False, True):
        with tf32(on):
            single[on] = gradient(trainer.D, real)
    # Last, because double() converts D itself.
    exact = gradient(trainer.D.double(), real.double())
    for on, limit in ((False, 1e-4), (True, 5e-2)):  # eps 6e-8 and 5e-4 through some thirty layers of both passes
        error = ((single[on] - exact).norm() / exact.norm()).item()
        if on and run.device.type != "cuda":
            yield verdict("R1's gradient with TF32, relative error", note="skipped: a CPU has no TF32")
        else:
            what = f"R1's gradient {'with TF32' if on else 'in fp32'}, relative error"
            yield verdict(what, error, error <= limit, f"at most {limit}")


def short_runs(run: training.Run, quick: bool) -> Iterator[dict]:
    """Runs in bf16 and fp16 stay finite."""
    for dtype in (torch.bfloat16, torch.float16):
        own = training.Run(run.device, dtype, 0)
        trainer, real, y = make_trainer(own, 16 if quick else 64, 4 if quick else 32, "global", "resnet18")
        iterations = 2 if quick else 200
        for i in range(iterations):
            stats = trainer.iteration(i, real, y)
        finite = all(bool(v.isfinite()) for v in stats.values())
        finite &= all(bool(p.isfinite().all()) for p in trainer.ema.parameters())
        skipped = int(trainer.step_g.skipped + trainer.step_d.skipped)
        few = skipped <= max(40, iterations / 5)  # fp16's loss scale falls from 65,536 in some 16 skipped updates
        note = f"{iterations} iterations, {skipped} updates skipped"
        yield verdict(f"{str(dtype)[6:]} stays finite", ok=finite and few, note=note)


def processes(run: training.Run, quick: bool) -> Iterator[dict]:
    """Two processes, on a GPU each, compute the gradients of one."""
    if run.device.type != "cuda" or torch.cuda.device_count() < 2:
        yield verdict("two processes equal one", note="skipped: needs two GPUs; `make test` has it on the CPU")
        return
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_processes.py"]
    environment = os.environ | {"INFOSCC_TEST_DEVICE": "cuda"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    yield verdict("two processes equal one", ok=done.returncode == 0, note=done.stdout.strip().splitlines()[-1])


class CompiledPlain(PlainTrainer):
    """The plain trainer with its networks through torch.compile, but for R1, which it cannot differentiate twice."""

    def compile(self) -> None:
        self.eager = self.D
        self.D, self.decoder, self.encoder = (torch.compile(n) for n in (self.D, self.decoder, self.encoder))

    def penalise(self, real: Tensor, y: Tensor) -> Tensor:
        # Both share their weights: only the way of running them changes.
        compiled, self.D = self.D, self.eager
        loss = super().penalise(real, y)
        self.D = compiled
        return loss


def stage1_sides(run: training.Run, size: int, batch: int) -> dict[str, Callable[[], object]]:
    """A step of SimCLR with ResNet-18: ours, in NCHW, and compiled."""

    def step_of(compiled: bool, memory_format: torch.memory_format) -> Callable[[], None]:
        network = stage1.Encoder("resnet18", "imagenet").to(run.device, memory_format=memory_format).train()
        forward = torch.compile(network) if compiled else network
        # Fused, as encoder.py has it; the eager side is PyTorch with its defaults.
        optimiser = torch.optim.Adam(network.parameters(), fused=memory_format is torch.channels_last)
        x = torch.rand(batch, 3, size, size, device=run.device) * 2 - 1

        def step() -> None:
            views = torch.cat([stage1.augment(x) for _ in range(2)]).contiguous(memory_format=memory_format)
            with run.autocast():
                z = network.projection(forward(views))
            optimiser.zero_grad(set_to_none=True)
            stage1.nt_xent(*z.float().split(batch), 0.1).backward()  # 0.1: encoder.py's default
            optimiser.step()

        return step

    last = torch.channels_last
    return dict(ours=step_of(False, last), eager=step_of(False, torch.contiguous_format), compile=step_of(True, last))


def stage2_sides(run: training.Run, size: int, batch: int) -> dict[str, Callable[[], object]]:
    """Embeddings by ResNet-18, which is nearly all that stage 2 computes: frozen, eager, and compiled."""
    network = stage1.Encoder("resnet18", "imagenet").eval().requires_grad_(False)
    frozen = gan.frozen_encoder(network, size, run.device, run.dtype)
    plain = network.to(run.device, memory_format=torch.contiguous_format)
    compiled = torch.compile(plain)
    x = torch.rand(batch, 3, size, size, device=run.device) * 2 - 1

    def embed(f: nn.Module, x: Tensor) -> None:
        with torch.no_grad(), run.autocast():
            f(x)

    last = x.contiguous(memory_format=torch.channels_last)
    return dict(ours=lambda: embed(frozen, last), eager=lambda: embed(plain, x), compile=lambda: embed(compiled, x))


def stage3_sides(run: training.Run, size: int, batch: int, iterations: int) -> dict[str, Callable[[], object]]:
    """Iterations of stage 3, global with ResNet-18, in the run's precision: ours, plain, and plain compiled."""
    trainer, real, y = make_trainer(run, size, batch, "global", "resnet18", **PLAIN, graph="auto")

    def cycle(side: gan.Trainer | PlainTrainer, autocast) -> None:
        with autocast(), torch.device(run.device):  # the plain side makes its indices wherever the default is
            for i in range(iterations):
                side.iteration(i, real, y)

    def plain(kind: type) -> PlainTrainer:
        resnet = torchvision.models.resnet18()
        resnet.fc = nn.Identity()
        with torch.device(run.device):
            side = kind(trainer, resnet.eval().to(run.device), trainer.classifier)
        return side

    eager, compiled = plain(PlainTrainer), plain(CompiledPlain)
    compiled.compile()
    return dict(
        ours=lambda: [trainer.iteration(i, real, y) for i in range(iterations)],
        eager=lambda: cycle(eager, run.autocast),
        compile=lambda: cycle(compiled, run.autocast),
    )


def rates(run: training.Run, quick: bool) -> Iterator[dict]:
    """Images per second of each stage, and as a ratio to eager PyTorch and torch.compile, in the run's precision."""
    iterations = 2 if quick else 16  # one cycle of lazy R1
    for size, batch in [(16, 2)] if quick else [(64, 64), (128, 64), (256, 32)]:
        for stage, sides_of, images in (
            ("encoder step", stage1_sides, batch),
            ("embedding", stage2_sides, batch),
            ("stage 3", functools.partial(stage3_sides, iterations=iterations), iterations * batch),
        ):
            # Else torch.compile would give up: it compiles one function eight times at most.
            torch._dynamo.reset()
            sides, found, failed = sides_of(run, size, batch), {}, ""
            if quick:
                del sides["compile"]  # compiling takes minutes on a CPU
            for name, side in sides.items():
                try:
                    found[name] = images / seconds(side, run.device, turns=0 if quick else 3)
                # A side that this machine cannot run costs its ratio only; ours must run.
                except Exception as error:
                    if name == "ours":
                        raise
                    failed += f"; {name} cannot run: {type(error).__name__}"
            ratios = [f"{found['ours'] / found[name]:.2f} times {name}" for name in found if name != "ours"]
            note = ", ".join(ratios) + failed + quick * "; skipped for --quick: torch.compile"
            yield verdict(f"{stage} at {size} px, batch {batch}, images/s", found["ours"], note=note)


# Correctness first; rates last, because they take longest and may be cut off by SECONDS.
PARTS = (op_tests, bandwidth, waits, launches, busy, graphs, r1_error, short_runs, processes, rates)


def judge(run: training.Run, quick: bool) -> Iterator[dict]:
    """All verdicts, each with its part's name. A part that raises fails; one for which no time is left is skipped."""
    start = time.monotonic()
    for part in PARTS:
        name = part.__name__
        if time.monotonic() - start > SECONDS:
            yield verdict(name, note="skipped: no time is left") | {"part": name}
            continue
        try:
            for row in part(run, quick):
                yield row | {"part": name}
                if time.monotonic() - start > SECONDS:
                    yield verdict(f"what is left of {name}", note="skipped: no time is left") | {"part": name}
                    break
        except Exception as error:  # whatever a new machine may raise: the other parts still tell something
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            yield verdict(name, ok=False, note=why) | {"part": name}


@click.command()
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:1; cpu tells only that the parts run.")
@click.option("--quick", is_flag=True, help="Small sizes and few repetitions: do the parts run?")
@click.option("--out", metavar="JSON", default="gpu.json", show_default=True, help="File for the figures.")
def main(device: str, quick: bool, out: str) -> None:
    """Check on a GPU what was built without one. Exits with 1 if a verdict is FAIL."""
    from .__main__ import machine

    run, rows = training.start(device), []
    for row in judge(run, quick):
        click.echo(line(row))
        # JSON has neither infinity nor NaN.
        rows.append(row | {"value": row["value"] if row["value"] is None or math.isfinite(row["value"]) else None})
        # After every line: a machine that dies leaves what was found so far.
        Path(out).write_text(json.dumps(dict(machine=machine(), quick=quick, rows=rows), indent=1) + "\n")
    failed, skipped = (sum(line(r).startswith(word) for r in rows) for word in ("FAIL", "skip"))
    click.echo(f"{len(rows)} lines, {failed} failed, {skipped} skipped; {machine()}; wrote {out}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
