"""What the three stages share: options, device, precision, processes, updates, the log, small helpers.

Plain functions around torch. What a stage calls:

    run = training.start(...)                device, precision, processes, seeds
    stepper = training.Stepper(...)          an optimiser that skips gradients that are not finite
    state = checkpoints.resume(...)          this stage's own checkpoint, to go on from
    with training.lock(outdir, stage):       one run at a time in a folder
    with training.signals(run):              SIGINT and SIGTERM ask for an end
    with training.Log(...) as log:           progress bar, stats.jsonl, TensorBoard
        run.reseed(images)                   at each iteration: all randomness follows from the images seen
        run.stopping(iteration)              whether an end was asked for
        checkpoints.save(path, state)        written aside, then renamed
"""

import atexit
import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import checkpoints

PATH_MAX = 4096  # bytes of a path, as Linux has it
NO_PATHS = ("critters", "afhq", "celeba", "fashion-mnist")  # what --data takes beside paths


# ---------------------------------------------------------------------------------------------------------------------
# Options that every stage takes, its errors, and the folder of a run.


class FilePath(click.Path):
    """A path, with ~ as the home. Refuses what no file can be called; a user that ~ does not know stays as written."""

    def convert(self, value: str, *where) -> object:
        value = os.path.expanduser(value)  # shells leave ~ as it is in --data=~/photos
        if "\0" in os.fspath(value) or len(os.fspath(value).encode(errors="surrogatepass")) >= PATH_MAX:
            self.fail(f"a path has fewer than {PATH_MAX:,} bytes, none of them NUL", *where)
        if any("\ud800" <= c <= "\udfff" for c in os.fspath(value)):  # how Python writes what is not UTF-8
            self.fail(f"{value!r} is not UTF-8: rename it", *where)
        return super().convert(value, *where)


# The upper bounds are far above what anybody trains: they catch a typo before it costs time or memory.
# fmt: off
OPTIONS = [
    click.option("--data",      metavar="NAME|PATH", type=FilePath(), default="critters", help="critters, afhq, celeba, fashion-mnist, or a path to a folder or zip."),
    click.option("--outdir",    metavar="DIR", type=FilePath(), help="Where results go.  [default: runs/<data name>]"),
    click.option("--preset",    metavar="NAME|none", help="Settings of critters, afhq, celeba or fashion-mnist.  [default: those of the data, where it is recognised]"),
    click.option("--protocol",  type=click.Choice(["paper", "ours"]), help="paper: every setting as published; each can still be overridden by its own option.  [default: paper for afhq and celeba]"),
    click.option("--size",      metavar="PIXELS", type=click.IntRange(checkpoints.SIZES[0], checkpoints.SIZES[-1]), help="Image size, a power of two.  [default: the preset's; of other data, what the images allow, at most 256, on CPUs 32]"),
    click.option("--batch",     metavar="N", type=click.IntRange(2, 2**16), help="Images per step, over all processes.  [default: encoder.py 64; gan.py 16 up to 64 px, then 32; classifier.py 256; --protocol paper: encoder.py and gan.py 32, for celeba 128 and 64]"),
    click.option("--init",      metavar="FILE", type=FilePath(), help="Checkpoint to take the network's first weights from."),
    click.option("--seed",      metavar="N", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of everything random."),
    click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", help="auto: bf16 if the GPU has it or the CPU has AMX; else fp16 on GPUs, fp32 on CPUs. encoder.py below 64 px takes fp32 on every CPU."),
    click.option("--tf32/--no-tf32", default=None, help="Let GPUs multiply fp32 matrices in TF32: faster, and 1,000 times less exact.  [default: in convolutions, with bf16 and fp16]"),
    click.option("--device",    metavar="DEVICE", default="auto", help="cpu, cuda, cuda:1; auto: cuda if there is one."),
    click.option("--workers",   metavar="N", type=click.IntRange(0, 256), default=1, help="Threads that prepare batches; 0: none."),
    click.option("--resume/--no-resume", default=True, help="Go on from the checkpoint in the output folder, or start over."),
    click.option("--smoke",     is_flag=True, help="A run of seconds that takes every code path; its results mean nothing."),
    click.option("--dry-run",   is_flag=True, help="Print the options, as far as they are known without the data, and stop."),
]
# fmt: on


class BadOption(click.ClickException):
    """A bad option, reported in one line."""

    exit_code = 2  # as click's own usage errors


class Stopped(click.ClickException):
    """The end that a signal asked for: says how to go on, and exits as shells do for the signal (130, 143)."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum, self.exit_code = signum, 128 + signum

    def show(self, file=None) -> None:
        # In place of click's, which begins with "Error: ": an end that was asked for is no error.
        if int(os.environ.get("RANK", 0)) == 0:  # all processes stop together
            with contextlib.suppress(OSError):  # the exit code is to come in any case
                click.echo(self.message, err=True)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Within it, what the user got wrong, and what the machine has no room for, is reported in one line."""
    # The inner `try` turns errors into click's; the outer one makes the text of these one line.
    try:
        try:
            yield
        except click.UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # no error: a group of commands shows its help
                raise
            raise BadOption(error.format_message()) from None  # click would print its usage lines above the error
        except KeyboardInterrupt:
            raise Stopped(signal.SIGINT, "stopped") from None
        except BrokenPipeError:  # the reader has seen enough, as `head` does: click ends without a word
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{where}{error.strerror or error}") from None
        except (MemoryError, RuntimeError) as error:
            # On CPUs, PyTorch reports too little memory by a plain RuntimeError: only its text tells.
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
                raise
            raise click.ClickException("not enough memory: smaller images or batches take less") from None
    except click.ClickException as error:
        # Names come from anywhere, and may hold control characters, or be as long as a page.
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in error.message)
        # The middle goes: what is wrong stands at the beginning, what to do about it at the end.
        error.message = text if len(text) < 2000 else f"{text[:1000]} ... {text[-900:]}"
        if int(os.environ.get("RANK", 0)) > 0 and not isinstance(error, Stopped):
            # 15 seconds, found by trying: on a busy machine torchrun took more than 3.
            time.sleep(15)  # where the first process says the same, torchrun ends this one meanwhile
        raise


