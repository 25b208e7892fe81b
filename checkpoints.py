"""Checkpoints: dicts of plain Python values and tensors, read without running code, written whole or not at all.

The stages, metrics and pictures use these:

    checkpoints.save(path, state)              written aside, then renamed; the one before stays
    state = checkpoints.load(path, "gan")      checked: damaged and foreign files are one line for the user
    state = checkpoints.resume(path, ...)      a stage's own checkpoint, to go on from
    network = checkpoints.rebuild(build, weights)
"""

import contextlib
import hashlib
import math
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click
import torch
from tqdm import tqdm

VERSION = 2  # of the checkpoint format
SIZES = tuple(2**i for i in range(4, 11))  # of images, in pixels: the networks halve and double

# What a checkpoint of a stage must have, and of what type; and its entry 'data'.
ENTRIES = {
    "encoder": dict(config=dict, model=dict, data=dict, options=dict, images_seen=int),
    "classifier": dict(config=dict, model=dict, data=dict, options=dict, encoder_hash=str, balance=list),
    # No more than a snapshot has: what further training needs is in gan.pt alone.
    "gan": dict(ema=dict, data=dict, options=dict, images_seen=int),
}
# squash and train_on_all: later stages must open the images in the same way.
DATA = dict(
    data=str, name=str, preset=str, fingerprint=str, size=int, splits=dict, label_names=list, label_kind=str,
    squash=bool, train_on_all=bool,
)  # fmt: skip
FURTHER = ("training", "trainer")  # entries of optimisers, discriminator and the like
# What networks, optimisers and labels consist of: complex and quantised tensors are of no run.
DTYPES = {
    torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
}  # fmt: skip
PLAIN = 2**24  # bytes of a checkpoint beside its tensors: names and settings take a thousandth of that
RESUME_REMEDY = "give --no-resume to start over, or another --outdir"


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Gives a temporary path in the same folder, renamed to `path` at the end: never half a file under its name."""
    path = Path(path)
    # In the same folder, since renaming does not cross disks; by a name that `training.lock` clears after a kill.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save(path: Path, state: dict, must: bool = True, keep_previous: bool = True) -> None:
    """Write a checkpoint; the one before stays as <name>.previous.pt, for the case that the new one is damaged.

    If it cannot be written, the old file is untouched; that raises click.ClickException, or, unless it must be, is
    reported: training goes on until the next save.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            torch.save(state | {"version": VERSION}, temporary)
            # By now the new file is whole. The old one gets its second name first, so at no time is there none.
            if path.exists() and keep_previous:
                with contextlib.suppress(OSError), atomic(previous(path)) as link:  # some file systems have no links
                    os.link(path, link)  # a second name, not a copy
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk by a RuntimeError
        why = getattr(error, "strerror", None) or "is the disk full?"
        if must:
            raise click.ClickException(f"cannot write {path}: {why}") from None
        tqdm.write(f"Warning: cannot write {path}: {why}; training goes on until the next save", file=sys.stderr)


def save_snapshot(path: Path, state: dict, keep: int, every: int) -> None:
    """Write a numbered checkpoint, <name>-<images>.pt, and drop all but the last `keep` and those at round numbers.

    Round are the first ones after a multiple of `every` images. Snapshots of more images than this one are of a run
    that was started over, and are deleted. A full disk is reported and ends nothing.
    """
    save(path, state, must=False, keep_previous=False)
    stage, _, now = path.stem.rpartition("-")
    found = snapshots(path.parent, stage)
    if int(now) not in found:  # the disk is full
        return
    images = [n for n in found if n <= int(now)]
    drop = found.keys() - {*images}
    if len(images) > keep:  # one drops out of the last `keep`; those before it were decided on when they did
        # 0 in front, so that the first snapshot of all has one before it as well.
        before, n = [0, *images][-keep - 2 : -keep]
        drop |= {n} if n // every == before // every else set()  # not round: no multiple of `every` in between
    for n in drop:
        found[n].unlink(missing_ok=True)


