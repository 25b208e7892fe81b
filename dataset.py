"""Images and labels for every stage: finds a source, packs it once into a memory-mapped array, feeds batches from it.

    python dataset.py --data afhq --download          # fetch, check, pack at 256 px, print what was found
    python dataset.py --data ~/photos --size 64 --sheet sheet.png

A source is a preset (critters, afhq, celeba, fashion-mnist) or the path of a folder or zip in one of these layouts:

    cat/*.png dog/*.png ...                      class folders, alone or below train/ and val/ (or test/)
    *.png labels.csv                             header, file names, then one column of class names, or several of 0 / 1
    img_align_celeba/ list_attr_celeba.txt       CelebA, annotations as .txt or .csv, with or without list_eval_partition
    00000/*.png dataset.json                     StyleGAN's layout
    train-images-idx3-ubyte.gz ...               Fashion-MNIST's IDX files

Labels, their names and their kind come from that structure and are the same for every split. Where there is no validation
split, a tenth of each class is held out by a hash of the file names. A source is only ever read. Its pack, uint8
[N, S, S, 3], lies in $INFOSCC_CACHE (~/.cache/infoscc-gan), under the hash of the content.
"""

import contextlib
import csv
import ctypes
import difflib
import errno
import fcntl
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import click
import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from tqdm import tqdm

import critters

FORMAT = 1  # of the packs: a change of how images are decoded or stored makes new ones
PRESETS = {"critters": 32, "afhq": 256, "celeba": 128, "fashion-mnist": 32}  # and their usual sizes
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
IMAGE = re.compile(r".*\.(jpe?g|jpe|jfif|png|webp|bmp|gif|tiff?|p[pgbn]m|tga|jp2|avif)", re.IGNORECASE)
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "val")
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
CELEBA = {  # the attribute sets of the paper
    "celeba5": "Bald,Eyeglasses,Mustache,Wearing_Hat,Wearing_Necktie",
    "celeba10": "Bald,Black_Hair,Blond_Hair,Brown_Hair,Double_Chin,Eyeglasses,Gray_Hair,Mustache,Wearing_Hat,"
    "Wearing_Necktie",
    "celeba15": "Bald,Blurry,Chubby,Double_Chin,Eyeglasses,Goatee,Gray_Hair,Mustache,Narrow_Eyes,Pale_Skin,"
    "Receding_Hairline,Rosy_Cheeks,Sideburns,Wearing_Hat,Wearing_Necktie",
}
LAYOUTS = (
    "class folders (also below train/ and val/), labels.csv, CelebA (img_align_celeba/ with list_attr_celeba), "
    "StyleGAN's dataset.json, or Fashion-MNIST's idx files"
)


def fail(message: str) -> None:
    raise click.ClickException(message)


# ---------------------------------------------------------------------------------------------------------------------
# Finding a source and reading its files. `root` is a folder or a zip; names in it are relative, with forward slashes.


def data_folder(preset: str) -> Path:
    """Where a preset's files are looked for: data/<preset>, or $INFOSCC_DATA/<preset>."""
    return Path(os.environ.get("INFOSCC_DATA") or "data") / preset


def locate(data: str) -> tuple[str, Path | None]:
    """Name (for runs/<name>) and root of a source; None is the root of critters."""
    if data == "critters":
        return data, None
    root = data_folder(data) if data in PRESETS else Path(data).expanduser()
    if data in PRESETS and not root.exists() and root.with_name(root.name + ".zip").is_file():
        root = root.with_name(root.name + ".zip")
    if not root.exists() and data in PRESETS:
        fail(f"{root} does not exist: put {data} there, or have it fetched: python dataset.py --data {data} --download")
    if not root.exists():
        hint = difflib.get_close_matches(data, PRESETS, 1) or PRESETS
        fail(f"--data {data}: there is no such folder or zip; did you mean {' or '.join(hint)}?")
    if root.is_file() and not zipfile.is_zipfile(root):
        fail(f"--data {data} is a file but not a zip: expected a folder or zip of {LAYOUTS}")
    name = data if data in PRESETS else root.resolve().stem if root.is_file() else root.resolve().name
    return re.sub(r"[^\w.-]+", "_", name) or "data", root


def hash_of(value: str | list) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def listing(root: Path) -> tuple[Path, list[str], list[str], str, int]:
    """All files and folders below `root`, hidden ones left out.

    Returns (root, files, folders, key, newest): `key` hashes path, size, times and inode of every file, so it is the
    same as long as nothing was touched; `newest` is the last change, in ns. A folder holding one zip alone stands for it.
    """
    files, folders, stats = [], [], []
    if root.is_file():
        stats.append((".", root.stat()))
        try:
            members = zipfile.ZipFile(root).namelist()
        except UNREADABLE as error:
            fail(f"{root} cannot be read as a zip: {error}")
        for name in members:
            parts = PurePosixPath(name).parts
            if name.startswith("/") or "\\" in name or ".." in parts or re.match("[A-Za-z]:", name):
                why = "has backslashes" if "\\" in name else "points outside the archive"
                fail(f"{root}: member {name!r} {why}, so it is refused")
            if not any(p.startswith(".") or p == "__MACOSX" for p in parts):
                (folders if name.endswith("/") else files).append("/".join(parts))
        folders = sorted({str(p) for n in files for p in PurePosixPath(n).parents} - {"."} | set(folders))
    else:

        def walk(folder: Path, prefix: str, above: tuple) -> None:
            inode = (folder.stat().st_dev, folder.stat().st_ino)
            for entry in os.scandir(folder) if inode not in above else ():  # a link to a folder above ends here
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if entry.is_dir():
                    folders.append(prefix + entry.name)
                    walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, inode))
                elif entry.is_file() or entry.is_symlink():
                    files.append(prefix + entry.name)
                    stats.append((prefix + entry.name, os.stat(entry.path)))

        try:
            walk(root, "", ())
        except OSError as error:
            fail(f"{error.filename} cannot be read: {error.strerror}")
        whole = [f for f in files if not f.endswith(".part")]
        if len(whole) == 1 and whole[0].endswith(".zip"):
            return listing(root / whole[0])
    state = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in sorted(stats)]
    newest = max((max(mtime, ctime) for _, _, mtime, ctime, _ in state), default=0)
    return root, sorted(files), sorted(folders), hash_of([str(root.resolve()), sorted(folders), state]), newest