class OneLine(click.Command):
    """A command that reports errors by `one_line`, prints on any terminal, and draws without one."""

    def make_context(self, *arguments, **options) -> click.Context:
        # Before click reads the options: it prints --help and errors from within this call.
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed, as some schedulers start jobs
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError, OSError):  # notebooks put streams of their own there
                stream.reconfigure(errors="backslashreplace")  # names may have letters that the terminal has not
        os.environ["MPLBACKEND"] = "agg"  # notebooks' shells name one that may not be installed
        with one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context) -> object:
        with one_line():
            # click's ranges let NaN through: it is neither below nor above a bound.
            for name, value in context.params.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise BadOption(f"--{name.replace('_', '-')} {value}: give a finite number")
            return super().invoke(context)


class Screen:
    """stdout or stderr, for what no run should end for: its reader may have gone, or it may be a file on a full disk."""

    def __init__(self, stream):
        self.stream = stream
        atexit.register(self.end)  # such functions run before Python's own last flush

    # tqdm and click ask for isatty, encoding and more.
    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def end(self) -> None:
        """Drop what could not be written: Python would try it again, and end with 120 for that alone."""
        with contextlib.suppress(OSError, ValueError):
            try:
                self.stream.flush()
            except OSError:
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), self.stream.fileno())  # Python's last flush then succeeds


def with_options(own: list[Callable]) -> Callable:
    """Decorator: gives a click command the options of its stage, then those that every stage takes."""

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def guarded(**options):
            out, err = Screen(sys.stdout), Screen(sys.stderr)
            try:
                # print, click and tqdm look up sys.stdout and sys.stderr when they write, so all of them go this way.
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    command(**options)
            except Stopped as end:
                # With --no-resume, the same command would start over.
                how = "" if options["resume"] else " without --no-resume"
                raise Stopped(end.signum, f"{end.message}; the same command{how} goes on") from None
            except KeyboardInterrupt:  # a run that starts over may have saved nothing yet
                how = "; the same command goes on" if options["resume"] else ""
                raise Stopped(signal.SIGINT, f"stopped{how}") from None
            if dist.is_initialized():
                dist.destroy_process_group()  # else NCCL warns when the program ends

        # Decorators apply from the last to the first; --help then lists the stage's own options on top.
        for option in reversed(own + OPTIONS):
            guarded = option(guarded)
        return guarded

    return decorate


def resolve(presets: dict[str, dict], paper: dict[str, dict], preset: str, options: dict) -> dict:
    """Fill in the options left at None, and add the settings that have no option.

    They come from the row '' of `presets`, which serves any data, then from the row of the preset; under --protocol
    paper the rows of `paper` go before both. The preset itself and the protocol become part of the options.
    """
    # afhq and celeba are the data of the paper's tables.
    protocol = options["protocol"] or ("paper" if preset in ("afhq", "celeba") else "ours")
    row = presets[""] | presets.get(preset, {})
    if protocol == "paper":
        row |= paper[""] | paper.get(preset, {})
    given = {name: value for name, value in options.items() if value is not None}  # None: not given
    return dict.fromkeys(options) | row | given | {"preset": preset or "none", "protocol": protocol}


def out_folder(options: dict) -> Path:
    """The run's folder: --outdir, or runs/<data name>; smoke runs stay apart."""
    # ".", "photos/" and links get the name of the folder that they lead to; a preset is no path.
    given = os.path.expanduser(options["data"])
    data = Path(given if given in NO_PATHS else os.path.realpath(given))
    # Spaces and the like would need quotes in every later command.
    name = re.sub(r"[^\w.-]+", "_", data.stem if data.is_file() else data.name) or "data"
    return Path(options["outdir"] or Path("runs") / (name + "-smoke" * options["smoke"]))


