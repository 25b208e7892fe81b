"""The training step of stage 3 and image generation against the plain baseline, in fp32 and, where it pays, in bf16.

Each side has a process of its own, which keeps its networks, its data and its way of keeping memory; they take turns.
"""

import importlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import dataset
import gan
import training

from .baseline import R1_EVERY, PlainDecoder, both_losses, build
from .data import image_folder, usual_batches
from .timing import row, take_turns

ROOT = Path(__file__).parent.parent


def step_rows(quick: bool) -> list[dict]:
    """A row for each configuration and part of an iteration; where bf16 is the default, one for it too."""
    # Size, batch, discriminator, encoder. patch with resnet50 is the pair of the paper's best run.
    cases = [(64, 32, "global", "resnet18"), (64, 32, "patch", "resnet50")]
    if not quick:
        cases += [(128, 16, "global", "resnet18"), (128, 16, "patch", "resnet50")]
    contestants = ("ours", "bf16", "plain") if training.cpu_has_amx() else ("ours", "plain")
    rows = [precision_row()]
    with tempfile.TemporaryDirectory() as folder:
        data, environment = f"{folder}/images", os.environ | {"INFOSCC_CACHE": f"{folder}/cache"}
        # Noise at the larger of the sizes, so that nothing is enlarged.
        image_folder(Path(data), 640, 128)
        for case in cases:
            rounds = turns_of_processes(contestants, case, data, environment, 3 if quick else 7)
            rows += rows_of_case(case, rounds)
    return rows


