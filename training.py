"""What the three stages share: device, precision, processes, checkpoints, resuming, the log, and small helpers.

Plain functions around torch. A stage calls them in this order:

    run = training.start(...)           device, precision, processes, seeds
    state = training.resume(...)        this stage's own checkpoint, to go on from
    log = training.Log(...)             progress bar, stats.jsonl, TensorBoard
    training.save(path, state)          a checkpoint: written aside, then renamed
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

VERSION = 2  # of the checkpoint format


# ---------------------------------------------------------------------------------------------------------------------
# Options that every stage takes.


# fmt: off
OPTIONS = [
    click.option("--data",      metavar="NAME|PATH", default="critters", help="critters, afhq, celeba, fashion-mnist, or a path to a folder or zip."),
    click.option("--outdir",    metavar="DIR", help="Where results go.  [default: runs/<data name>]"),
    click.option("--preset",    metavar="NAME|none", help="Settings of critters, afhq, celeba or fashion-mnist.  [default: those of the data, where it is recognised]"),
    click.option("--protocol",  type=click.Choice(["paper", "ours"]), help="paper: every setting as published; each can still be overridden by its own option.  [default: paper for afhq and celeba]"),
    click.option("--size",      metavar="PIXELS", type=click.IntRange(16, 1024), help="Image size, a power of two.  [default: by data]"),
    click.option("--batch",     metavar="N", type=click.IntRange(2), help="Images per step, over all processes.  [default: by data]"),
    click.option("--init",      metavar="FILE", help="Checkpoint to take the network's first weights from."),
    click.option("--seed",      metavar="N", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of everything random."),
    click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", help="auto: bf16 where a GPU has it or a CPU multiplies matrices in it (AMX); else fp16 on GPUs, fp32 on CPUs (the encoder's below 64 px always)."),
    click.option("--tf32/--no-tf32", default=False, help="Let GPUs multiply fp32 matrices in TF32: faster, and 1,000 times less exact."),
    click.option("--device",    metavar="DEVICE", default="auto", help="cpu, cuda, cuda:1; auto: cuda if there is one."),
    click.option("--workers",   metavar="N", type=click.IntRange(0), default=1, help="Threads that prepare batches; 0: none."),
    click.option("--resume/--no-resume", default=True, help="Go on from the checkpoint in the output folder, or start over."),
    click.option("--smoke",     is_flag=True, help="A run of seconds that takes every code path; its results mean nothing."),
    click.option("--dry-run",   is_flag=True, help="Print the options, as far as they are known without the data, and stop."),
]
# fmt: on


class BadOption(click.ClickException):
    """A bad option, reported in one line."""

    exit_code = 2


def with_options(own: list[Callable]) -> Callable:
    """Decorator: gives a click command the options of its stage, then those that every stage takes.

    Whatever goes wrong with an option or a file is reported in one line.
    """

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def guarded(**options):
            for name, value in options.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise BadOption(f"--{name} {value}: give a finite number")
            try:
                command(**options)
            except click.UsageError as error:
                raise BadOption(error.message) from None  # click would print its usage lines above the error
            except OSError as error:
                if error.filename is None:
                    raise
                raise click.ClickException(f"{error.filename}: {error.strerror}") from None
            if dist.is_initialized():
                dist.destroy_process_group()

        for option in reversed(own + OPTIONS):
            guarded = option(guarded)
        return guarded

    return decorate


def resolve(presets: dict[str, dict], paper: dict[str, dict], preset: str, options: dict) -> dict:
    """Fill in the options left at None, and add the settings that have no option.

    They come from the row '' of `presets`, which serves any data, then from the row of the preset; under --protocol
    paper the rows of `paper` go before both. The preset itself and the protocol become part of the options.
    """
    protocol = options["protocol"] or ("paper" if preset in ("afhq", "celeba") else "ours")
    row = presets[""] | presets.get(preset, {})
    if protocol == "paper":
        row |= paper[""] | paper.get(preset, {})
    given = {name: value for name, value in options.items() if value is not None}
    return dict.fromkeys(options) | row | given | {"preset": preset or "none", "protocol": protocol}


def out_folder(options: dict) -> Path:
    """The run's folder: --outdir, or runs/<data name>; smoke runs stay apart."""
    data = Path(options["data"]).expanduser().resolve()
    name = re.sub(r"[^\w.-]+", "_", data.stem if data.is_file() else data.name) or "data"
    return Path(options["outdir"] or Path("runs") / (name + "-smoke" * options["smoke"]))


