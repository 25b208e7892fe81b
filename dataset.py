"""Images and labels for every stage: packs a source once into a memory-mapped array and feeds batches from it.

    python dataset.py --data afhq --download          # fetch, check, pack at 256 px, print what was found
    python dataset.py --data ~/photos --size 64 --sheet sheet.png

A source is a preset (critters, afhq, celeba, fashion-mnist) or the path of a folder or zip in one of the layouts that
layouts.py reads. Labels, their names and their kind come from there and are the same for every split. Where there is no
validation split, a tenth of each class is held out by a hash of the file names. A source is only ever read. Its pack,
uint8 [N, S, S, 3], lies in $INFOSCC_CACHE (~/.cache/infoscc-gan), under the hash of the content.
"""

import contextlib
import ctypes
import fcntl
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import checkpoints
import critters
import files
import layouts
import training
from download import AFHQ, download
from files import (
    MAX_FILE,
    MAX_PIXELS,
    UNREADABLE,
    fail,
    is_hidden,
    list_files,
    open_file,
    printable,
    read,
    read_idx,
    read_image,
)
from layouts import CELEBA, DATASETS, Source

FORMAT = 2  # of the packs: a change of how images are decoded or stored makes new ones

# ---------------------------------------------------------------------------------------------------------------------
# Images: center crop, antialiased resize.


def square(image: Image.Image, size: int) -> np.ndarray:
    """Center crop to a square, Lanczos resize (antialiased) -> uint8 [size, size, 3]."""
    # The crop comes first, so that pixels outside of it do not bleed into the edges of the result.
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS) if side != size else image)


def squashed(image: Image.Image, size: int) -> np.ndarray:
    """The whole image as a square, by bilinear interpolation without antialiasing -> uint8 [size, size, 3].

    The paper's code did that to CelebA: 178 x 218 to 128 x 128, by torchvision's Resize on tensors.
    """
    # EXTENT looks at four pixels for each of the result, as torchvision before 0.17 did on tensors; Image.resize would
    # antialias, as torchvision now does by default.
    area = (0, 0, *image.size)
    planes = [  # in float, since Pillow rounds bytes down
        plane.convert("F").transform((size, size), Image.Transform.EXTENT, area, Image.Resampling.BILINEAR)
        for plane in image.split()
    ]
    return np.rint(np.stack(planes, axis=-1)).astype(np.uint8)