def make_folder(path: Path) -> None:
    """Make the run's folder. Raises click.ClickException if that is impossible, or nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        # A folder can be there and still be read-only: better found now than at the first save.
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise click.ClickException(f"cannot write to {path}: {error.strerror}; give another --outdir") from None


@contextlib.contextmanager
def lock(outdir: Path, stage: str, rank: int = 0) -> Iterator[None]:
    """Keep other runs from training in a folder, which it makes, and clear what killed runs left there.

    The kernel drops the lock with its process. Raises click.ClickException naming who holds it, or if nothing can be
    written there.
    """
    if rank > 0:  # the first process holds it for all
        yield
        return
    make_folder(outdir)
    # Not "w": it would empty the file, which says who holds the lock, before this run has it.
    with open(outdir / ".lock", "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read(200).decode(errors="replace").strip() or "another run"
            raise click.ClickException(
                f"{outdir} is in use by {who}: wait for its end, or give another --outdir"
            ) from None
        except OSError:  # a file system without locks
            pass
        try:
            file.truncate(0)
            file.write(f"{stage}.py, process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            raise click.ClickException(f"cannot write to {outdir}: {error.strerror}; give another --outdir") from None
        # Safe once the lock is held: no other run has temporary files here.
        for folder in (outdir, outdir / "snapshots", outdir / "samples"):
            for left in folder.glob(".*"):  # temporary files of `checkpoints.atomic`, and no others
                if re.fullmatch(r"\.(encoder|classifier|gan|stats|\d+)([.-]\w+)?\.\d+\.(pt|jsonl?|png)", left.name):
                    left.unlink(missing_ok=True)
        yield


def write_options(path: Path, options: dict) -> None:
    """Save a command's resolved options beside its results, as JSON; numbers without a value (NaN) become null."""
    try:
        with checkpoints.atomic(path) as temporary:
            temporary.write_text(to_json(options | {"torch": torch.__version__}, indent=2) + "\n")
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Device, precision, processes, seeds.


@dataclass
class Run:
    """Where and how a stage runs. `dtype` is the autocast dtype, None for fp32."""

    device: torch.device
    dtype: torch.dtype | None
    seed: int
    rank: int = 0
    world: int = 1
    signal: int = 0  # the number of the signal that asked for an end
    group: object = None  # of the processes, for messages between CPUs
    flat: torch.Tensor | None = None  # what `average_gradients` sends, kept from one update to the next

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context in which the networks compute in the chosen precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def reseed(self, images: int) -> None:
        """Derive all randomness from (seed, rank, images seen): a resumed run then draws what an unbroken one would."""
        # A hash, so that seed 0 after one image does not draw what seed 1 draws after none, as with a sum.
        key = hashlib.sha256(f"{self.seed} {self.rank} {images}".encode()).digest()
        torch.manual_seed(int.from_bytes(key[:7], "little"))  # 7 bytes fit a signed 64-bit seed

    def stopping(self, iteration: int) -> int:
        """The signal that asked for an end of the run, else 0: the same in all processes, at the same iteration."""
        if self.world == 1:
            return self.signal
        if iteration % 8:  # often enough, and too seldom to cost anything
            return 0
        # Between CPUs: a message between GPUs would wait for all their work. MAX: 0 is no signal, so one is enough.
        asked = torch.tensor(self.signal)
        dist.all_reduce(asked, dist.ReduceOp.MAX, self.group)
        return int(asked)

    def first(self, action: Callable[[], object]) -> object:
        """Run action() in the first process and return its result in all of them: only that one needs the files.

        A click.ClickException of it is raised in all of them.
        """
        if self.world == 1:
            return action()
        box: list = [None]
        if self.rank == 0:
            try:
                box = [(action(), None)]
            except click.ClickException as error:
                box = [(None, error.message)]
        dist.broadcast_object_list(box, group=self.group)
        value, message = box[0]
        if message:  # in all: else the others would wait for a process that has ended
            raise click.ClickException(message)
        return value

    def agree(self, facts: dict) -> None:
        """Raise click.ClickException unless all processes have the same facts: else they would train different runs."""
        everyone = [facts] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, facts, self.group)
        # Each compares itself with all: whoever differs, every process raises, and none is left waiting.
        for rank, theirs in enumerate(everyone):
            for name, value in facts.items():
                if theirs[name] != value:
                    raise click.ClickException(
                        f"process {rank} has other {name} than process {self.rank}: start all alike"
                    )

    def wait(self) -> None:
        """All processes meet here; the others wait while the first one saves and measures."""
        if self.world > 1:
            dist.barrier(self.group)  # which waits an hour; the default group gives up after a minute

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace gradients by their mean over all processes, in one message; does nothing with one process.

        The same parameters must have gradients in every process. Nothing here waits for the device.
        """
        if self.world == 1:
            return
        parameters = [p for p in parameters if p.grad is not None]  # an update may leave layers out
        grads, sizes = [p.grad for p in parameters], [p.numel() for p in parameters]
        total = sum(sizes)
        if self.flat is None or self.flat.numel() < total:
            self.flat = grads[0].new_empty(total)  # one for all updates: as large as the largest
        flat = self.flat[:total]
        # Parts in the memory formats of their parameters: both copies below then move plain memory, many in one launch.
        parts = [v.as_strided(p.shape, p.stride()) for v, p in zip(flat.split(sizes), parameters, strict=True)]
        torch._foreach_copy_(parts, grads)
        if dist.get_backend() == "nccl":
            dist.all_reduce(flat, dist.ReduceOp.AVG)
        else:  # gloo has no mean
            dist.all_reduce(flat)
            flat /= self.world
        torch._foreach_copy_(grads, parts)


class Stepper:
    """A fused optimiser with its loss scaler. If a gradient is not finite, the update is skipped and counted.

    Raises ValueError for one that is not fused: those skip nothing.

    Nothing here waits for the device; `skipped` [] and `steps` [] are counted there, for `check_finite`.
    """

    def __init__(self, run: Run, optimizer: torch.optim.Optimizer):
        if not optimizer.defaults.get("fused"):
            raise ValueError("Stepper needs a fused optimiser: others do not skip gradients that are not finite")
        self.run, self.optimizer = run, optimizer
        # For fp16 alone: bf16 has the range of fp32.
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype is torch.float16)
        # Tensors, since a CUDA graph repeats what the device does: numbers of Python would count its capture alone.
        self.skipped, self.steps = torch.zeros(2, device=run.device).unbind()

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next steps, times a group's `speed` if it has one. CUDA graphs read it from a tensor."""
        for group in self.optimizer.param_groups:
            own = rate * group.get("speed", 1)
            # A graph keeps the tensor it was captured with: the new rate has to go into that one.
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(own)
            else:
                group["lr"] = own

    def step(self, loss: torch.Tensor, norm: torch.Tensor | None = None, stretch: float = 1.0) -> torch.Tensor:
        """Backward and one step; returns the gradient's norm.

        norm: what to scale the gradient to before the step: down from any norm, up by at most `stretch` times.
        """
        self.scaler.scale(loss).backward()
        # Before the check below: what is not finite in one process is then so in all, and all skip the update.
        self.run.average_gradients(self.parameters)
        # Before any norm is taken: else it would be that of the scaled loss.
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        own = torch.nn.utils.get_total_norm(gradients)
        if norm is not None:
            norm = norm.nan_to_num(0.0, 0.0)  # fp16: an update that overflowed gives no measure
            # 1e-12: a gradient of 0 stays 0; 0 / 0 would make it NaN.
            torch._foreach_mul_(gradients, (norm / own.clamp(min=1e-12)).clamp(max=stretch))
        skip = (~own.isfinite()).float()  # one NaN or infinity anywhere shows in the norm
        self.skipped += skip
        self.steps += 1
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            # Fused optimisers leave everything as it is where this is not 0: GradScaler tells them the same way.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, skip
            self.optimizer.step()
        return own

    def state_dict(self) -> dict:
        state = self.optimizer.state_dict()
        # "parameters" tells `load_adam` whether moments have been lost since.
        return {"optimizer": state, "scaler": self.scaler.state_dict(), "parameters": len(state["state"])}

    def load_state_dict(self, state: dict) -> None:
        load_adam(self.optimizer, state["optimizer"], state["parameters"])
        if state["scaler"] and self.scaler.is_enabled():  # a resumed run may change its precision
            self.scaler.load_state_dict(state["scaler"])