def snapshots(folder: Path, stage: str) -> dict[int, Path]:
    """The numbered checkpoints in a folder by the images they have seen, fewest first. Other files are a user's."""
    found = {}
    for path in folder.glob(f"{stage}-*.pt"):
        # The stages write eight digits at least. Sorted as numbers: as text, nine digits come before eight.
        if re.fullmatch(r"[0-9]{8,}", number := path.stem.rpartition("-")[2]):
            found[int(number)] = path
    return dict(sorted(found.items()))


def run_folder(path: str | Path) -> Path:
    """The folder of the run that a gan.pt or one of its snapshots belongs to."""
    above = Path(path).absolute().parent
    # Any folder can be called snapshots: only one beside a gan.pt is a run's.
    return above.parent if above.name == "snapshots" and (above.parent / "gan.pt").exists() else above


def previous(path: Path) -> Path:
    """Where `save` keeps the checkpoint before the present one."""
    return path.with_suffix(".previous.pt")


def load(path: Path | str, stage: str, finished: bool = False, go_on: bool = False, others: bool = True) -> dict:
    """Read a checkpoint of the named stage ('encoder', 'classifier' or 'gan') to the CPU.

    finished: refuse the encoder or classifier of a run that was stopped before its end. go_on: with optimisers and
    discriminator too, most of the file. others: if the file is damaged, say which other checkpoint is whole.
    Raises click.ClickException if the file is missing, damaged (the checksums of its parts are compared), not a
    checkpoint, of another stage or format, incomplete, has entries that no run writes, or weights that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise click.ClickException(f"{path} does not exist: run {stage}.py with the same --data and --outdir first")
    try:
        with zipfile.ZipFile(path) as parts:  # what torch.save writes; torch.load does not compare its checksums
            if any(part.compress_type for part in parts.infolist()):
                raise ValueError("torch.save compresses nothing, so this may unpack to any size")
            if sum(part.file_size for part in parts.infolist() if part.filename.endswith("data.pkl")) > PLAIN:
                raise ValueError("more plain values than any run has")
            damaged = parts.testzip()
        # By way of a map of the file: a plain load reads beyond parts that are shorter than their tensors.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # Left out while they are only mapped: Adam's moments alone are twice the size of the weights.
        if not go_on and isinstance(state, dict):
            state = {name: value for name, value in state.items() if name not in FURTHER}
        # Tensors that share memory in the file get their own here: up to 4 times its size, not any amount.
        state = in_memory(state, [4 * path.stat().st_size])
    except Exception as error:  # damaged files raise nearly anything
        raise click.ClickException(
            f"{path} is not a checkpoint of this project, or damaged ({type(error).__name__} while reading it)"
            + (instead(path, stage) if others else "")
        ) from None
    if damaged:
        raise click.ClickException(
            f"{path} is damaged: a checksum of it is wrong" + (instead(path, stage) if others else "")
        )
    if not isinstance(state, dict) or "stage" not in state:
        raise click.ClickException(f"{path} is not a checkpoint of this project: it has no entry 'stage'")
    if state["stage"] != stage:
        raise click.ClickException(f"{path} was written by {state['stage']}.py, but one of {stage}.py is needed here")
    # The type first: a tensor would compare as a tensor, which is neither true nor false.
    if not isinstance(version := state.get("version"), int) or version != VERSION:
        raise click.ClickException(f"{path} has format {version!r:.40}, this code reads format {VERSION}")
    if wrong := implausible(state, stage):
        raise click.ClickException(f"{path} is incomplete, or no run wrote it: {wrong}")
    # A weight that is not finite would show as blank images or scores of NaN, much later and without a cause.
    parts = {"": state} | {f"{name}.": state.get(name) or {} for name in ("encoder", "classifier")}  # within a gan.pt
    for name, weights in ((where + name, part.get(name)) for where, part in parts.items() for name in ("model", "ema")):
        for key, value in (weights or {}).items():
            if not (isinstance(key, str) and isinstance(value, torch.Tensor) and usable(key, value)):
                raise click.ClickException(f"{path} has values in {name}.{key} that are no finite numbers: not usable")
    if finished and "results" not in state:
        raise click.ClickException(f"{path} is of an unfinished run: run {stage}.py again, to its end")
    return state


def implausible(state: dict, stage: str) -> str:
    """What in a checkpoint of the stage is missing or as no run writes it; '' if nothing is."""
    # Types first: all that follows relies on them.
    for entries, kinds, where in ((state, ENTRIES[stage], "it"), (state.get("data"), DATA, "its 'data'")):
        for name, kind in kinds.items():
            if not isinstance(entries.get(name), kind):
                return f"{where} has no {name!r}, or not a {kind.__name__}"
    for name in (*FURTHER, "results", "assignments"):
        if not isinstance(state.get(name, {}), dict):
            return f"its {name!r} is not a dict"
    for name in ("encoder", "classifier"):  # within a gan.pt; None in a run that had none
        part = state.get(name)
        if part is not None and not (isinstance(part, dict) and isinstance(part.get("model"), dict)):
            return f"its {name!r} is not a dict with a 'model'"
    for name in ("options", "data"):
        if any(isinstance(value, torch.Tensor) for value in state[name].values()):
            return f"its {name!r} has tensors"
    data, names = state["data"], state["data"]["label_names"]
    if data["size"] not in SIZES:
        return f"no images have {data['size']!r:.20} px"
    # They are printed: control characters could clear the screen. Names look labels up, so each must be one label's.
    if not all(isinstance(name, str) and name.isprintable() for name in names) or len(set(names)) < len(names):
        return "its 'data' has label names that are no text, or the same twice"
    if data["label_kind"] not in ("one-hot", "multi-label", "none") or "attributes" not in data:
        return f"its 'data' has no 'attributes', or labels of the kind {data['label_kind']!r:.20}"
    seen = state.get("images_seen", 0)
    # Below 2^53, so exact as a float. Python's integers have no end, and a huge one overflows in a division.
    if not isinstance(seen, int) or not 0 <= seen < 10**15:
        return "its 'images_seen' is no number of images"
    return ""


def in_memory(value: object, room: list[int]) -> object:
    """A copy of what torch.load has mapped, in memory of its own: the file may change.

    Raises ValueError for tensors that take more than `room` bytes together, or that no network of ours has, and for
    lists within lists that a few bytes make endless.
    """
    room[0] -= 1  # one byte a value at least: this also ends a list that contains itself
    if room[0] < 0:
        raise ValueError("it has more values than bytes")
    if isinstance(value, dict):
        return {key: in_memory(v, room) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(in_memory(v, room) for v in value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.layout != torch.strided or value.is_meta or value.dtype not in DTYPES:
        raise ValueError("not a plain tensor")
    room[0] -= value.numel() * value.element_size()  # a few bytes can stand for a tensor of any size
    if room[0] < 0:
        raise ValueError("its tensors are larger than the file")
    return value.clone()


def all_finite(x: torch.Tensor) -> bool:
    """Whether every element is a finite number, in one pass and without a mask in memory: extremes keep NaN."""
    return not x.numel() or all(math.isfinite(extreme) for extreme in x.aminmax())


def usable(name: str, weights: torch.Tensor) -> bool:
    """Whether a network can have these weights: finite ones, and no variances below 0, whose roots are none."""
    return all_finite(weights) and not (name.endswith("running_var") and (weights < 0).any())


def rebuild(build: Callable[[], torch.nn.Module], weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The network that `build` makes, on the CPU, with the weights of a checkpoint: those very tensors, not copies.

    It is built without memory or first weights: a few bytes in a file can ask for a network of any size. Buffers that
    checkpoints leave out are for `build` to put on the CPU. Raises RuntimeError unless the network has tensors of just
    the names and shapes of `weights`.
    """
    with torch.device("meta"):
        network = build()
    dtypes = {name: value.dtype for name, value in network.state_dict().items()}
    # Exports are in 16 bits, and the network computes in its own type.
    weights = {name: value.detach().to(dtypes.get(name, value.dtype)) for name, value in weights.items()}
    network.load_state_dict(weights, assign=True)
    return network