def open_image(root: Path, key: str | tuple[str, int], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Image `key` of a source, upright and RGB, of its own size. Raises one of UNREADABLE for one it cannot read."""
    if isinstance(key, tuple):
        # IDX files hold grey images, and every network here takes three channels.
        return Image.fromarray(read_idx(root, key[0])[key[1]]).convert("RGB")
    # A member of a zip is read as a whole: decoders jump back, and each jump would unpack it from its start again.
    return read_image(root / key if root.is_dir() else io.BytesIO(read(root, key, MAX_FILE)), max_pixels)


def load_image(
    root: Path | None, key: str | tuple[str, int], size: int, squash: bool = False, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Image `key` of a source as uint8 [size, size, 3] RGB. Raises one of UNREADABLE for an image it cannot read."""
    if root is None:
        # Seed 0 for everybody, so that runs on critters can be compared.
        return critters.render(0, *key, size)[0]
    return (squashed if squash else square)(open_image(root, key, max_pixels), size)


def usual_size(root: Path | None, keys: list, max_pixels: int = MAX_PIXELS) -> int:
    """Largest power of two not above the smallest side of a few images spread over the source, at least 32, at most 256."""
    sides = []  # of 16 to 31 images: enough to tell the size of a set, and read in a moment
    for key in keys[:: max(1, len(keys) // 16)] if root else []:
        with contextlib.suppress(*UNREADABLE):  # packing names it
            sides.append(min(open_image(root, key, max_pixels).size))
    # 32 and 256 are the smallest and the largest size of DATASETS; 256 px is the paper's AFHQ.
    return min(256, max(32, 1 << (min(sides, default=32).bit_length() - 1)))


def most_by_default(device: torch.device) -> int:
    """The largest size of data without a preset where none is asked for: on two CPU cores half an hour for all stages."""
    # Found by trying: at 64 px all stages took 41 minutes on two cores, and images followed y less.
    return 32 if device.type == "cpu" else 256


def scan_critters() -> Source:
    """What critters.py draws: species as classes, its attributes, and the kinds, which training does not see."""
    keys = [(split, i) for split, count in critters.SPLITS.items() for i in range(count)]
    # The offsets keep the splits apart: an image depends on its index alone.
    facts = [critters.factors(0, critters.OFFSETS[split] + i) for split, i in keys]
    hidden = {"kind": (np.array([f["kind"] for f in facts]), list(critters.KINDS))}
    classes, attributes = list(critters.SPECIES), list(critters.ATTRIBUTES)
    class_of, values = [f["species"] for f in facts], [f["attributes"] for f in facts]
    return Source(keys, [split for split, _ in keys], classes, class_of, attributes, values, hidden=hidden)


# ---------------------------------------------------------------------------------------------------------------------
# Packing: a folder with <split>.npy, labels.npz, names.json and info.json, made under another name and renamed.


def cache_folder() -> Path:
    """Where packs lie: $INFOSCC_CACHE, or ~/.cache/infoscc-gan, or a temporary folder for users without a home."""
    if folder := os.environ.get("INFOSCC_CACHE"):
        return Path(os.path.expanduser(folder))
    # In a container the user may have no home, or one that belongs to somebody else.
    folder = Path(os.path.expanduser("~/.cache/infoscc-gan"))
    with contextlib.suppress(OSError):
        if folder.is_absolute():  # else nothing says where home is
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    folder = Path(tempfile.gettempdir()) / f"infoscc-gan-{os.getuid()}"
    with contextlib.suppress(OSError):
        # 0700: nobody else may write here, as they may in the folder above.
        folder.mkdir(mode=0o700)
    # lstat, not stat: somebody else may have put a link here that leads to a folder of yours.
    status = os.lstat(folder) if os.path.lexists(folder) else None
    if status is None or not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():  # others can write there too
        fail(f"{folder} is not a folder of yours: set INFOSCC_CACHE to another")
    say(f"No home folder to write to: packs go to {folder} ($INFOSCC_CACHE names another)")
    return folder


def say(message: str) -> None:
    """Print a line to stderr: once, if torchrun has started several processes."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(printable(message), err=True)


def prepare(
    data: str,
    size: int | None = None,
    skip_broken: bool = False,
    *,
    preset: str = "",
    squash: bool = False,
    train_on_all: bool = False,
    max_pixels: int = MAX_PIXELS,
    strict: bool = False,
    most: int = 256,
) -> Path:
    """The folder of the pack of `data` at `size`, made now if there is none for this content.

    The arguments, and what it raises, are those of open_dataset; preset: as layouts.preset_of gives it.
    """
    # Resolve the arguments.
    name, root = layouts.locate(data)
    largest = checkpoints.SIZES[-1] if root else 512  # critters are drawn no larger
    if size is not None and not (size in checkpoints.SIZES and size <= largest):
        fail(f"--size {size} is not a power of two between {checkpoints.SIZES[0]} and {largest}")
    size = size or DATASETS.get(preset)
    squash = squash and root is not None  # critters are drawn square

    # `state`, a hash of names, sizes and times, tells whether the source is known: then seen/<state>.json leads to its
    # pack (`recall`). Else the source is scanned, its contents are hashed, and it is packed and noted there (`make`).
    cache, node = cache_folder(), os.uname().nodename
    # Critters go by the bytes of critters.py, comments too: whoever edits it gets new data, and no old run fits them.
    files, folders, state = [], [], hashlib.sha256(Path(critters.__file__).read_bytes()).hexdigest()
    if root is not None:
        # Packs within the data would change it while they are made; hidden folders of it are never looked at.
        inside, above = cache.resolve(), root.resolve()
        if inside.is_relative_to(above) and not any(map(is_hidden, inside.relative_to(above).parts)):
            fail(f"the cache {cache} lies within the data: set INFOSCC_CACHE to another folder")
        root, files, folders = list_files(root)
        state = state_of(root, files, folders)
    memo = cache / "seen" / f"{state}.json"

    def check(classes: list[str]) -> None:
        # A path may hold anything, but whoever says afhq means the paper's data.
        if data == "afhq" and not {"cat", "dog", "wild"}.issuperset(classes):
            fail(f"{root} is not AFHQ: its classes are {', '.join(classes)}, not cat, dog, wild")

    def find(content: str, size: int) -> Path | None:
        fingerprint = fingerprint_of(content, squash, train_on_all)
        # Whatever its name begins with: copies of the same data share a pack. 64 bits of the hash tell packs apart.
        return next(cache.glob(f"*-{size}-{fingerprint[:16]}-v{FORMAT}"), None)

    def recall() -> tuple[dict | None, Path | None]:
        # A memo that is missing, damaged, or lacks one of the keys counts as none: it is written anew.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            seen = json.loads(memo.read_text())
            seen = {key: seen[key] for key in ("content", "size", "notes", "absent")}
            return seen, find(seen["content"], size or min(seen["size"], most))
        return None, None

    def make(alone: bool) -> tuple[dict, Path]:
        source = layouts.scan(root, files, folders) if root else scan_critters()
        check(source.classes)
        # Before the packing, which takes long; the same question comes again below, for packs that are there.
        if strict and source.absent:
            fail(f"{root}: {source.notes[0]}")
        seen = {
            "content": content_of(root, source) if root else state,
            "size": usual_size(root, source.keys, max_pixels),
        }
        seen |= {"notes": source.notes, "absent": source.absent}
        pixels, fingerprint = size or min(seen["size"], most), fingerprint_of(seen["content"], squash, train_on_all)
        # The state is new, the content need not be: copied, moved and touched files have their pack.
        if not (pack := find(seen["content"], pixels)):
            # Left by processes of this machine that were killed: locks of others may not reach here.
            for left in cache.glob(f".packing-*-{glob.escape(node)}-*") if alone else ():
                shutil.rmtree(left, ignore_errors=True)
            # 64 of the 255 bytes that a name may have: size, hash, host and process come beside.
            short = name.encode()[:64].decode(errors="ignore")  # file systems count bytes
            pack = cache / f"{short}-{pixels}-{fingerprint[:16]}-v{FORMAT}"
            # In the same folder, since a rename is one step within a file system only.
            aside = cache / f".packing-{pack.name}-{node}-{os.getpid()}"
            load = functools.partial(load_image, root, size=pixels, squash=squash, max_pixels=max_pixels)
            info = {"size": pixels, "fingerprint": fingerprint, "squash": squash, "train_on_all": train_on_all}
            # The command must lead to this very pack, so it has all that tells packs apart.
            remedy = f"python dataset.py --data {shlex.quote(data)} --size {pixels}"
            remedy += " --squash" * squash + " --train-on-all" * train_on_all
            try:
                write_pack(root, source, aside, load, info, None if skip_broken else remedy)
                # Else the pack could hold other images than its hash says, and keep them for ever.
                if root and state_of(*list_files(root)) != state:
                    fail(f"{root} changed while it was being packed: run again")
                try:
                    aside.rename(pack)
                except OSError:
                    if not pack.exists():  # else a process without a lock was first, with the same
                        raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        # Under another name first, since readers do not wait for the lock.
        part = memo.with_name(f"{memo.name}.{node}.{os.getpid()}")
        part.write_text(json.dumps(seen))
        part.replace(memo)
        return seen, pack

    seen, pack = recall()
    if not pack:
        try:
            memo.parent.mkdir(parents=True, exist_ok=True)
            with only_one(cache) as alone:
                seen, pack = recall()
                if not pack:  # else another process has made it meanwhile
                    seen, pack = make(alone)
        except OSError as error:
            remedy = "make room, or set INFOSCC_CACHE to another folder"
            fail(f"cannot write the cache in {cache}: {error.strerror}; {remedy}")
    if strict and seen["absent"]:
        fail(f"{root}: {seen['notes'][0]}")
    info = read_info(pack)
    check(info["classes"])  # it may have been packed under another name
    skipped = info["skipped"]
    # A pack does not say which limit it was made with: a larger one may find images that were left out.
    if skipped and max_pixels > MAX_PIXELS and not skip_broken:
        fail(f"{pack} was packed without {skipped} unreadable images: delete it to pack it with --max-pixels")
    if skipped and not skip_broken:
        say(f"Note on {data}: {skipped} unreadable images were left out when it was packed (--skip-broken)")
    if not size and seen["size"] > most:
        say(f"Images are resized to {most} px: a CPU takes hours for more; --size {seen['size']} keeps them larger")
    # From the memo, so that every start says them and not only the one that packs.
    for note in seen["notes"]:
        say(f"Note on {data}: {note}")
    return pack


@contextlib.contextmanager
def reading(pack: Path) -> Iterator[None]:
    """Within it, whatever damaged files of a pack raise becomes one line with the remedy."""
    try:
        yield
    except (*UNREADABLE, KeyError, TypeError):
        fail(f"the pack {pack} is damaged: delete that folder and run again")


def read_info(pack: Path) -> dict:
    """What write_pack noted about a pack."""
    keys = ["size", "fingerprint", "squash", "train_on_all", "splits", "skipped", "classes", "attributes", "hidden"]
    with reading(pack):
        info = json.loads((pack / "info.json").read_text())
        return {key: info[key] for key in keys}


def fingerprint_of(content: str, squash: bool, train_on_all: bool) -> str:
    """What stages compare to tell whether they see the same images: other pixels or another split need another one."""
    return hash_of([content, squash, train_on_all]) if squash or train_on_all else content


def hash_of(value: str | list) -> str:
    """SHA-256 of plain values, in hexadecimal."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def state_of(root: Path, files: list[str], folders: list[str]) -> str:
    """A hash of the names, sizes and times of a source: the same as long as nothing is touched."""

    def state(path: str) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):  # of a link to nothing
            status = os.stat(path)
            return status.st_size, status.st_mtime_ns
        return None

    # Of a zip, its own size and time stand for all members.
    paths = [str(root)] if root.is_file() else [os.path.join(root, name) for name in files]
    # The path too: class names may come from it. Folders too: an empty class folder is refused.
    return hash_of([str(root.resolve()), files, folders, [state(path) for path in paths]])


@contextlib.contextmanager
def only_one(cache: Path) -> Iterator[bool]:
    """Let one process at a time pack; the kernel drops the lock with its process. False where there are no locks."""
    # The file is never deleted: else one process could wait for the old file while another locks a new one.
    with open(cache / ".lock", "a") as lock:
        try:
            # First without waiting, to tell the user why nothing happens.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            click.echo(f"Waiting for another process that packs into {cache}", err=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # as on some network file systems: then two may pack at once, and the first to finish wins
            yield False
            return
        yield True


def content_of(root: Path, source: Source) -> str:
    """SHA-256 over label names, and names and contents of all files that images and labels come from."""

    def hash_file(name: str) -> str:
        digest = hashlib.sha256()
        try:
            with open_file(root, name) as file:
                while block := file.read(2**20):  # 1 MB at a time, whatever the size of the file
                    digest.update(block)
        except UNREADABLE:
            return "unreadable"  # packing finds out as well, and says why
        return digest.hexdigest()

    names = sorted({*source.tables, *(key for key in source.keys if isinstance(key, str))})
    with ThreadPoolExecutor(4) as pool:  # enough to keep a disk busy
        few = len(names) < 1000  # read in a moment, so there is no bar
        hashes = tqdm(pool.map(hash_file, names), "reading", len(names), unit="file", dynamic_ncols=True, disable=few)
        # Names of classes may depend on what a folder is called, so they are part of it.
        return hash_of([source.classes, source.attributes, names, list(hashes)])


def create_array(path: Path, shape: tuple[int, ...]) -> int:
    """Make an .npy file of uint8 with its disk space reserved; returns where its rows begin."""
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)  # a full disk shows here, as an error
    return array.offset


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent is killed: else it would hold the lock, and wait, for ever."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # If the parent ended before that call, the signal will never come.
    if os.getppid() != parent:
        os._exit(1)


def pack_rows(load: Callable, keys: list, size: int, path: Path, offset: int) -> list[tuple[int, str]]:
    """Decode some images and write them from byte `offset` of `path` on; returns (position, reason) of the broken."""
    # Each process writes its own part of the file, all rows of a job at once.
    # Rows of broken images stay black until write_pack drops them, or drops the pack.
    rows, broken = np.zeros((len(keys), size, size, 3), np.uint8), []
    for i, key in enumerate(keys):
        try:
            rows[i] = load(key)
        except UNREADABLE as error:
            broken.append((i, getattr(error, "strerror", None) or str(error)))
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(rows.data)
    return broken


def decode(
    source: Source, splits: dict[str, np.ndarray], folder: Path, load: Callable, size: int
) -> dict[str, dict[int, str]]:
    """Decode the rows of all splits into <split>.npy, on all processors; returns {split: {position: why it is broken}}."""
    row, jobs, broken = size * size * 3, [], {s: {} for s in splits}
    chunk = max(1, min(64, 2**24 // row))  # images a job: at most 16 MB, and enough jobs for all processors
    # The processors that this process may use: in containers and batch jobs the machine often has more.
    # Up to 64 images, if not large, are one job: a second process would have nothing to do.
    processes = len(os.sched_getaffinity(0)) if len(source.keys) > 64 else 1
    context = multiprocessing.get_context("fork")  # a new interpreter would first import torch
    # The lock of files.py works between threads; here several processes decode.
    if processes > 1:
        files.LARGE = context.Lock()  # for all of them
    pool = ProcessPoolExecutor(processes, context, end_with_parent, (os.getpid(),)) if processes > 1 else None
    total = sum(map(len, splits.values()))
    bar = tqdm(total=total, desc=f"packing at {size} px", unit="img", dynamic_ncols=True)
    try:
        for s, rows in splits.items():
            offset = create_array(folder / f"{s}.npy", (len(rows), size, size, 3))
            for i in range(0, len(rows), chunk):
                keys = [source.keys[r] for r in rows[i : i + chunk]]
                job = functools.partial(pack_rows, load, keys, size, folder / f"{s}.npy", offset + i * row)
                jobs.append((s, i, len(keys), pool.submit(job).result if pool else job))
        for s, start, count, finish in jobs:
            broken[s] |= {start + i: reason for i, reason in finish()}
            bar.update(count)
    except BrokenProcessPool:
        fail(
            "packing failed: a process was killed, probably because memory ran out; close other programs and run again"
        )
    finally:
        bar.close()
        if pool:
            pool.shutdown(cancel_futures=True)  # else, after an error, the jobs that are left would still run
    return broken


def write_pack(root: Path | None, source: Source, folder: Path, load: Callable, info: dict, remedy: str | None) -> None:
    """Write <split>.npy, labels.npz, names.json and info.json.

    load(key) gives an image as uint8 [size, size, 3]. info: the size of it, and what else to note about the pack.
    remedy: the command that packs all the same, but for its options, if images cannot be read; None: leave them out.
    """
    folder.mkdir()
    split_of, class_of = np.array(source.splits), np.array(source.class_of, np.int64)
    splits = {s: np.flatnonzero(split_of == s) for s in ("train", "val", "test") if s in source.splits}
    # For CelebA, where the published runs train on all 202,599 images.
    if info["train_on_all"]:
        splits["train"] = np.arange(len(source.keys))
    broken = decode(source, splits, folder, load, info["size"])
    reasons = {source.keys[splits[s][i]]: reason for s in splits for i, reason in broken[s].items()}
    unreadable = [printable(f"{key} ({reason})") for key, reason in reasons.items()]
    if unreadable and remedy:
        # Ten show what is wrong; there may be thousands.
        shown = ", ".join(unreadable[:10]) + (f" and {len(unreadable) - 10} more" if len(unreadable) > 10 else "")
        count = f"{len(unreadable)} of {len(source.keys)} images cannot be read"
        large = " (--max-pixels N packs larger ones)" if "--max-pixels" in shown else ""
        fail(f"{root}: {count}: {shown}; replace them, or pack without them: {remedy} --skip-broken{large}")
    for text in unreadable:
        click.echo(f"skipped {printable(str(root))}/{text}", err=True)
    for s in splits:
        if broken[s]:
            splits[s] = drop_rows(folder / f"{s}.npy", splits[s], list(broken[s]))
    if min(len(splits["train"]), len(splits["val"])) == 0:
        fail(f"{root}: no readable image is left for train or val")
    # Label names and numbers stay as they are, so a class without training images would be asked for and never learned.
    if source.classes and (lost := set(source.class_of) - set(class_of[splits["train"]].tolist())):
        fail(f"{root}: no training image of the class {source.classes[min(lost)]} can be read: replace some of them")

    values = np.array(source.values, np.uint8).reshape(len(source.keys), len(source.attributes))
    arrays, names = {}, {}
    for s, rows in splits.items():
        names[s] = [name_of(source.keys[r], source.splits[r]) for r in rows]
        arrays |= {f"{s}.attributes": values[rows]}
        arrays |= {f"{s}.class": class_of[rows]} if source.classes else {}
        arrays |= {f"{s}.hidden.{h}": ints[rows] for h, (ints, _) in source.hidden.items()}
    np.savez(folder / "labels.npz", **arrays)
    # Apart from info.json, which every start reads: names are as many as images, and seldom asked for.
    (folder / "names.json").write_text(json.dumps(names))
    info |= {"splits": {s: len(rows) for s, rows in splits.items()}, "skipped": len(unreadable)}
    info |= {"classes": source.classes, "attributes": source.attributes}
    info |= {"hidden": {h: kinds for h, (_, kinds) in source.hidden.items()}}
    (folder / "info.json").write_text(json.dumps(info, indent=2) + "\n")
    for file in folder.iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())  # before the rename: a pack with its final name is whole, whatever happens


def name_of(key: str | tuple[str, int], split: str) -> str:
    """What tables call an image: its file name, or split/index where images are no files."""
    return key if isinstance(key, str) else f"{split}/{key[1]}"


def drop_rows(path: Path, rows: np.ndarray, bad: list[int]) -> np.ndarray:
    """Rewrite an .npy file without its rows `bad`; returns `rows` without them too."""
    # Row by row through a second file: the array may be larger than the memory.
    keep = np.delete(np.arange(len(rows)), bad)
    whole, less = np.load(path, mmap_mode="r"), path.with_suffix(".less.npy")
    offset = create_array(less, (len(keep), *whole.shape[1:]))
    with open(less, "r+b") as file:
        file.seek(offset)
        for i in keep:
            file.write(whole[i].data)
    less.replace(path)
    return rows[keep]


# ---------------------------------------------------------------------------------------------------------------------
# The data set.


def select(
    spec: str | None, data: str, preset: str, classes: list[str], attributes: list[str]
) -> tuple[str, list[str]]:
    """Resolve --attributes to ('class', []) or ('A,B', ['A', 'B']); fails naming the one that does not exist."""
    if spec is None:  # celeba5 are the attributes of the paper's first experiment on CelebA
        # --preset celeba may be given for a table that lacks some of them.
        five = preset == "celeba" and set(CELEBA["celeba5"].split(",")) <= set(attributes)
        spec = "celeba5" if five else "class" if classes else ",".join(attributes)
    spec = spec.strip()
    if spec == "class" and classes:
        return spec, []
    # Spelled as the tables were read: composed accents, no spaces around.
    names, there = [layouts.nfc(s.strip()) for s in CELEBA.get(spec, spec).split(",")], set(attributes)
    if len(names) > 1 and "class" in names and classes:
        fail(f"--attributes {spec}: class stands alone, it is no attribute")
    for name in names:
        if name not in there:
            known = ", ".join((["class"] if classes else []) + attributes)
            fail(f"--attributes: {data} has no {name!r}; it has: {known}")
    if len(set(names)) < len(names):
        fail(f"--attributes {spec} names one twice")
    return ",".join(names), names


class Dataset:
    """One split of a packed source.

    images          uint8 [N, S, S, 3] RGB, memory-mapped, read-only
    labels          float32 [N, Y], one-hot or multi-hot
    label_names     Y names; label_kind 'one-hot' or 'multi-label'
    names           N file names, relative to the source, or split/index where images are no files
    fingerprint     hex hash of the source's content, the same for all its splits and sizes
    attributes      what the labels are: 'class', or attribute names joined by commas
    preset          the preset that the data has: 'critters', 'afhq', 'celeba', 'fashion-mnist' or ''
    hidden          {name: (int [N], names)}, known for evaluation alone: critters' 'kind'
    skipped         images left out of the pack (all splits) because they could not be read
    """

    def __init__(self, pack: Path, data: str, split: str = "train", attributes: str | None = None, preset: str = ""):
        info = read_info(pack)
        with reading(pack):
            if split not in info["splits"]:
                fail(f"{data} has no split {split!r}: it has {', '.join(info['splits'])}")
            # Mapped, so that a set may be larger than the memory and all processes of a machine share one copy.
            self.images = np.load(pack / f"{split}.npy", mmap_mode="r")
            with np.load(pack / "labels.npz") as file:
                arrays = {k: file[k] for k in file.files if k.startswith(split + ".")}
            if self.images.shape != (info["splits"][split], info["size"], info["size"], 3):
                raise ValueError
        self.pack, self.split, self.preset = pack, split, preset
        # The absolute path, so that a run can be measured from another folder than it was trained in.
        self.data = data if data in DATASETS else os.path.abspath(os.path.expanduser(data))
        self.name, self.size, self.fingerprint = layouts.locate(data)[0], info["size"], info["fingerprint"]
        self.squash, self.train_on_all = info["squash"], info["train_on_all"]
        self.splits, self.skipped = info["splits"], info["skipped"]
        self.attributes, names = select(attributes, data, preset, info["classes"], info["attributes"])
        self.label_kind = "multi-label" if names else "one-hot"
        self.label_names = names or info["classes"]
        # Labels are floats, as losses take them; the pack has them as bytes and class numbers.
        n, Y = len(self.images), len(self.label_names)
        # 4 bytes a label: a wide table of a large set passes all other bounds, and would end in a killed process.
        if 4 * n * Y > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2:
            fail(f"{data}: {Y:,} labels of {n:,} images take {4 * n * Y / 2**30:.1f} GB, more than half of the memory")
        if names:
            # Looking 20,000 names up in a list took a minute.
            column_of = {name: i for i, name in enumerate(info["attributes"])}
            columns = [column_of[name] for name in names]
            self.labels = np.ascontiguousarray(arrays[f"{split}.attributes"][:, columns], np.float32)
        else:
            self.labels = np.zeros((len(self.images), len(self.label_names)), np.float32)
            self.labels[np.arange(len(self.images)), arrays[f"{split}.class"]] = 1
        self.hidden = {h: (arrays[f"{split}.hidden.{h}"], names) for h, names in info["hidden"].items()}

    @functools.cached_property
    def names(self) -> list[str]:
        with reading(self.pack):
            return json.loads((self.pack / "names.json").read_text())[self.split]

    def __len__(self) -> int:
        return len(self.images)

    def part(self, split: str, attributes: str | None = None) -> "Dataset":
        """Another split, or this one with other labels, of the same pack: without listing the source again."""
        return Dataset(self.pack, self.data, split, attributes or self.attributes, self.preset)

    def info(self) -> dict:
        """What checkpoints keep of the data, as plain values."""
        keys = ["data", "name", "preset", "size", "squash", "train_on_all", "fingerprint"]
        keys += ["attributes", "label_names", "label_kind", "splits"]
        return {k: getattr(self, k) for k in keys}

    def _gather(self, rows: np.ndarray, pin: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.empty((len(rows), *self.images.shape[1:]), dtype=torch.uint8, pin_memory=pin)
        y = torch.empty((len(rows), self.labels.shape[1]), pin_memory=pin)
        np.take(self.images, rows, 0, x.numpy(), "clip")  # 'clip': straight into x; rows are within bounds anyway
        np.take(self.labels, rows, 0, y.numpy(), "clip")
        return x, y

    def batches(
        self,
        batch: int,
        device: torch.device | str,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 1,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless shuffled (uint8 [batch, S, S, 3], float32 [batch, Y]) on `device`; `batch` is this process's share.

        All processes share one stream of image indices, a permutation by (seed, epoch) after the other. A step takes
        the next batch * world of it, the process of this rank its part. `start`, images seen by all processes, is where
        the stream begins, so that a run goes on where it was. `workers` threads stay that many batches ahead; 0: none.
        """
        n = len(self)

        # Two: a batch may begin in one epoch and end in the next.
        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng([seed, epoch]).permutation(n)

        def rows() -> Iterator[np.ndarray]:
            # Each step's place in the stream follows from its number, so a resumed run needs no state but `start`.
            for step in itertools.count():
                epoch, at = np.divmod(start + (step * world + rank) * batch + np.arange(batch), n)
                yield np.concatenate([order(e)[at[epoch == e]] for e in np.unique(epoch).tolist()])

        return self._stream(rows(), device, workers)

    def sequential(
        self, batch: int, device: torch.device | str, workers: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One pass in order, like `batches`; the last batch may be shorter."""
        ends = range(0, len(self), batch)
        return self._stream((np.arange(i, min(i + batch, len(self))) for i in ends), device, workers)

    def _stream(self, rows: Iterable[np.ndarray], device: torch.device | str, workers: int) -> Iterator[tuple]:
        """The images and labels of each of `rows` in turn, `workers` threads that many batches ahead."""
        # From pinned memory the copy to the GPU runs beside the computation.
        pin, ahead = torch.device(device).type == "cuda", deque()

        def move(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return tuple(t.to(device, non_blocking=True) for t in batch)

        if not workers:
            yield from (move(self._gather(r, pin)) for r in rows)
            return
        # Threads, not processes: np.take lets go of the interpreter, and nothing has to be sent from one to another.
        pool = ThreadPoolExecutor(workers, "batches")
        try:
            for r in rows:
                ahead.append(pool.submit(self._gather, r, pin))
                if len(ahead) > workers:  # each thread has one batch under way, and the first of them is due
                    yield move(ahead.popleft().result())
            while ahead:
                yield move(ahead.popleft().result())
        finally:  # also when the caller stops in the middle: no thread outlives the stream
            pool.shutdown(cancel_futures=True)


def open_dataset(
    data: str,
    size: int | None = None,
    split: str = "train",
    attributes: str | None = None,
    skip_broken: bool = False,
    *,
    preset: str | None = None,
    squash: bool = False,
    train_on_all: bool = False,
    max_pixels: int = MAX_PIXELS,
    strict: bool = False,
    most: int = 256,
) -> Dataset:
    """Open one split of a source, packing the source first if that has not been done for its present content.

    data: preset or path. size: a power of two, by default the preset's, or what the images allow, up to `most`.
    split: 'train' and 'val' always exist. attributes: 'class', names joined by commas, celeba5, celeba10, celeba15; by
    default the classes, or else all attributes (preset celeba: celeba5). skip_broken: leave out images that cannot be
    read.
    preset: whose usual size and attributes to take; by default that of the data (layouts.preset_of), 'none' for none.
    squash: resize to the square without cropping and antialiasing. train_on_all: 'train' holds the images of all
    splits; the others stay as they are. max_pixels: refuse larger images. strict: refuse tables with lines for images
    that are not there. Prints to stderr what a user should know about the labels. Several processes may call it at once.
    Raises click.ClickException, with one line for the user, for whatever is wrong with the source or the arguments.
    """
    preset = layouts.preset_of(data, preset)
    how = dict(squash=squash, train_on_all=train_on_all, max_pixels=max_pixels, strict=strict, most=most)
    pack = prepare(data, size, skip_broken, preset=preset, **how)
    return Dataset(pack, data, split, attributes, preset)


def same_images(info: dict) -> dict:
    """The arguments of `open_dataset` that find the images of a checkpoint again, from its 'data' (`Dataset.info`)."""
    return {"preset": info["preset"] or "none", "squash": info["squash"], "train_on_all": info["train_on_all"]}


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def sheet(ds: Dataset, columns: int = 8) -> np.ndarray:
    """Picture uint8 [Y * s, columns * s, 3]: a row for each class or attribute, with the first images that have it.

    s is the size of the images, or a whole part of it, so that the picture has at most 67 million pixels.
    """
    rows = [np.flatnonzero(label)[:columns] for label in ds.labels.T]
    # Every step-th pixel: thousands of labels at 1024 px would fill the memory.
    step = next(k for k in itertools.count(1) if len(rows) * columns * math.ceil(ds.size / k) ** 2 <= MAX_PIXELS)
    images = ds.images[:, ::step, ::step]
    # Rows are equally long: white where a label has fewer images.
    blank = np.full((columns, *images.shape[1:]), 255, np.uint8)
    return np.concatenate([np.concatenate([*images[row], *blank[len(row) :]], axis=1) for row in rows])


@click.command(cls=training.OneLine)
@click.option("--data",       metavar="NAME|PATH", type=training.FilePath(), default="critters", show_default=True, help="critters, afhq, celeba, fashion-mnist, or a path to a folder or zip.")  # fmt: skip
@click.option("--preset",     metavar="NAME|none", help="Take the default size and attributes of this data set.  [default: by data]")  # fmt: skip
@click.option("--size",       metavar="PIXELS", type=int, help="Image size, a power of two from 16 to 1024.  [default: by data]")  # fmt: skip
@click.option("--attributes", metavar="NAMES", help="class, A,B,..., celeba5, celeba10 or celeba15.  [default: by data]")  # fmt: skip
@click.option("--squash",     is_flag=True, help="Resize the whole image to the square, without cropping and antialiasing.")  # fmt: skip
@click.option("--train-on-all", is_flag=True, help="Train on the images of all splits, those of val and test too.")
@click.option("--download",   "wanted", is_flag=True, help="First fetch a preset from its official source.")  # fmt: skip
@click.option("--version",    type=click.Choice(list(AFHQ)), help="Which AFHQ to fetch.  [default: v1]")  # fmt: skip
@click.option("--skip-broken", is_flag=True, help="Pack without the images that cannot be read, and list them.")
@click.option("--strict",     is_flag=True, help="Refuse tables with rows for images that are not there; else those rows are left out.")  # fmt: skip
@click.option("--max-pixels", metavar="N", type=click.IntRange(1, 2**31), default=MAX_PIXELS, show_default=True, help="Refuse larger images; decoding takes up to 24 bytes per pixel.")  # fmt: skip
@click.option("--sheet",      "picture", metavar="FILE", type=training.FilePath(), help="Write a picture of some images of each class or attribute.")  # fmt: skip
def main(data, size, attributes, wanted, version, picture, **options) -> None:
    """Find a data set, pack it, and print what it holds."""
    if version and not wanted:
        raise click.UsageError("--version goes with --download")
    if wanted:
        download(data, version)
    first = open_dataset(data, size, "train", attributes, **options)
    parts = {s: first.part(s) for s in first.splits}
    table = [("images", map(len, parts.values()))]
    # As integers: a sum in float32 stops growing at 2**24.
    sums = [p.labels.sum(0, dtype=np.int64) for p in parts.values()]
    table += [(n, [s[i] for s in sums]) for i, n in enumerate(first.label_names)]
    facts = {"source": printable(str(layouts.locate(data)[1] or "critters.py")), "preset": first.preset or "none"}
    facts |= {"labels": f"{len(first.label_names)}, {first.label_kind}", "size": f"{first.size} px"}
    facts |= {"skipped": f"{first.skipped} unreadable"} if first.skipped else {}
    facts |= {"fingerprint": first.fingerprint, "pack": first.pack}
    width = max(map(len, [*first.label_names, *facts]))
    click.echo(" " * width + "".join(f"{s:>10}" for s in parts))
    for name, counts in table:
        click.echo(f"{name:{width}}" + "".join(f"{c:>10}" for c in counts))
    for name, fact in facts.items():
        click.echo(f"{name:{width}}  {fact}")
    if picture:
        try:
            Image.fromarray(sheet(first)).save(picture)
        except (OSError, ValueError) as error:  # ValueError: Pillow writes no format of that suffix
            fail(f"cannot write {picture}: {error}")


if __name__ == "__main__":
    main()