def make_folder(path: Path) -> None:
    """Make the run's folder. Raises click.ClickException if that is impossible, or nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise click.ClickException(f"cannot write to {path}: {error.strerror}; give another --outdir") from None


def write_options(path: Path, options: dict) -> None:
    """Save a command's resolved options beside its results, as JSON; numbers without a value (NaN) become null."""
    plain = json.loads(json.dumps(options | {"torch": torch.__version__}), parse_constant=lambda _: None)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(plain, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Device, precision, processes, seeds.


class Scaler(torch.amp.GradScaler):
    """GradScaler that also accepts the empty state of a run without loss scaling: a resumed run may change precision."""

    def load_state_dict(self, state_dict: dict) -> None:
        if state_dict:
            super().load_state_dict(state_dict)


@dataclass
class Run:
    """Where and how a stage runs. `dtype` is the autocast dtype, None for fp32."""

    device: torch.device
    dtype: torch.dtype | None
    seed: int
    rank: int = 0
    world: int = 1

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context in which the networks compute in the chosen precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def scaler(self) -> Scaler:
        """Loss scaler for one optimiser; it only acts in fp16."""
        return Scaler(self.device.type, enabled=self.dtype is torch.float16)

    def reseed(self, images: int) -> None:
        """Derive all randomness from (seed, rank, images seen): a resumed run then draws what an unbroken one would."""
        key = hashlib.sha256(f"{self.seed} {self.rank} {images}".encode()).digest()
        torch.manual_seed(int.from_bytes(key[:7], "little"))

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace gradients by their mean over all processes, in one message; does nothing with one process."""
        if self.world == 1:
            return
        parameters = [p for p in parameters if p.requires_grad]
        # With --per-class, the discriminator of a class has no gradient where this process had no image of the class.
        used = [p.grad is not None for p in parameters]
        grads = [p.grad if u else torch.zeros_like(p) for p, u in zip(parameters, used, strict=True)]
        # ones() is made on the device; a Python list would have to be copied there, and waited for.
        flags = grads[0].new_ones(len(used)) if all(used) else grads[0].new_tensor(used)
        flat = torch.cat([*(g.flatten() for g in grads), flags])
        dist.all_reduce(flat)
        flat /= self.world
        *means, anywhere = flat.split([*(g.numel() for g in grads), len(grads)])
        anywhere = used if all(used) else (anywhere > 0).tolist()
        for p, grad, mean, some in zip(parameters, grads, means, anywhere, strict=True):
            p.grad = grad.copy_(mean.view_as(p)) if some else None


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """'cpu', 'cuda' (this process's), 'cuda:1', or 'auto' -> the device; a CUDA device comes with its number.

    Raises click.ClickException for one that this machine does not have.
    """
    try:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dev = torch.device(device)
        if dev.type not in ("cpu", "cuda"):
            raise RuntimeError("neither a CPU nor a CUDA device")
        if dev.type == "cuda" and dev.index is None:
            dev = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=dev)
        return dev
    except (RuntimeError, AssertionError) as error:
        raise click.ClickException(f"--device {device}: {str(error).splitlines()[0]}") from None


def cpu_has_amx() -> bool:
    """Whether this CPU has bf16 matrix units. Without them bf16 only adds conversions."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
    return bool(capabilities.get("amx_bf16"))


def start(device: str = "auto", precision: str = "auto", seed: int = 0, tf32: bool = False) -> Run:
    """Set up the device, the precision, the processes of torchrun and the seeds.

    fp32 means fp32 on GPUs too, unless tf32 is asked for; both of PyTorch's switches are set, whatever they were.

    Raises click.ClickException for a device or precision that this machine does not have.
    """
    keep_memory()
    torch.set_flush_denormal(True)  # Adam's second moments decay into denormals, which are slow on CPUs
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    dev = choose_device(device)
    if dev.type == "cuda":
        torch.cuda.set_device(dev)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        if precision == "auto":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "auto" and cpu_has_amx():
        precision = "bf16"
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if dev.type == "cuda" else "gloo")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    Run(dev, dtype, seed).reseed(0)  # as rank 0: networks built next start with the same weights in every process
    return Run(dev, dtype, seed, rank, world)


def keep_memory() -> None:
    """Have glibc keep freed memory. By default it unmaps large tensors, and every page costs a fault at the next step."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: never map a tensor on its own (M_MMAP_THRESHOLD cannot go beyond 32 MiB)
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never hand memory back
        mallopt(-2, 64 * 2**20)  # M_TOP_PAD: grow in steps of 64 MiB


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers.


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Gives a temporary path in the same folder and renames it to `path` at the end: never half a file under its name."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in [-1, 1], channels_last."""
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """float [B, 3, S, S] in [-1, 1] -> uint8 [B, S, S, 3], rounded to the nearest level: undoes `to_float`."""
    return x.float().mul(127.5).add(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def entropy_bits(labels: torch.Tensor) -> float:
    """H(Y) in bits: the entropy of the rows of labels [N, Y] as they occur together, not a sum over attributes."""
    counts = torch.unique(labels, dim=0, return_counts=True)[1].double()
    return torch.special.entr(counts / len(labels)).sum().item() / math.log(2)


def information_bits(logits: torch.Tensor, y: torch.Tensor, kind: str, h_y: float) -> float:
    """The lower bound I(Y;E) >= H(Y) - H(Y|E) of equations (2)-(5), in bits.

    H(Y|E) is bounded from above by the mean cross-entropy of y [N, Y] under logits [N, Y]: for kind 'one-hot' of the
    classes, for 'multi-label' the sum of the attributes' binary ones. The logits must mean probabilities: a classifier
    trained on balanced attributes has its balance subtracted first. h_y: H(Y) in bits.
    """
    if kind == "one-hot":
        nats = F.cross_entropy(logits.double(), y.double())
    else:
        nats = F.binary_cross_entropy_with_logits(logits.double(), y.double(), reduction="none").sum(1).mean()
    return h_y - nats.item() / math.log(2)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: a dict of plain Python values and tensors, read without running code, written whole or not at all.


def save(path: Path, state: dict) -> None:
    """Write a checkpoint. Raises click.ClickException if it cannot be written; the old file is then untouched."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            torch.save(state | {"version": VERSION}, temporary)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk by a RuntimeError
        why = getattr(error, "strerror", None) or "is the disk full?"
        raise click.ClickException(f"cannot write {path}: {why}") from None


def load(path: Path | str, stage: str, finished: bool = False) -> dict:
    """Read a checkpoint of the named stage ('encoder', 'classifier' or 'gan') to the CPU.

    finished: refuse the encoder or classifier of a run that was stopped before its end. Raises click.ClickException if
    the file is missing, not a checkpoint, of another stage or format.
    """
    path = Path(path)
    if not path.is_file():
        raise click.ClickException(f"{path} does not exist: run {stage}.py with the same --data and --outdir first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise nearly anything
        raise click.ClickException(
            f"{path} is not a checkpoint of this project ({type(error).__name__} while reading it)"
        ) from None
    if not isinstance(state, dict) or "stage" not in state:
        raise click.ClickException(f"{path} is not a checkpoint of this project: it has no entry 'stage'")
    if state["stage"] != stage:
        raise click.ClickException(f"{path} was written by {state['stage']}.py, but one of {stage}.py is needed here")
    if state.get("version") != VERSION:
        raise click.ClickException(f"{path} has format {state.get('version')}, this code reads format {VERSION}")
    if finished and "results" not in state:
        raise click.ClickException(f"{path} is of an unfinished run: run {stage}.py again, to its end")
    return state


def resume(path: Path, stage: str, options: dict, data, keys: Iterable[str]) -> dict:
    """The stage's own checkpoint to go on from; {} if there is none, or with --no-resume.

    data: the Dataset. keys: the options that a resumed run may not change. Raises click.ClickException where the
    checkpoint was made from other images or with other options.
    """
    if not options["resume"] or not path.exists():
        return {}
    state, remedy = load(path, stage), "give --no-resume to start over, or another --outdir"
    check_images(state["data"], data, path, remedy)
    # Weights to start from do not matter to a run that has started, unless other ones are asked for.
    keys = [*keys, "init"] if options["init"] else keys
    check_same(state["options"], options, keys, path, remedy)
    return state


def check_images(theirs: dict, data, file: Path | str, remedy: str) -> None:
    """Refuse a checkpoint whose entry 'data' names other images than the Dataset `data`."""
    if theirs["fingerprint"] != data.fingerprint:
        raise click.ClickException(f"{file} was made from other images ({theirs['data']}) than {data.data}: {remedy}")


def check_same(theirs: dict, ours: dict, keys: Iterable[str], file: Path | str, remedy: str) -> None:
    """Refuse a checkpoint made with other settings, naming the first of `keys` that differs."""
    for key in keys:
        if theirs.get(key) != ours.get(key):
            raise click.ClickException(
                f"{file} was made with {key} {theirs.get(key)!r}, but here {key} is {ours.get(key)!r}: {remedy}"
            )


def init_weights(network: torch.nn.Module, weights: dict, source: str) -> None:
    """Copy `weights` into `network`.

    Raises click.ClickException naming the first tensors that are missing or differ in shape.
    """
    own = network.state_dict()
    wrong = [f"{k} {tuple(own[k].shape)} is {tuple(weights[k].shape) if k in weights else 'missing'} there"
             for k in own if k not in weights or weights[k].shape != own[k].shape]  # fmt: skip
    wrong += [f"{k} is not in this network" for k in weights if k not in own]
    if wrong:
        more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        raise click.ClickException(f"--init {source} does not fit: {'; '.join(wrong[:2])}{more}")
    network.load_state_dict(weights)


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """Short hash of a network's weights, to tell which encoder a classifier belongs to."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Log: numbers gathered on the device, fetched once a line.


class Log:
    """Progress bar on stderr, one JSON object a line in `stats.jsonl`, the same numbers in TensorBoard.

    The bar moves at once in a terminal, every 10 seconds in a file. `add` only keeps device tensors; `write` fetches
    all means in one transfer, so nothing synchronises between log lines. Only the first process writes.
    """

    def __init__(self, outdir: Path, stage: str, total: int, done: int = 0, unit: str = "img", rank: int = 0):
        self.stage, self.rank = stage, rank
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=stage,
            unit=unit,
            unit_scale=True,
            disable=rank != 0,
            dynamic_ncols=True,
            smoothing=0.1,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a file keeps every state of the bar
        )
        self.time = time.time()
        if rank == 0:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed for --help

            self.file = open(outdir / "stats.jsonl", "a", buffering=1)  # noqa: SIM115
            self.board = SummaryWriter(str(outdir / "tensorboard" / stage))

    def add(self, **values: torch.Tensor) -> None:
        """Take scalar tensors into the means of the next line."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def step(self, images: int) -> None:
        """Advance the bar."""
        self.bar.update(images)

    def write(self, images: int, **extra: float) -> dict[str, float]:
        """Write the means since the last line, with `extra`, at `images` images seen; returns them."""
        means = torch.stack([*self.sums.values()]).tolist() if self.sums else []
        line = {name: mean / self.counts[name] for name, mean in zip(self.sums, means, strict=True)} | extra
        self.sums, self.counts = {}, {}
        if self.rank == 0:
            entry = {"stage": self.stage, "images": images, "seconds": round(time.time() - self.time, 2)}
            self.file.write(json.dumps(entry | line) + "\n")
            for name, value in line.items():
                self.board.add_scalar(name, value, images)
            self.bar.set_postfix_str(" ".join(f"{n} {v:.3g}" for n, v in line.items()), refresh=False)
        return line

    def picture(self, name: str, image, images: int) -> None:
        """Put a uint8 [H, W, 3] picture into TensorBoard."""
        if self.rank == 0:
            self.board.add_image(name, image, images, dataformats="HWC")

    def close(self) -> None:
        """Finish the bar and the files."""
        self.bar.close()
        if self.rank == 0:
            self.file.close()
            self.board.close()