def instead(path: Path, stage: str) -> str:
    """What to say about the newest checkpoint that is whole, beside a damaged one, if there is any."""
    # The save before comes first: training can go on from it, and not from a snapshot.
    for other in (previous(path), *reversed(snapshots(path.parent / "snapshots", stage).values())):
        with contextlib.suppress(click.ClickException):
            load(other, stage, others=False)
            return f"; the newest whole one is {other}"
    return ""


@contextlib.contextmanager
def reading(file: Path | str) -> Iterator[None]:
    """Within it, entries of a checkpoint that are missing or do not fit become one line that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # load_state_dict lists what does not fit below a general first line; a KeyError has the entry's bare name.
        lines = str(error).splitlines() or [type(error).__name__]
        what = f"no entry {lines[0]}" if isinstance(error, KeyError) else lines[-1].strip()[:200]
        raise click.ClickException(f"{file} is incomplete or does not fit this code: {what}") from None


def resume(path: Path, stage: str, options: dict, data, keys: Iterable[str], before: dict | None = None) -> dict:
    """The stage's own checkpoint to go on from; {} if there is none, or with --no-resume.

    A damaged checkpoint is reported, and the one before is taken if that is whole. data: the Dataset. keys: the options
    that a resumed run may not change. before: values of those that older checkpoints do not name. Raises
    click.ClickException where the checkpoint was made from other images or with other options.
    """
    if not options["resume"] or not path.exists():
        return {}
    try:
        # others=False: the one before is tried anyway, and only if that fails are the others looked at.
        state = load(path, stage, go_on=True, others=False)
    except click.ClickException as error:
        try:
            state = load(previous(path), stage, go_on=True, others=False)
        except click.ClickException:
            message = f"{error.message}{instead(path, stage)}; {RESUME_REMEDY}"
            raise click.ClickException(message) from None
        click.echo(f"Warning: {error.message}; going on from the save before, {previous(path)}", err=True)
    check_images(state["data"], data, path, RESUME_REMEDY)
    # Weights to start from do not matter to a run that has started, unless other ones are asked for.
    keys = [*keys, "init"] if options["init"] else keys
    check_same((before or {}) | state["options"], options, keys, path, RESUME_REMEDY)
    return state


def check_size(path: Path, stage: str, options: dict) -> None:
    """Refuse to go on at another size, as `resume` does, but before images of that size are packed."""
    if options["resume"] and options["size"] and path.exists():
        try:
            theirs = load(path, stage, others=False)["options"]
        except click.ClickException:  # `resume` says what is wrong with it, and may take the one before
            return
        check_same(theirs, options, ["size"], path, RESUME_REMEDY)


def check_images(theirs: dict, data, file: Path | str, remedy: str) -> None:
    """Refuse a checkpoint whose entry 'data' names other images than the Dataset `data`."""
    if theirs["fingerprint"] != data.fingerprint:  # of the content: a folder may have moved
        raise click.ClickException(f"{file} was made from other images ({theirs['data']}) than {data.data}: {remedy}")


def check_same(theirs: dict, ours: dict, keys: Iterable[str], file: Path | str, remedy: str) -> None:
    """Refuse a checkpoint made with other settings, naming the first of `keys` that differs."""
    for key in keys:
        # What neither has is the same: a checkpoint may be older than an option.
        if theirs.get(key) != ours.get(key):
            raise click.ClickException(
                f"{file} was made with {key} {theirs.get(key)!r}, but here {key} is {ours.get(key)!r}: {remedy}"
            )


def load_init(file: str, stage: str) -> dict:
    """The checkpoint that --init names, with what further training needs."""
    if not Path(file).is_file():
        raise click.ClickException(f"--init {file}: no such file")
    return load(file, stage, go_on=True)  # stage 3 takes D's weights too


def init_weights(network: torch.nn.Module, weights: dict, source: str) -> None:
    """Copy `weights` into `network`. Raises click.ClickException if names or shapes differ."""
    try:
        network.load_state_dict(weights)
    except Exception as error:  # what is no dict of tensors raises nearly anything
        # load_state_dict says in its last line what does not fit.
        why = [line.strip() for line in str(error).splitlines()]
        raise click.ClickException(f"--init {source} does not fit: {why[-1]:.200}") from None


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """Short hash of a network's weights, to tell which encoder a classifier belongs to."""
    digest = hashlib.sha256()
    for name in sorted(state):  # whatever the order in which layers were made
        digest.update(name.encode())
        # As bytes, since numpy has no bf16.
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]  # 64 bits: enough to tell a user's encoders apart