def load_adam(optimizer: torch.optim.Optimizer, state: dict, parameters: int) -> None:
    """Give Adam the moments of its `state_dict()`; its settings stay its own.

    parameters: how many had moments when it was saved (a class that was never drawn has none). Raises ValueError where
    some are missing, which Adam would start anew, silently, or are not of its parameters.
    """
    if len(state["state"]) != parameters:
        raise ValueError(f"the optimiser's state is of {len(state['state'])} parameters, not {parameters}")
    # From the saved groups PyTorch would take the learning rate and the betas as well.
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    for p, moments in optimizer.state.items():  # PyTorch takes any shape here, and fails in the next step
        mean, square, step = (moments[name] for name in ("exp_avg", "exp_avg_sq", "step"))
        if not (mean.shape == square.shape == p.shape and step.shape == () and step >= 0):
            raise ValueError("the optimiser's state is not of these parameters")
        if not (mean.isfinite().all() and (square >= 0).all() and square.isfinite().all()):
            raise ValueError("the optimiser's state has values that are no finite numbers")


def check_finite(steppers: Iterable[Stepper], images: int, options: dict) -> None:
    """Raise click.ClickException if training has diverged: too many of the last gradients were not finite.

    Too many: 20 or more, and at least a fifth of the steps counted. The count starts anew after 100 steps. In fp16 a run may
    skip 16 at its start, until the loss scale has come down from 65,536 to 1.
    """
    for stepper in steppers:
        # These wait for the device, so this is called once a line of the log and not at every step.
        skipped, steps = int(stepper.skipped), int(stepper.steps)
        if steps >= 100:
            stepper.skipped.zero_(), stepper.steps.zero_()
        if skipped >= max(20, steps / 5):
            raise click.ClickException(
                f"training has diverged: {skipped} of the last {steps} gradients, before {images:,} images, were not finite. "
                f"Take a lower --lr (it is {options['lr']:g}), --precision fp32 (it is {options['precision']}) or another "
                "--seed; the last save is as it was"
            )


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
            dev = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # torchrun's: a GPU for each process
        torch.empty(1, device=dev)  # only memory on it shows that it is there and works
        return dev
    # AssertionError: so says a PyTorch that was built without CUDA.
    except (RuntimeError, AssertionError, ValueError, OverflowError) as error:
        raise click.ClickException(f"--device {device}: {str(error).splitlines()[0]}") from None