def read(root: Path, name: str) -> bytes:
    """The bytes of one file below a folder, or of one member of a zip."""
    if root.is_dir():
        return (root / name).read_bytes()
    archive = _archive(root, root.stat().st_mtime_ns, os.getpid())
    member = archive.NameToInfo.get(name) or archive.getinfo("./" + name)  # as some programs write them
    if member.file_size > 2**31:
        raise ValueError("larger than 2 GB")
    return archive.read(member)


@functools.lru_cache(maxsize=2)
def _archive(path: Path, changed: int, pid: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # per process: an inherited one would share its file position


@functools.lru_cache(maxsize=4)
def read_idx(root: Path, name: str) -> np.ndarray:
    """An IDX file of unsigned bytes (the format of MNIST), gzipped or not."""
    try:
        raw = read(root, name)
        raw = gzip.decompress(raw) if name.endswith(".gz") else raw
        if raw[:3] != b"\0\0\x08":
            raise ValueError
        shape = np.frombuffer(raw, ">u4", raw[3], 4).astype(int)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except (*UNREADABLE, IndexError):
        fail(f"{root / name} is damaged: not a whole IDX file of bytes")


# ---------------------------------------------------------------------------------------------------------------------
# What a source holds, from its structure: no image is decoded here.


@dataclass
class Source:
    """Every image of a source, sorted, with its split and labels. A key is a file name, or (file or split, index)."""

    root: Path | None
    files: list[str]  # all that the fingerprint covers
    keys: list[str] | list[tuple[str, int]]
    split: np.ndarray  # [N] of 'train', 'val', 'test'
    classes: list[str]
    class_of: np.ndarray  # int64 [N], empty without classes
    attributes: list[str]
    values: np.ndarray  # uint8 [N, len(attributes)], 0 or 1
    hidden: dict[str, tuple[np.ndarray, list[str]]] = field(default_factory=dict)


def scan(root: Path | None, files: list[str], folders: list[str]) -> Source:
    """Find the layout of a source and read its labels; fails with one line naming file and line of what is wrong."""
    if root is None:
        return scan_critters()
    base = {PurePosixPath(name).name: name for name in reversed(files)}
    if "train-images-idx3-ubyte" in base or "train-images-idx3-ubyte.gz" in base:
        return scan_idx(root, base)
    images = [name for name in files if IMAGE.fullmatch(name)]
    if "list_attr_celeba.txt" in base or "list_attr_celeba.csv" in base:
        return scan_celeba(root, images, base)
    top, tables = "", []  # the folder below which classes begin: zips and downloads often wrap theirs in another
    while True:
        tables = [top + t for t in ("dataset.json", "labels.csv") if top + t in files]
        inside = [f for f in folders if f.startswith(top) and "/" not in f[len(top) :]]
        direct = {n.rpartition("/")[0] for n in images}
        if tables or len(inside) != 1 or top[:-1] in direct or inside[0][len(top) :].lower() in SPLITS:
            break
        if inside[0] in direct and not {f"{inside[0]}/dataset.json", f"{inside[0]}/labels.csv"} & set(files):
            break
        top = inside[0] + "/"
    if tables:
        return (scan_json if tables[0].endswith("json") else scan_csv)(root, images, tables[0], top)
    return scan_folders(root, images, folders, top)


def arrange(
    root, files, keys, split, classes=(), class_of=(), attributes=(), values=(), hidden=None, seen=False
) -> Source:
    """Check the names, complete the splits, and make the Source.

    `split` names the split of each image, or is None. Without val, test becomes val; without either, about a tenth of
    each class, those whose names hash lowest, are held out. seen: the classes are those seen, not a list of names that
    came with the data, so each must have training images.
    """
    for name, times in [*Counter(classes).items(), *Counter(attributes).items()]:
        if times > 1 or not name or (attributes and "," in name):
            fail(f"{root}: label name {name!r} is {'used twice' if times > 1 else 'empty or has a comma'}")
        if not name.isprintable():
            fail(f"{root}: label name {name!r} has characters that cannot be shown, or is not UTF-8: rename it")
    class_of = np.asarray(class_of, np.int64)
    split = np.array(["train"] * len(keys) if split is None else split, dtype=object)
    if "val" not in split:
        split[split == "test"] = "val"
    if "val" not in split:
        digests = np.array([hash_of(key) for key in keys])
        for c in range(len(classes) or 1):
            members = np.flatnonzero(class_of == c) if classes else np.arange(len(keys))
            held = 0 if len(members) < 2 else max(1, round(len(members) / 10))
            split[members[np.argsort(digests[members])[:held]]] = "val"
    if "train" not in split or "val" not in split:
        fail(f"{root}: no images are left for train or val; each class needs at least two")
    if seen and (missing := set(range(len(classes))) - set(class_of[split == "train"].tolist())):
        fail(f"{root}: class {classes[min(missing)]} has no training images: add some or remove it")
    values = np.asarray(values, np.uint8).reshape(len(keys), len(attributes))
    return Source(root, sorted(files), keys, split, list(classes), class_of, list(attributes), values, hidden or {})


def scan_critters() -> Source:
    keys = [(s, i) for s, count in critters.SPLITS.items() for i in range(count)]
    facts = [critters.factors(0, critters.OFFSETS[s] + i) for s, i in keys]
    species, values = [f["species"] for f in facts], [f["attributes"] for f in facts]
    hidden = {"kind": (np.array([f["kind"] for f in facts]), list(critters.KINDS))}
    return arrange(None, [], keys, [s for s, _ in keys], critters.SPECIES, species, critters.ATTRIBUTES, values, hidden)


def scan_folders(root: Path, images: list[str], folders: list[str], top: str) -> Source:
    below = [f[len(top) :].split("/") for f in folders if f.startswith(top)]
    first = [p[0] for p in below if len(p) == 1]
    splits = {f: SPLITS[f.lower()] for f in first if f.lower() in SPLITS}
    inner = {f: {p[1] for p in below if len(p) == 2 and p[0] == f} for f in first}
    depth = int("train" in splits.values() and (len(splits) > 1 or len(first) == 1))  # of the class in the path
    depth = max(depth, int(len(splits) == len(first) > 0 and all(inner.values())))
    other = [f for f in first if f not in splits and (depth or any(inner[f] & inner[s] for s in splits))]
    if other:
        fail(f"{root / top / min(other)} is neither train, val nor test: rename it or move it away")
    if not images:
        fail(f"{root} holds no images: expected {LAYOUTS}")
    parts = [name[len(top) :].split("/") for name in images]
    for name, p in zip(images, parts, strict=True):
        if len(p) < depth + 2:
            fail(f"{root / name} has no label, as it is in no class folder: understood are {LAYOUTS}")
    found = {tuple(p) for p in below if len(p) == depth + 1}
    for p in sorted(found - {tuple(p[: depth + 1]) for p in parts}):
        fail(f"class folder {root / top / '/'.join(p)} has no images: add some or remove it")
    classes = sorted({p[-1] for p in found})
    train = {p[-1] for p in found if not depth or splits[p[0]] == "train"}
    if set(classes) - train:
        fail(f"class {min(set(classes) - train)} of {root / top} has no folder in train/")
    index = {c: i for i, c in enumerate(classes)}
    split = [splits[p[0]] for p in parts] if depth else None
    return arrange(root, images, images, split, classes, [index[p[depth]] for p in parts])


def read_rows(root: Path, table: str) -> list[tuple[str, list[str]]]:
    """The rows of a .csv or of a file with spaces between the columns, each after the place to name in errors."""
    try:
        lines = read(root, table).decode("utf-8-sig").splitlines()
        comma = table.endswith(".csv")
        rows = list(csv.reader(lines, skipinitialspace=True, strict=True)) if comma else [s.split() for s in lines]
    except (*UNREADABLE, csv.Error) as error:
        fail(f"{root / table} cannot be read: {error}")
    rows = [(f"{root / table} line {i}", [cell.strip() for cell in row]) for i, row in enumerate(rows, 1) if any(row)]
    return rows or [(f"{root / table} line 1", [])]


def by_image(table: Path, rows: list, at: dict[str, str], columns: int, convert: Callable) -> dict:
    """convert(cells, place) of each row of `table`, by image; `at` maps the names in a row's first cell to images.

    Fails unless every image has exactly one row, with so many columns of labels.
    """
    result = {}
    for where, row in rows:
        name, *cells = row or [""]
        if name not in at:
            fail(f"{where}: there is no image {name}")
        if len(cells) != columns:
            fail(f"{where}: {len(cells)} values, but there are {columns} names")
        if at[name] in result:
            fail(f"{where}: {name} is there twice")
        result[at[name]] = convert(cells, where)
    for image in sorted(set(at.values()) - set(result)):
        fail(f"{table} has no line for the image {image}")
    return result


def binary(cells: list[str], where: str) -> list[int]:
    """Attribute values, 0 / 1 or -1 / 1, as 0 or 1."""
    try:
        return [{"0": 0, "1": 1, "-1": 0}[c] for c in cells]
    except KeyError as error:
        fail(f"{where}: {error.args[0]!r} is not an attribute value (0 or 1, or -1 or 1)")


def scan_csv(root: Path, images: list[str], table: str, top: str) -> Source:
    (place, header), *rows = read_rows(root, table)
    at = {name[len(top) :]: name for name in images}
    split_at = next((i for i, h in enumerate(header[1:]) if h.lower() == "split"), None)
    names = [h for i, h in enumerate(header[1:]) if i != split_at]
    if not names or header[0] in at:
        fail(f"{place}: expected a header: file name, then the names of the labels")

    def convert(cells: list[str], where: str) -> tuple:
        split = cells.pop(split_at).lower() if split_at is not None else "train"
        if split not in SPLITS:
            fail(f"{where}: {split!r} is not a split: train, val or test")
        if cells == [""]:
            fail(f"{where}: the class is missing")
        return SPLITS[split], cells[0] if len(names) == 1 else binary(cells, where)

    found = by_image(root / table, rows, at, len(header) - 1, convert)
    split, labels = zip(*found.values(), strict=True) if found else ((), ())
    split = list(split) if split_at is not None else None
    if len(names) > 1:
        return arrange(root, [*images, table], list(found), split, attributes=names, values=labels)
    numbers = all(c.isdecimal() for c in labels)
    classes = sorted(set(labels), key=lambda c: (int(c), c) if numbers else (0, c))
    index = {c: i for i, c in enumerate(classes)}
    return arrange(root, [*images, table], list(found), split, classes, [index[c] for c in labels], seen=True)


def scan_celeba(root: Path, images: list[str], base: dict[str, str]) -> Source:
    images = [name for name in images if "img_align_celeba" in name.split("/")[:-1]]
    if not images:
        fail(f"{root} has CelebA's annotations, but no images in img_align_celeba/: unpack img_align_celeba.zip there")
    at = {PurePosixPath(name).name: name for name in images}
    for name in images:
        if at[PurePosixPath(name).name] != name:
            fail(f"{root}: {at[PurePosixPath(name).name]} and {name} have one name, so no line can tell them apart")
    table = base.get("list_attr_celeba.txt") or base["list_attr_celeba.csv"]
    (place, names), *rows = read_rows(root, table)
    if table.endswith(".csv"):
        names = names[1:]
    else:  # the number of images, then the names
        if len(names) != 1 or not names[0].isdecimal() or not rows:
            fail(f"{place}: expected the number of images, then a line of attribute names")
        if int(names[0]) != len(rows) - 1:
            fail(f"{place}: announces {names[0]} images, but {len(rows) - 1} lines follow the names")
        names, *rows = rows[0][1], *rows[1:]
    values = by_image(root / table, rows, at, len(names), binary)
    files, split = [*images, table], None
    if table := base.get("list_eval_partition.txt") or base.get("list_eval_partition.csv"):

        def convert(cells: list[str], where: str) -> str:
            if cells[0] not in ("0", "1", "2"):
                fail(f"{where}: {cells[0]!r} is not a partition: 0 train, 1 val, 2 test")
            return ("train", "val", "test")[int(cells[0])]

        partition = by_image(root / table, read_rows(root, table)[table.endswith(".csv") :], at, 1, convert)
        files, split = [*files, table], [partition[image] for image in values]
    return arrange(root, files, list(values), split, attributes=names, values=list(values.values()))


def scan_json(root: Path, images: list[str], table: str, top: str) -> Source:
    place = root / table
    try:
        content = json.loads(read(root, table))
        pairs, names = content["labels"], content.get("label_names")
        rows = [(f"{place}: entry {i}", [name, label]) for i, (name, label) in enumerate(pairs)]
        kind = type(rows[0][1][1])
        at = {name[len(top) :]: name for name in images}
        most = max(x for _, (_, x) in rows if type(x) is int) + 1 if kind is int else len(rows[0][1][1])
        seen, names = names is None, [str(i) for i in range(min(most, 2**16))] if names is None else names
        texts = [*names, *(name for _, (name, _) in rows)]
        if not all(isinstance(text, str) for text in texts) or (kind is list and not names):
            raise TypeError
    except (*UNREADABLE, KeyError, TypeError, AttributeError, RecursionError, IndexError):
        fail(f'{place} has no labels in StyleGAN\'s form: {{"labels": [["00000/img.png", 3], ...]}}')

    def convert(cells: list, where: str) -> int | list[int]:
        label = cells[0]
        if type(label) is not kind or kind not in (int, list) or (kind is int and not 0 <= label < len(names)):
            fail(
                f"{where}: {label!r} is no label: needed is a class below {len(names)}, or a list of 0 and 1, all alike"
            )
        if kind is list and len(label) != len(names):
            fail(f"{where}: {len(label)} values, but there are {len(names)} labels")
        return label if kind is int else binary([f"{v:g}" if isinstance(v, float) else str(v) for v in label], where)

    found = by_image(place, rows, at, 1, convert)
    tops = [name[len(top) :].split("/")[0].lower() for name in found]
    split = [SPLITS[t] for t in tops] if set(tops) <= set(SPLITS) else None
    if kind is int:
        return arrange(root, [*images, table], list(found), split, names, list(found.values()), seen=seen)
    return arrange(root, [*images, table], list(found), split, attributes=names, values=list(found.values()))


def scan_idx(root: Path, base: dict[str, str]) -> Source:
    read_idx.cache_clear()
    files, keys, split, labels = [], [], [], []
    for part, s in (("train", "train"), ("t10k", "val")):
        pair = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
        for name in pair:
            if name not in base and name + ".gz" not in base:
                fail(f"{root}: {name} is missing")
        pair = [base.get(name) or base[name + ".gz"] for name in pair]
        x, y = (read_idx(root, name) for name in pair)
        if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
            fail(f"{root / pair[1]}: {len(y)} labels, but {root / pair[0]} has {len(x)} images")
        if y.max(initial=0) > 9:
            fail(f"{root / pair[1]}: label {y.max()} is not one of the ten classes")
        files, keys, split = files + pair, keys + [(pair[0], i) for i in range(len(x))], split + [s] * len(x)
        labels += y.tolist()
    # Other sets come under the same file names; what their folder is called tells.
    other = {"mnist", "kmnist", "qmnist"} & {p.lower() for p in (root.resolve() / files[0]).parts}
    return arrange(root, files, keys, split, [str(i) for i in range(10)] if other else FASHION, labels)


# ---------------------------------------------------------------------------------------------------------------------
# Images: any mode to RGB, center crop, antialiased resize.


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB of the first frame: transparency on white, 16-bit and float grey scaled to 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.nan_to_num(np.asarray(image, np.float64))
        peaks = (1, 255) if image.mode == "F" else (65535, 2**31 - 1)
        grey = grey * (255 / peaks[int(grey.max() > peaks[0])])
        return Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def square(image: Image.Image, size: int) -> np.ndarray:
    """Center crop to a square, Lanczos resize (antialiased) -> uint8 [size, size, 3]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS) if side != size else image)


def load_image(root: Path | None, key: str | tuple[str, int], size: int) -> np.ndarray:
    """Image `key` of a source as uint8 [size, size, 3] RGB. Raises whatever Pillow raises for one it cannot read."""
    if root is None:
        return critters.render(0, *key, size)[0]
    if isinstance(key, tuple):
        return square(Image.fromarray(read_idx(root, key[0])[key[1]]).convert("RGB"), size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(read(root, key))) as image:
            return square(to_rgb(image), size)


def usual_size(source: Source) -> int:
    """Largest power of two, in 32..256, not above the smallest side of a few images spread over the source."""
    if isinstance(source.keys[0], tuple):
        return 32
    sides = []
    for key in source.keys[:: max(1, len(source.keys) // 16)]:
        with contextlib.suppress(Exception), warnings.catch_warnings():  # an unreadable one is named when it is packed
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(read(source.root, key))) as image:
                sides.append(min(image.size))
    return min(256, max(32, 1 << (min(sides, default=32).bit_length() - 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Packing: a folder with <split>.npy, labels.npz, info.json, made under another name and renamed.


def prepare(data: str, size: int | None = None, skip_broken: bool = False) -> Path:
    """The folder of the pack of `data` at `size`, made now if there is none for this content."""
    name, root = locate(data)
    most = 1024 if root else 512  # critters are drawn no larger
    if size is not None and not (16 <= size <= most and size & (size - 1) == 0):
        fail(f"--size {size} is not a power of two between 16 and {most}")
    size = size or PRESETS.get(data)
    cache = Path(os.environ.get("INFOSCC_CACHE") or "~/.cache/infoscc-gan").expanduser()
    if root is None:
        files, folders, newest = [], [], 0
        key = hashlib.sha256(Path(critters.__file__).read_bytes()).hexdigest()
    else:
        root, files, folders, key, newest = listing(root)
    seen = cache / "seen" / f"{key}.json"  # the fingerprint and usual size of files with these times and sizes

    def find(fingerprint: str, size: int) -> Path | None:
        return next(cache.glob(f"*-{size}-{fingerprint[:16]}-v{FORMAT}"), None)

    def known() -> Path | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            memo = json.loads(seen.read_text())
            return find(memo["fingerprint"], size or memo["size"])

    if pack := known():
        return pack
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with only_one(cache) as alone:
            if pack := known():
                return pack
            started = time.time_ns()
            source = scan(root, files, folders)
            if data == "afhq" and not {"cat", "dog", "wild"}.issuperset(source.classes):
                fail(f"{root} is not AFHQ: its classes are {', '.join(source.classes)}, not cat, dog, wild")
            again = f"replace it, or pack without: python dataset.py --data {shlex.quote(data)} --skip-broken"
            fingerprint = key if root is None else fingerprint_of(source, None if skip_broken else again)
            usual = usual_size(source)
            size = size or usual
            pack = find(fingerprint, size)
            if not pack:
                for left in cache.glob(".packing-*") if alone else ():  # by processes that were killed
                    shutil.rmtree(left, ignore_errors=True)
                pack = cache / f"{name}-{size}-{fingerprint[:16]}-v{FORMAT}"
                aside = cache / f".packing-{pack.name}-{os.uname().nodename}-{os.getpid()}"
                try:
                    write_pack(source, aside, size, fingerprint, f"{shlex.quote(data)} --size {size}", skip_broken)
                    if root is not None and listing(root)[3] != key:
                        fail(f"{root} changed while it was being packed: run again")
                    if not find(fingerprint, size):  # else another process without a lock was first, with the same
                        aside.rename(pack)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
            if newest < started - 2 * 10**9:  # a change within the clock's grain would go unseen
                seen.parent.mkdir(exist_ok=True)
                part = seen.with_name(f".{key}.{os.getpid()}")
                part.write_text(json.dumps({"fingerprint": fingerprint, "size": usual}))
                part.replace(seen)
            return pack
    except OSError as error:
        fail(f"cannot write the cache in {cache}: {error.strerror}; make room, or set INFOSCC_CACHE to another folder")


@contextlib.contextmanager
def only_one(cache: Path) -> Iterator[bool]:
    """Let one process at a time pack; the kernel drops the lock with its process. False where there are no locks."""
    with open(cache / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            click.echo(f"Waiting for another process that packs into {cache}", err=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # as on some network file systems: then two may pack at once
            yield False
            return
        yield True


def fingerprint_of(source: Source, again: str | None) -> str:
    """SHA-256 over label names, and names and contents of all files that images and labels come from.

    again: what to do about an image that cannot be read; None: go on, packing names and skips it.
    """

    def one(name: str) -> str:
        try:
            return hashlib.sha256(read(source.root, name)).hexdigest()
        except UNREADABLE as error:
            why, image = getattr(error, "strerror", None) or str(error), IMAGE.fullmatch(name)
            if image and not again:
                return why
            fail(f"{source.root / name} cannot be read: {why}" + f"; {again}" * bool(image))

    with ThreadPoolExecutor(4) as pool:
        work = pool.map(one, source.files)
        few = len(source.files) < 1000
        contents = list(tqdm(work, "reading", len(source.files), unit="file", dynamic_ncols=True, disable=few))
    # Names of classes may depend on what a folder is called, so they are part of it.
    return hash_of([source.classes, source.attributes, source.files, contents])


def create_array(path: Path, shape: tuple[int, ...]) -> int:
    """Make an .npy file of uint8 with its disk space reserved; returns where its rows begin."""
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)  # a full disk shows here, as an error
    return array.offset


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent is killed: it would wait for work, and hold the lock, for ever."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def pack_rows(root: Path | None, keys: list, size: int, path: Path, offset: int) -> list[tuple[int, str]]:
    """Decode some images and write them from byte `offset` of `path` on; returns (position, reason) of the broken."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    rows, broken = np.zeros((len(keys), size, size, 3), np.uint8), []
    for i, key in enumerate(keys):
        try:
            rows[i] = load_image(root, key, size)
        except Exception as error:  # decoders raise all kinds of errors on damaged files
            reason = "" if isinstance(error, UnidentifiedImageError) else str(error).split("\n")[0]
            broken.append((i, reason or "it is no image"))
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(rows.data)
    return broken


def write_pack(source: Source, folder: Path, size: int, fingerprint: str, data: str, skip_broken: bool) -> None:
    """Decode all splits with all processors into <split>.npy, and write labels.npz and info.json."""
    folder.mkdir()
    splits = {s: np.flatnonzero(source.split == s) for s in ("train", "val", "test") if s in source.split}
    row, jobs, skipped = size * size * 3, [], {s: [] for s in splits}
    chunk = max(1, min(64, 2**24 // row))
    processes = len(os.sched_getaffinity(0)) if len(source.keys) > 64 else 1
    context = multiprocessing.get_context("fork")  # a new interpreter would first import torch
    pool = ProcessPoolExecutor(processes, context, end_with_parent, (os.getpid(),)) if processes > 1 else None
    bar = tqdm(total=len(source.keys), desc=f"packing at {size} px", unit="img", dynamic_ncols=True)
    try:
        for s, rows in splits.items():
            offset = create_array(folder / f"{s}.npy", (len(rows), size, size, 3))
            for i in range(0, len(rows), chunk):
                keys = [source.keys[r] for r in rows[i : i + chunk]]
                job = functools.partial(pack_rows, source.root, keys, size, folder / f"{s}.npy", offset + i * row)
                jobs.append((s, i, keys, pool.submit(job).result if pool else job))
        for s, start, keys, finish in jobs:
            for i, reason in finish():
                if not skip_broken:
                    again = f"python dataset.py --data {data} --skip-broken"
                    fail(f"{source.root}/{keys[i]} cannot be read ({reason}): replace it, or pack without: {again}")
                tqdm.write(f"skipped {source.root}/{keys[i]}: {reason}", file=sys.stderr)
                skipped[s].append(start + i)
            bar.update(len(keys))
    except BrokenProcessPool:
        fail(f"packing {data}: a process was killed, probably for lack of memory; run again with less beside it")
    finally:
        bar.close()
        if pool:
            pool.shutdown(cancel_futures=True)
    arrays = {}
    for s, rows in splits.items():
        if skipped[s]:
            rows = drop_rows(folder / f"{s}.npy", rows, skipped[s])
        splits[s] = len(rows)
        arrays |= {f"{s}.attributes": source.values[rows]}
        arrays |= {f"{s}.class": source.class_of[rows]} if source.classes else {}
        arrays |= {f"{s}.hidden.{h}": ints[rows] for h, (ints, _) in source.hidden.items()}
    if min(splits["train"], splits["val"]) == 0:
        fail(f"{source.root}: no readable image is left for train or val")
    np.savez(folder / "labels.npz", **arrays)
    info = {"size": size, "fingerprint": fingerprint, "splits": splits, "skipped": sum(map(len, skipped.values()))}
    info |= {"classes": source.classes, "attributes": source.attributes}
    info |= {"hidden": {h: names for h, (_, names) in source.hidden.items()}}
    (folder / "info.json").write_text(json.dumps(info, indent=2) + "\n")
    for file in folder.iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())


def drop_rows(path: Path, rows: np.ndarray, bad: list[int]) -> np.ndarray:
    """Rewrite an .npy file without its rows `bad`; returns `rows` without them too."""
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


def select(spec: str | None, data: str, classes: list[str], attributes: list[str]) -> tuple[str, list[str]]:
    """Resolve --attributes to ('class', []) or ('A,B', ['A', 'B']); fails naming the one that does not exist."""
    if spec is None:
        spec = "celeba5" if data == "celeba" else "class" if classes else ",".join(attributes)
    if spec == "class" and classes:
        return spec, []
    names = [s.strip() for s in CELEBA.get(spec, spec).split(",")]
    for name in names:
        if name not in attributes:
            close = difflib.get_close_matches(name, attributes, 2)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            known = ", ".join((["class"] if classes else []) + attributes)
            fail(f"--attributes: {data} has no {name!r}{hint}; it has: {known}")
    if len(set(names)) < len(names):
        fail(f"--attributes {spec} names one twice")
    return ",".join(names), names


class Dataset:
    """One split of a packed source.

    images          uint8 [N, S, S, 3] RGB, memory-mapped, read-only
    labels          float32 [N, Y], one-hot or multi-hot
    label_names     Y names; label_kind 'one-hot' or 'multi-label'
    fingerprint     hex hash of the source's content, the same for all its splits and sizes
    attributes      what the labels are: 'class', or attribute names joined by commas
    hidden          {name: (int [N], names)}, known for evaluation alone: critters' 'kind'
    skipped         images left out of the pack (all splits) because they could not be read
    """

    def __init__(self, pack: Path, data: str, split: str = "train", attributes: str | None = None):
        try:
            info = json.loads((pack / "info.json").read_text())
            if split not in info["splits"]:
                fail(f"{data} has no split {split!r}: it has {', '.join(info['splits'])}")
            self.images = np.load(pack / f"{split}.npy", mmap_mode="r")
            with np.load(pack / "labels.npz") as file:
                arrays = {k: file[k] for k in file.files if k.startswith(split + ".")}
            if self.images.shape != (info["splits"][split], info["size"], info["size"], 3):
                raise ValueError
        except (*UNREADABLE, KeyError):
            fail(f"the pack {pack} is damaged: delete that folder and run again")
        self.pack, self.data, self.split = pack, data, split
        self.name, self.size, self.fingerprint = locate(data)[0], info["size"], info["fingerprint"]
        self.splits, self.skipped = info["splits"], info["skipped"]
        self.attributes, names = select(attributes, data, info["classes"], info["attributes"])
        self.label_kind = "multi-label" if names else "one-hot"
        self.label_names = names or info["classes"]
        if names:
            columns = [info["attributes"].index(n) for n in names]
            self.labels = np.ascontiguousarray(arrays[f"{split}.attributes"][:, columns], np.float32)
        else:
            self.labels = np.eye(len(self.label_names), dtype=np.float32)[arrays[f"{split}.class"]]
        self.hidden = {h: (arrays[f"{split}.hidden.{h}"], names) for h, names in info["hidden"].items()}

    def __len__(self) -> int:
        return len(self.images)

    def part(self, split: str, attributes: str | None = None) -> "Dataset":
        """Another split, or this one with other labels, of the same pack: without listing the source again."""
        return Dataset(self.pack, self.data, split, attributes or self.attributes)

    def info(self) -> dict:
        """What checkpoints keep of the data, as plain values."""
        keys = ["data", "name", "size", "fingerprint", "attributes", "label_names", "label_kind", "splits"]
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

        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng([seed, epoch]).permutation(n)

        def rows() -> Iterator[np.ndarray]:
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
        pin, ahead = torch.device(device).type == "cuda", deque()

        def move(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return tuple(t.to(device, non_blocking=True) for t in batch)

        if not workers:
            yield from (move(self._gather(r, pin)) for r in rows)
            return
        pool = ThreadPoolExecutor(workers, "batches")
        try:
            for r in rows:
                ahead.append(pool.submit(self._gather, r, pin))
                if len(ahead) > workers:
                    yield move(ahead.popleft().result())
            while ahead:
                yield move(ahead.popleft().result())
        finally:
            pool.shutdown(cancel_futures=True)


def open_dataset(
    data: str, size: int | None = None, split: str = "train", attributes: str | None = None, skip_broken: bool = False
) -> Dataset:
    """Open one split of a source, packing the source first if that has not been done for its present content.

    data: preset or path. size: a power of two, by default the preset's, or what the images allow. split: 'train' and
    'val' always exist. attributes: 'class', names joined by commas, celeba5, celeba10, celeba15; by default the
    classes, or else all attributes (preset celeba: celeba5). Safe to call from several processes at once.
    Raises click.ClickException, with one line for the user, for whatever is wrong with the source or the arguments.
    """
    return Dataset(prepare(data, size, skip_broken), data, split, attributes)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in [-1, 1], channels_last."""
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1)


# ---------------------------------------------------------------------------------------------------------------------
# Downloads: official sources, resumed where they stopped, checked before they get their name.

AFHQ = {  # of StarGAN v2: address, number of images
    "v1": ("https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1", "afhq.zip", 16130),
    "v2": ("https://www.dropbox.com/s/vkzjokiwof5h8w6/afhq_v2.zip?dl=1", "afhq_v2.zip", 15803),
}


def fetch(url: str, path: Path, check: Callable[[Path], str | None], tries: int = 4) -> None:
    """Download `url` to `path`, going on from `path`.part if there is one. check(part): what is wrong with it, or None."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    by_hand = f"or fetch {url} by hand and put it at {path}"
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "User-Agent": "infoscc-gan"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                have = have if answer.status == 206 else 0  # 200: the server sends all of it again
                length = answer.headers["Content-Length"]
                total = have + int(length) if length else None
                bar = tqdm(total=total, initial=have, desc=path.name, unit="B", unit_scale=True, dynamic_ncols=True)
                with open(part, "ab" if have else "wb") as file, bar:
                    while block := answer.read(2**20):
                        bar.update(file.write(block))
                if total and part.stat().st_size < total:
                    raise ConnectionError("the connection broke off")
            break
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # nothing is left to send; the check tells whether that is right
                break
            fail(f"{url} answers {error.code} {error.reason}: try again later, {by_hand}")
        except (OSError, http.client.HTTPException) as error:
            if attempt == tries - 1 or getattr(error, "errno", None) == errno.ENOSPC:
                fail(f"cannot fetch {url} ({getattr(error, 'reason', None) or error}): run again to go on, {by_hand}")
            time.sleep(attempt)
    if wrong := check(part):
        part.unlink()
        fail(f"{url} did not give the right file ({wrong}), so it was removed: run again, {by_hand}")
    part.replace(path)


def check_zip(path: Path, images: int) -> str | None:
    """What is wrong with a zip that should hold so many images, all of them whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            count = sum(name.endswith((".jpg", ".png")) and "__MACOSX" not in name for name in archive.namelist())
            damaged = archive.testzip()
    except UNREADABLE as error:
        return f"not a whole zip: {error}"
    return f"{count} images, not {images}" if count != images else damaged and f"{damaged} in it is damaged"


def check_md5(md5: str, path: Path) -> str | None:
    from torchvision.datasets.utils import check_integrity  # slow to import

    return None if check_integrity(path, md5) else "wrong checksum"


def download(preset: str, version: str = "v1") -> None:
    """Fetch afhq, celeba or fashion-mnist into its data folder, what is not there already."""
    folder = data_folder(preset)
    there = [n for n in (os.listdir(folder) if folder.is_dir() else []) if not n.startswith(".")]
    if preset == "afhq":
        url, name, images = AFHQ[version]
        other = AFHQ["v2" if version == "v1" else "v1"][1]
        if other in there:
            fail(f"{folder} already holds {other}: move it away to fetch AFHQ {version} there")
        if set(there) <= {f"{name}.part", f"{other}.part"}:
            fetch(url, folder / name, lambda part: check_zip(part, images))
    elif preset == "fashion-mnist":
        from torchvision.datasets import FashionMNIST  # knows addresses and checksums; slow to import

        for name, md5 in FashionMNIST.resources:
            if name not in there:
                fetch(FashionMNIST.mirrors[0] + name, folder / name, functools.partial(check_md5, md5))
    elif preset == "celeba":
        from torchvision.datasets import CelebA

        try:
            import gdown
        except ImportError:
            fail("CelebA is on Google Drive: pip install gdown, then run again")
        folder.mkdir(parents=True, exist_ok=True)
        for drive_id, md5, name in CelebA.file_list:
            if name in there or name not in ("img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt"):
                continue
            part, wrong = folder / f"{name}.part", None
            try:
                gdown.download(id=drive_id, output=str(part), resume=True)
            except Exception as error:  # gdown and requests have many
                wrong = str(error).split("\n")[0]
            if wrong := wrong or check_md5(md5, part):
                by_hand = f"or fetch it from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and put it in {folder}"
                fail(f"Google Drive did not give {name} ({wrong}): run again later, {by_hand}")
            part.replace(folder / name)
        if "img_align_celeba" not in there:
            aside = folder / ".unpacking"
            try:
                with zipfile.ZipFile(folder / "img_align_celeba.zip") as archive:
                    for member in tqdm(archive.namelist(), desc="unpacking", unit="file", dynamic_ncols=True):
                        archive.extract(member, aside)  # never outside: it drops leading slashes and '..'
                (aside / "img_align_celeba").rename(folder / "img_align_celeba")
            except UNREADABLE as error:
                fail(f"cannot unpack {folder / 'img_align_celeba.zip'}: {error}")
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    else:
        raise click.UsageError(f"--download is for afhq, celeba and fashion-mnist, not {preset}")


# ---------------------------------------------------------------------------------------------------------------------


def sheet(ds: Dataset, columns: int = 8) -> np.ndarray:
    """Picture uint8 [Y * S, columns * S, 3]: a row for each class or attribute, with the first images that have it."""
    rows = [np.flatnonzero(label)[:columns] for label in ds.labels.T]
    blank = np.full((columns, ds.size, ds.size, 3), 255, np.uint8)
    return np.concatenate([np.concatenate([*ds.images[row], *blank[len(row) :]], axis=1) for row in rows])


@click.command()
@click.option("--data",       metavar="NAME|PATH", default="critters", show_default=True, help="critters, afhq, celeba, fashion-mnist, or a path to a folder or zip.")  # fmt: skip
@click.option("--size",       metavar="PIXELS", type=int, help="Image size, a power of two from 16 to 1024.  [default: by data]")  # fmt: skip
@click.option("--attributes", metavar="NAMES", help="class, A,B,..., celeba5, celeba10 or celeba15.  [default: by data]")  # fmt: skip
@click.option("--download",   "wanted", is_flag=True, help="First fetch a preset from its official source.")  # fmt: skip
@click.option("--version",    type=click.Choice(list(AFHQ)), help="Which AFHQ to fetch.  [default: v1]")  # fmt: skip
@click.option("--skip-broken", is_flag=True, help="Pack without the images that cannot be read, and list them.")
@click.option("--sheet",      "picture", metavar="FILE", help="Write a picture of some images of each class or attribute.")  # fmt: skip
def main(data, size, attributes, wanted, version, skip_broken, picture) -> None:
    """Find a data set, pack it, and print what it holds."""
    if version and not wanted:
        raise click.UsageError("--version goes with --download")
    if wanted:
        download(data, version or "v1")
    first = open_dataset(data, size, "train", attributes, skip_broken)
    parts = {s: first.part(s) for s in first.splits}
    table = [("images", map(len, parts.values()))]
    table += [(n, [int(p.labels[:, i].sum()) for p in parts.values()]) for i, n in enumerate(first.label_names)]
    notes = {"labels": f"{len(first.label_names)}, {first.label_kind}", "size": f"{first.size} px"}
    notes |= {"skipped": f"{first.skipped} unreadable"} if first.skipped else {}
    notes |= {"fingerprint": first.fingerprint, "pack": first.pack}
    width = max(map(len, [*first.label_names, *notes]))
    click.echo(" " * width + "".join(f"{s:>10}" for s in parts))
    for name, counts in table:
        click.echo(f"{name:{width}}" + "".join(f"{c:>10}" for c in counts))
    for name, note in notes.items():
        click.echo(f"{name:{width}}  {note}")
    if picture:
        try:
            Image.fromarray(sheet(first)).save(picture)
        except (OSError, ValueError) as error:
            fail(f"cannot write {picture}: {error}")


if __name__ == "__main__":
    main()