def turns_of_processes(contestants, case, data, environment, turns) -> dict[str, list[dict]]:
    """What the sides' processes print, turn by turn; the first turn warms up and is left out."""
    sides = {
        side: subprocess.Popen(
            [sys.executable, "-m", "bench.step", json.dumps([side, *case, data])],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for side in contestants
    }  # fmt: skip
    rounds: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(turns):
        for side, process in sides.items():
            # One side at a time computes; the others wait at their stdin.
            print("go", file=process.stdin, flush=True)
            rounds[side].append(json.loads(process.stdout.readline()))
    for process in sides.values():
        process.stdin.close()
        process.wait()
    return {side: values[1:] for side, values in rounds.items()}


def rows_of_case(case, rounds) -> list[dict]:
    """The rows of one configuration: the iteration, its parts, memory and the wait for data."""
    name, rows = "{} px, batch {}, {}, {}".format(*case), []
    for side, part in itertools.product([s for s in rounds if s != "plain"], rounds["plain"][0]):
        ours, plain = ([r[part] for r in rounds[s]] for s in (side, "plain"))
        what = f"step {name}: {part}{' in bf16' if side == 'bf16' else ''}"
        result = row(what, ours, plain, "plain", unit="MiB" if part == "peak MiB" else "s")
        if part == "iteration":
            result["images_per_second"] = case[1] / result["ours"]
        if part == "iteration" and side == "ours":
            result["gflop"] = count_flops(*case) / 1e9
            result["of_peak"] = result["gflop"] / result["ours"] / peak_gflops()
            result["note"] = f"{result['gflop']:.0f} GFLOP, {result['of_peak']:.0%} of the matrix-product peak"
        rows.append(result)
    waits = [r["data"] / r["iteration"] for r in rounds["ours"]]
    note = f"{statistics.median(waits):.2%} of an iteration"
    return [*rows, row(f"step {name}: waiting for data", waits, unit="part", note=note)]


def serve(side: str, size: int, batch: int, disc: str, backbone: str, data: str) -> None:
    """A side's process: at each line on stdin run one R1 cycle and print the seconds of its parts."""
    if side != "plain":  # it is part of what makes ours fast
        training.keep_memory()
    trainer = build(side, size, batch, disc, backbone)
    # After `build`, where the sides draw different amounts.
    torch.manual_seed(1)
    batches = (plain_feed if side == "plain" else feed)(data, size, batch)
    real, y = next(batches)
    parts = dict(regularisation=trainer.regularise, D=lambda: trainer.discriminate(real, y), G=trainer.generate)
    # 200,000: any number of images, as the average takes the same time.
    parts |= dict(R1=lambda: trainer.penalise(real, y), EMA=lambda: trainer.average(200_000))
    for _ in sys.stdin:
        waited, start = 0.0, time.perf_counter()
        # A whole cycle: an iteration with R1 costs more than the others.
        for i in range(R1_EVERY):
            asked = time.perf_counter()
            real, y = next(batches)
            waited += time.perf_counter() - asked
            trainer.iteration(i, real, y)
        times = {"iteration": (time.perf_counter() - start) / R1_EVERY, "data": waited / R1_EVERY}
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            times[name] = time.perf_counter() - start
        print(json.dumps(times | {"peak MiB": peak_kib() / 1024}), flush=True)


def peak_kib() -> int:
    """The most memory that this process has held. Not ru_maxrss, which on Linux starts at the parent's."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.split("VmHWM:")[1].split()[0])


def feed(data: str, size: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as gan.py gets them: shuffled, prepared by a thread, converted by the caller."""
    for x, y in dataset.open_dataset(data, size).batches(batch, "cpu"):
        yield training.to_float(x), y


def plain_feed(data: str, size: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same images by ImageFolder and two workers."""
    for x, y in usual_batches(Path(data) / "train", batch, size):
        yield x, F.one_hot(y, 3).float()


# ---------------------------------------------------------------------------------------------------------------------
# What the step computes.


def precision_row() -> dict:
    """How far the losses of the two sides are apart in fp32, from the same weights and random numbers."""
    apart = []
    for disc in ("global", "patch"):
        # Small: this is about numbers and not about time.
        sides = tuple(build(side, 32, 8, disc, "resnet18") for side in ("ours", "plain"))
        real, y = torch.rand(8, 3, 32, 32) * 2 - 1, torch.eye(3)[torch.arange(8) % 3]
        for update, arguments in (("regularise", ()), ("discriminate", (real, y))):
            ours, plain = both_losses(sides, update, arguments)
            apart.append(abs(ours / plain - 1))
    note = f"at most {max(apart):.0e} apart, relatively"
    return row("step: losses in fp32 against the plain ones", [max(apart)], unit="part", note=note)


class CountFlops(TorchDispatchMode):
    """Adds up the floating-point operations of what runs within it, by torch's own formulas.

    torch's FlopCounterMode also attributes them to modules, by hooks that refuse autograd.grad on leaves, as in R1.
    """

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        # Only products and convolutions have one: elementwise work counts as nothing.
        formula = flop_registry.get(function._overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


def count_flops(size: int, batch: int, disc: str, backbone: str) -> float:
    """Floating-point operations of our iteration, the mean over one R1 cycle, with usual convolutions."""
    conv2d = importlib.import_module("ops.conv2d")  # ops.conv2d is the function
    trainer = build("ours", size, batch, disc, backbone)
    real, y = torch.rand(batch, 3, size, size), torch.eye(3)[torch.arange(batch) % 3]
    fast, conv2d._FAST = conv2d._FAST, ()  # Winograd's convolutions are no operators of torch's
    try:
        with CountFlops() as counter:
            for i in range(R1_EVERY):
                trainer.iteration(i, real, y)
    finally:
        conv2d._FAST = fast
    return counter.total / R1_EVERY


def peak_gflops(n: int = 2048) -> float:
    """Best rate of a float32 matrix product on this machine, of eight."""
    # 2048: matrices of 16 MB, large enough for the full rate.
    a, best = torch.randn(n, n), 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        # A multiplication and an addition count as two.
        best = max(best, 2 * n**3 / (time.perf_counter() - start) / 1e9)
    return best


def generation_rows(quick: bool) -> list[dict]:
    """Images from a trained generator: batch 16 at 256 px, with the convolved maps kept, as gan.load keeps them."""
    training.keep_memory()
    # Untrained: the time does not depend on the weights.
    decoder = gan.Decoder(256, 3).to(memory_format=torch.channels_last).eval()
    plain = PlainDecoder(256, 3).eval()
    plain.take(decoder)
    y, latents = torch.eye(3)[torch.arange(16) % 3], torch.randn(16, decoder.latent_width)
    with torch.inference_mode():
        convolved = decoder.generator.convolved()
        sides = dict(ours=lambda: decoder(y, latents, convolved), plain=lambda: plain(y, latents))
        times = take_turns(sides, turns=3 if quick else 11)
    return [row("generation, 256 px, batch 16", times["ours"], times["plain"], "plain")]


if __name__ == "__main__":
    serve(*json.loads(sys.argv[1]))