def cpu_has_amx() -> bool:
    """Whether this CPU has bf16 matrix units. Without them bf16 only adds conversions."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
    return bool(capabilities.get("amx_bf16"))


def start(device: str = "auto", precision: str = "auto", seed: int = 0, tf32: bool | None = None) -> Run:
    """Set up the device, the precision, the processes of torchrun and the seeds.

    fp32 means fp32 on GPUs too, unless tf32 is asked for. Beside bf16 and fp16, convolutions that stay in fp32 (of
    --penalty r1, and of every penalty in fp16) multiply in TF32 unless it is refused: no less exact than the rest,
    and on an H200 1.2 to 1.7 times the images a second where a penalty belongs to every step. Both of PyTorch's switches
    are set, whatever they were.

    Raises click.ClickException for a device that this machine does not have.
    """
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise click.ClickException(f"--precision {precision}: give auto, fp32, bf16 or fp16")
    keep_memory()
    torch.set_flush_denormal(True)  # Adam's second moments decay into denormals, which are slow on CPUs
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    dev = choose_device(device)
    if dev.type == "cuda":
        torch.cuda.set_device(dev)
        torch.backends.cudnn.benchmark = True  # batches keep their shape, so a search for the fastest kernels pays
        # GPUs before Ampere only emulate bf16, slowly; fp16 they have.
        if precision == "auto":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        torch.backends.cudnn.allow_tf32 = precision != "fp32" if tf32 is None else tf32
        torch.backends.cuda.matmul.allow_tf32 = bool(tf32)  # exact shifts and t-SNE's distances are matrix products
    elif precision == "auto" and cpu_has_amx():
        precision = "bf16"
    elif precision == "fp16":
        click.echo("Warning: fp16 on a CPU is far slower than fp32, seconds per image: take --precision fp32", err=True)
    if world > 1 and not dist.is_initialized():
        # A process that dies ends the others within a minute, also where no torchrun watches them.
        # With its device, NCCL connects now, and an error shows here and not at the first update.
        options = dict(device_id=dev) if dev.type == "cuda" else {}
        dist.init_process_group("nccl" if dev.type == "cuda" else "gloo", timeout=timedelta(minutes=1), **options)
    # None, so no autocast, for fp32 and for what "auto" leaves on a CPU without AMX.
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    run = Run(dev, dtype, seed)
    run.reseed(0)  # as rank 0: networks built next start with the same weights in every process
    run.rank, run.world = rank, world
    if world > 1:
        run.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))  # patient: a save may take its time
    return run


@contextlib.contextmanager
def signals(run: Run) -> Iterator[None]:
    """Within it, SIGINT and SIGTERM ask the run to stop after its iteration; a second SIGINT ends it at once.

    They do so too where a shell started the run in the background and had it ignore SIGINT.
    """
    asked = 0.0

    def ask(signum: int, frame) -> None:
        nonlocal asked
        # torchrun passes a SIGINT on that the terminal has sent already: within a second it is the same one.
        if signum == signal.SIGINT and run.signal == signum and time.monotonic() - asked > 1:
            raise KeyboardInterrupt
        first, run.signal, asked = not run.signal, signum, time.monotonic()
        if first and run.rank == 0:
            again = "; again to end at once" if signum == signal.SIGINT else ""
            with contextlib.suppress(RuntimeError):  # Python refuses a line amid another one
                tqdm.write(
                    f"{signal.Signals(signum).name}: finishing the iteration, then saving{again}", file=sys.stderr
                )

    if threading.current_thread() is not threading.main_thread():  # Python handles signals there alone
        yield
        return
    # Kept and put back: in a notebook or a test, the program goes on after the run.
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@functools.cache
def keep_memory() -> None:
    """Have glibc keep freed memory, and Linux back it by pages of 2 MiB where it leaves that to each program.

    By default glibc unmaps large tensors, and every page costs a fault at the next step. With pages of 4 KiB, updates of
    stage 3 took up to 1.2 times as long on CPUs, looking up addresses. Where either refuses, nothing changes.
    """
    # Other C libraries have no mallopt, other systems no /proc.
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        # The numbers of these parameters are those of glibc's malloc.h.
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never map a tensor on its own (M_MMAP_THRESHOLD cannot go beyond 32 MiB)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never hand memory back
        libc.mallopt(-2, 64 * 2**20)  # M_TOP_PAD: grow in steps of 64 MiB
        pages = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        # 2, strict accounting: room that is merely set aside would count as memory in use. Under a limit it could be
        # refused, and after a refusal glibc maps memory anew each time.
        strict = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
        limits = (resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
        if "[madvise]" not in pages or strict or any(limit != resource.RLIM_INFINITY for limit in limits):
            return
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        # What the heap grows by later does not inherit the advice. So it grows now, by half of the machine's memory:
        # addresses alone, since Linux gives memory only to what is written.
        libc.free(libc.malloc(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2))
        for area in Path("/proc/self/maps").read_text().splitlines():
            if area.endswith("[heap]"):  # several in a forked process
                start, end = (int(address, 16) for address in area.split()[0].split("-"))
                libc.madvise(start, end - start, 14)  # MADV_HUGEPAGE


# ---------------------------------------------------------------------------------------------------------------------
# Batch norm over the images of all processes, on any device, with gradients of any order.
#
# Statistics of a process's own images would make the result depend on the number of processes, and SimCLR's encoder
# could tell by them which views belong together. torch.nn.SyncBatchNorm needs GPUs, and R1 differentiates twice, which
# it does not allow.


class BatchNorm(torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm1d and torch.nn.BatchNorm2d (Ioffe & Szegedy 2015), but in training over the images of all processes.

    x: [B, C] or [B, C, H, W]; B may differ between processes and be 0 in some. Returns the shape, dtype and memory
    format of x. With one process, and in eval mode, it is torch's own.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # torch's layer counts batches as well: checkpoints of the two have the same entries.
        if self.training:
            self.num_batches_tracked.add_(1)
        return batch_norm(x, self, self.bias)


def batch_norm(x: torch.Tensor, norm: torch.nn.Module, bias: torch.Tensor | None) -> torch.Tensor:
    """x [B, C] or [B, C, H, W] by the weights, the state and the mode of `norm`, as `BatchNorm` computes it.

    bias: [C] to add, or None where the caller adds it.
    """
    if not (norm.training and dist.is_initialized() and dist.get_world_size() > 1):
        mean, var = norm.running_mean, norm.running_var
        return F.batch_norm(x, mean, var, norm.weight, bias, norm.training, norm.momentum, norm.eps)
    y, mean, var, n = _BatchNorm.apply(x, norm.weight, bias, norm.eps)
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (n / (n - 1)), norm.momentum)  # the unbiased variance, as torch keeps it
    return y


class _SumOverProcesses(torch.autograd.Function):
    """The sum of x over all processes, the same in each. Its gradient is the same sum, so every order exists."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()  # all_reduce overwrites its tensor, and x is the caller's
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, g):
        return _SumOverProcesses.apply(g.contiguous())  # g may be one number expanded; all_reduce wants plain memory


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean [C] and variance [C] of x over the images of all processes, and the number of values of a channel, []."""
    C, dims = x.shape[1], [d for d in range(x.ndim) if d != 1]
    if len(x):
        var, mean = torch.var_mean(x, dims, correction=0)
    else:  # zeros, but functions of x: every process must join every sum, in the backward passes too
        var = mean = x.sum(dims)
    # All processes' own moments, one row each, in one message. Sums of squares would lose digits where means are large.
    own = torch.cat((mean, var, mean.new_full((1,), x.numel() // C)))
    # Each fills its own row and leaves the others 0: their sum is a gather that can be differentiated twice.
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = _SumOverProcesses.apply(F.pad(own[None], (0, 0, rank, world - 1 - rank)))
    means, variances, counts = rows.split((C, C, 1), dim=1)
    n = counts.sum()
    mean = (counts * means).sum(0) / n
    # The variance within the processes, and that of their means.
    return mean, (counts * (variances + (means - mean).square())).sum(0) / n, n


class _BatchNorm(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias by the moments of all processes; also returns the moments."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean, var, n = _moments(full(x))  # in fp32: 16 bits lose digits in long sums
        ctx.save_for_backward(x, weight, mean, var, n)
        ctx.mark_non_differentiable(mean, var, n)  # they only go into the running statistics
        ctx.eps = eps
        # In eval mode, torch's fused kernel takes the moments it is given.
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var, n

    @staticmethod
    def backward(ctx, g, *_):
        """Equations of Ioffe & Szegedy, section 3, in operations that autograd can differentiate again."""
        x, weight, mean, var, n = ctx.saved_tensors
        dtype, dims, shape = x.dtype, [d for d in range(x.ndim) if d != 1], (-1,) + (1,) * (x.ndim - 2)
        x, g = full(x), full(g)
        if torch.is_grad_enabled():  # create_graph=True: the moments depend on x
            mean, var, n = _moments(x)
        scale = (var + ctx.eps).rsqrt()
        normed = (x - mean.view(shape)) * scale.view(shape)
        # Of this process's images: `average_gradients` joins them, as it does all weights' gradients.
        dbias, dweight = g.sum(dims), (g * normed).sum(dims)
        means = _SumOverProcesses.apply(torch.stack((dbias, dweight))) / n
        dx = (scale * weight).view(shape) * (g - means[0].view(shape) - normed * means[1].view(shape))
        return dx.to(dtype), dweight, dbias if ctx.needs_input_grad[2] else None, None


# ---------------------------------------------------------------------------------------------------------------------
# Small helpers.


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in [-1, 1], channels_last."""
    # The networks' weights are channels_last as well, so no convolution has to copy its input.
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """float [B, 3, S, S] in [-1, 1] -> uint8 [B, S, S, 3], rounded to the nearest level: undoes `to_float`."""
    # In fp32: from 128 on bf16 has whole numbers only, and would round before this does.
    return x.float().mul(127.5).add(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def random_crop(x: torch.Tensor, area: float) -> torch.Tensor:
    """A random crop of each image, resized to the whole, flipped or not, blurred or not; each draws its own, on its device.

    x: float [B, 3, S, S]; so is the result.  area: smallest area of the crop as a part of the image, in (0, 1], else
    ValueError (aspect 3/4 to 4/3; above 3/4, crops can be smaller, since none is longer than the image).  Flip: probability 0.5; Gaussian blur: 0.5, sigma up to 2 pixels or S / 40 if that is less.

    Crop, flip, bilinear resize and blur are separable, so together they are one matrix for the rows and one for the
    columns of an image.
    """
    if not 0 < area <= 1:
        raise ValueError(f"a crop of {area} of the image")
    b, _, s, _ = x.shape

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(b, 1, 1, device=x.device) * (high - low) + low

    # Rows and columns: tent weights of bilinear resampling, then the blur.
    pixel = torch.arange(s, device=x.device, dtype=torch.float32)
    apart = pixel[:, None] - pixel
    # As torchvision's RandomResizedCrop: log-uniform from 3/4 to 4/3. Half the logarithm, since both sides take it.
    side, aspect = uniform(area, 1).sqrt(), (uniform(-0.5, 0.5) * math.log(4 / 3)).exp()
    # SimCLR's blur (Chen et al. 2020): half of the images, 0.1 to 2 pixels; S / 40 makes it less below 80 px.
    blurred = uniform(0, 1) < 0.5
    sigma = torch.where(blurred, uniform(0.1, min(2.0, s / 40)), 0.1)  # 0.1 pixels: none
    blur = torch.softmax(-(apart**2) / (2 * sigma**2), dim=2)  # the weights sum to 1, at the borders too

    def resample(length: torch.Tensor, sign: torch.Tensor | float) -> torch.Tensor:
        """[B, S, S] matrix of a crop of `length` (part of the side) at a random place."""
        centre = uniform(-1, 1) * (1 - length)  # wherever the crop stays within the image
        place = centre + sign * length * (2 * pixel + 1 - s)[:, None] / s  # [B, S, 1] in [-1, 1]
        # Pixel i has its centre at i + 1/2. Beyond the outermost centres, the outermost pixel counts.
        place = ((place + 1) * (s / 2) - 0.5).clamp(0, s - 1)
        return blur @ (1 - (place - pixel).abs()).clamp(min=0)

    # No crop is longer than the image. A minus for the columns flips.
    rows = resample((side / aspect).clamp(max=1), 1.0)
    columns = resample((side * aspect).clamp(max=1), torch.where(uniform(0, 1) < 0.5, 1.0, -1.0))
    return rows[:, None].to(x.dtype) @ x.contiguous() @ columns[:, None].mT.to(x.dtype)


def full(x: torch.Tensor) -> torch.Tensor:
    """x in at least single precision: scores and images leave autocast networks through this."""
    return x if x.dtype == torch.float64 else x.float()


def entropy_bits(labels: torch.Tensor) -> float:
    """H(Y) in bits: the entropy of the rows of labels [N, Y] as they occur together, not a sum over attributes."""
    counts = torch.unique(labels, dim=0, return_counts=True)[1].double()
    return torch.special.entr(counts / len(labels)).sum().item() / math.log(2)


def information_bits(logits: torch.Tensor, y: torch.Tensor, kind: str, h_y: float) -> float:
    """The lower bound I(Y;E) >= H(Y) - H(Y|E) of equations (2)-(5), in bits.

    H(Y|E) is bounded from above by the mean cross-entropy of y [N, Y] under logits [N, Y]: for kind 'one-hot' of the
    classes, for 'multi-label' the sum of the attributes' binary ones. The logits must mean probabilities: a classifier
    trained on balanced attributes has its balance subtracted first. h_y: H(Y) in bits. Raises ValueError for another kind.
    """
    if kind not in ("one-hot", "multi-label"):
        raise ValueError(f"no kind of labels {kind!r}")
    if kind == "one-hot":
        nats = F.cross_entropy(logits.double(), y.double())
    else:
        nats = F.binary_cross_entropy_with_logits(logits.double(), y.double(), reduction="none").sum(1).mean()
    return h_y - nats.item() / math.log(2)


# ---------------------------------------------------------------------------------------------------------------------
# Log: numbers gathered on the device, fetched once a line.


PACE = 10.0  # seconds of training that tell how fast it is


def duration(seconds: float) -> str:
    """A length of time in the unit that a person would take."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:  # "119 seconds" says more than "2 minutes"
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


class Log:
    """Progress bar on stderr, one JSON object a line in `stats.jsonl`, the same numbers in TensorBoard.

    The bar moves at once in a terminal, every 10 seconds in a file. `add` only keeps device tensors; `write` fetches
    all means in one transfer, so nothing synchronises between log lines. Only the first process writes. A log that
    cannot be written is reported once, and ends no run. After PACE seconds a line says how long the run will take, and
    what other lengths {name: images} would take.
    """

    def __init__(
        self,
        outdir: Path,
        stage: str,
        total: int,
        done: int = 0,
        rank: int = 0,
        lengths: dict[str, int] | None = None,
    ):
        self.stage, self.rank, self.path = stage, rank, outdir / "stats.jsonl"
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.bar = tqdm(
            total=total,
            initial=done,
            file=sys.stderr,
            desc=stage,
            unit="img",
            unit_scale=True,
            disable=rank != 0,
            dynamic_ncols=True,
            smoothing=0.1,  # of the rate: over more steps than with tqdm's 0.3, since not every step does the same
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a file keeps every state of the bar
        )
        self.time, self.board, self.warned = time.time(), None, set()
        self.lengths, self.steps, self.since = lengths or {}, 0, None
        if rank == 0:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed for --help

            threading.excepthook = quiet_tensorboard  # it writes in a thread of its own
            with self.on_disk("stats.jsonl"):
                self.forget(done)
            with self.on_disk("TensorBoard's log"):
                # purge_step: TensorBoard hides what a killed run logged after its last save.
                self.board = SummaryWriter(str(outdir / "tensorboard" / stage), purge_step=done + 1)

    @contextlib.contextmanager
    def on_disk(self, what: str) -> Iterator[None]:
        """Within it, errors of the disk are reported, once for each `what`."""
        try:
            yield
        except OSError as error:
            if what not in self.warned:
                self.warned.add(what)
                tqdm.write(
                    f"Warning: {what} cannot be written ({error.strerror or error}); training goes on", file=sys.stderr
                )

    def forget(self, done: int) -> None:
        """Drop the lines of this stage after `done` images: a resumed run writes them again, a new one its own."""
        if self.path.exists():
            kept = []
            for line in self.path.read_text(errors="replace").splitlines():
                # Half a line, of a run that was killed, or what a crash of the machine left.
                with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                    entry = json.loads(line)
                    if entry["stage"] != self.stage or entry["images"] <= done:
                        kept.append(line + "\n")
            with checkpoints.atomic(self.path) as temporary:
                temporary.write_text("".join(kept))

    def add(self, **values: torch.Tensor) -> None:
        """Take scalar tensors into the means of the next line."""
        for name, value in values.items():
            # Detached, or the sum would keep the graph of every step since the last line in memory.
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            # Each has its own count: R1 and the regularisation are not part of every iteration.
            self.counts[name] = self.counts.get(name, 0) + 1

    def step(self, images: int) -> None:
        """Advance the bar; once, say how long the run will take."""
        self.bar.update(images)
        self.steps += 1
        if self.rank == 0 and self.steps == 5:  # the first ones compile and choose kernels
            self.since = time.monotonic(), self.bar.n
        elif self.since and time.monotonic() - self.since[0] >= PACE:
            seconds = (time.monotonic() - self.since[0]) / (self.bar.n - self.since[1])  # per image
            line = f"{1 / seconds:,.3g} images/s: about {duration(seconds * (self.bar.total - self.bar.n))} to the end"
            others = [f"{duration(seconds * n)} for {name}" for name, n in self.lengths.items() if n != self.bar.total]
            tqdm.write(
                f"{line}{' (from the start: ' * bool(others)}{', '.join(others)}{')' * bool(others)}", sys.stderr
            )
            self.since = None

    def write(self, images: int, **extra: float) -> None:
        """Write the means since the last line, with `extra`, at `images` images seen."""
        # The only place here that waits for the device.
        means = torch.stack([*self.sums.values()]).tolist() if self.sums else []
        line = {name: mean / self.counts[name] for name, mean in zip(self.sums, means, strict=True)} | extra
        self.sums, self.counts = {}, {}
        if self.rank == 0:
            entry = {"stage": self.stage, "images": images, "seconds": round(time.time() - self.time, 2)}
            # Unbuffered: the line goes out in one call, so that a kill leaves whole lines.
            with self.on_disk("stats.jsonl"), open(self.path, "ab", buffering=0) as file:
                start, text = file.tell(), to_json(entry | line).encode() + b"\n"
                try:
                    if file.write(text) < len(text):  # a full disk may take a part without an error
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(start)  # no half line
                    raise
            with self.on_disk("TensorBoard's log"):
                for name, value in line.items() if self.board else ():
                    self.board.add_scalar(name, value, images)
            # The next step of the bar draws it.
            self.bar.set_postfix_str(" ".join(f"{n} {v:.3g}" for n, v in line.items()), refresh=False)

    def picture(self, name: str, image, images: int) -> None:
        """Put a uint8 [H, W, 3] picture into TensorBoard."""
        with self.on_disk("TensorBoard's log"):
            if self.board:
                self.board.add_image(name, image, images, dataformats="HWC")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error) -> None:
        """Finish the bar and the files."""
        self.bar.close()
        with self.on_disk("TensorBoard's log"):
            if self.board:
                self.board.close()


def quiet_tensorboard(args) -> None:
    """Threads' exceptions as ever, but for full disks under TensorBoard's writer, which raises them again in `Log`."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def to_json(values: dict, indent: int | None = None) -> str:
    """JSON, without `indent` in one line; numbers without a value (NaN, infinity) become null, which JSON has."""
    # Python writes NaN as NaN, which no other reader takes; its own reader turns it into None at any depth.
    return json.dumps(json.loads(json.dumps(values), parse_constant=lambda _: None), indent=indent)
