"""Source layouts: finds the images and labels of a folder or zip, whatever its layout. It decodes no image for that.

    cat/*.png dog/*.png ...                   class folders, alone or below train/ and val/ (or test/)
    *.png labels.csv                          a header, then file names and a class, or several columns of 0 and 1
    img_align_celeba/ list_attr_celeba.txt    CelebA, tables as .txt or .csv, with or without list_eval_partition
    CelebA-HQ-img/ CelebAMask-HQ-attri...txt  CelebAMask-HQ
    00000/*.png dataset.json                  StyleGAN's layout
    train-images-idx3-ubyte.gz ...            the IDX files of Fashion-MNIST and MNIST

`locate` finds a source, `recognise` tells whether it is one of the data sets with a preset, and `scan` makes one
listing of its images and labels (`Source`). What is wrong with a source is a click.ClickException of one line, which
names the file and the line in it.
"""

import csv
import functools
import hashlib
import io
import itertools
import json
import os
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from files import MAX_TABLE, SUFFIXES, UNREADABLE, fail, list_files, read, read_idx

# 256 and 128 px are the paper's sizes, 32 the power of two above Fashion-MNIST's 28; critters are made for CPUs.
DATASETS = {"critters": 32, "afhq": 256, "celeba": 128, "fashion-mnist": 32}  # data sets with a name: usual image size
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}  # folder name -> split
SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "val")
# In the order of the numbers in Fashion-MNIST's label files.
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
CELEBA = {  # the attribute sets of the paper's tables 1 to 3
    "celeba5": "Bald,Eyeglasses,Mustache,Wearing_Hat,Wearing_Necktie",
    "celeba10": "Bald,Black_Hair,Blond_Hair,Brown_Hair,Double_Chin,Eyeglasses,Gray_Hair,Mustache,Wearing_Hat,"
    "Wearing_Necktie",
    "celeba15": "Bald,Blurry,Chubby,Double_Chin,Eyeglasses,Goatee,Gray_Hair,Mustache,Narrow_Eyes,Pale_Skin,"
    "Receding_Hairline,Rosy_Cheeks,Sideburns,Wearing_Hat,Wearing_Necktie",
}
CELEBA_TABLES = {  # table of the attributes: folder of the images
    **dict.fromkeys(("list_attr_celeba.txt", "list_attr_celeba.csv"), "img_align_celeba"),
    "CelebAMask-HQ-attribute-anno.txt": "CelebA-HQ-img",
}
# Which images CelebA's authors give to train, val and test.
PARTITIONS = ("list_eval_partition.txt", "list_eval_partition.csv")
UNDERSTOOD = (
    "class folders (also below train/ and val/), labels.csv, CelebA (img_align_celeba/ with list_attr_celeba), "
    "CelebAMask-HQ, StyleGAN's dataset.json, or Fashion-MNIST's idx files"
)
# Their owners take these for images, so a class of them must not vanish without a word.
PICTURES = (".heic", ".heif", ".hif", ".jxl", ".svg", ".psd", ".ico", ".exr", ".hdr")  # which are not read, but named
PICTURES += (".apng", ".dds", ".dib", ".icns", ".j2k", ".jpc", ".jpf", ".jpx", ".mpo", ".pcx", ".sgi", ".xbm")
PICTURES += (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2")
BESIDE = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx", ".xml", ".md", ".html", ".pdf", ".zip", ".db")
BESIDE += (
    ".ini",
    ".py",
    ".m",
    ".mat",
    ".log",
    ".url",
    ".part",
    ".yaml",
    ".yml",
    ".sh",
)  # what often lies beside images
# Bounds on what a file may ask for: each of these things takes far more bytes of memory than of the file.
MAX_LINE = 2**20  # characters of a line in a table: room for thousands of attributes
MAX_LABELS = 2**14  # label names: labels are rows of that many numbers
MAX_LISTS = 4 * 10**6  # lists in a dataset.json, of which each takes 60 bytes or more: three times ImageNet's
MAX_IMAGES = 2**21  # images in an IDX file: the largest known, EMNIST's, has 0.7 million
# MNIST's file names, which its successors kept; t10k are the 10,000 test images.
IDX = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]

# ---------------------------------------------------------------------------------------------------------------------
# Finding a source. `root` is a folder or a zip; names in it are relative, with forward slashes.


def data_folder(preset: str) -> Path:
    """Where a preset's files are looked for: data/<preset>, or $INFOSCC_DATA/<preset>."""
    return Path(os.path.expanduser(os.environ.get("INFOSCC_DATA") or "data")) / preset


def locate(data: str) -> tuple[str, Path | None]:
    """Name (for runs/<name>) and root of a preset or path; critters, which are drawn, have the root None."""
    if not data:
        fail("--data is empty: give the name of a data set, or a path")
    if data == "critters":
        return data, None
    root = data_folder(data) if data in DATASETS else Path(os.path.expanduser(data))
    # data/celeba.zip will do in place of the folder data/celeba.
    if data in DATASETS and not root.exists() and root.with_name(root.name + ".zip").is_file():
        root = root.with_name(root.name + ".zip")
    if not os.path.exists(root):  # unlike Path.exists, it takes names that no file can have
        if data not in DATASETS:
            where = os.path.abspath(root)
            fail(f"--data: there is no folder or zip {where}; the data sets with a name are {', '.join(DATASETS)}")
        files = "four ...-ubyte.gz files" if data == "fashion-mnist" else "images"
        fetch = f"python dataset.py --data {data} --download ($INFOSCC_DATA names another folder than data/)"
        fail(f"{root} does not exist: put the {files} there, or have them fetched: {fetch}")
    if root.is_file() and not zipfile.is_zipfile(root):
        fail(f"--data {data} is a file but not a zip: expected a folder or zip of {UNDERSTOOD}")
    # A name for folders: of the path's last part, with nothing in it that a shell or a file system would mind.
    name = data if data in DATASETS else root.resolve().stem if root.is_file() else root.resolve().name
    return re.sub(r"[^\w.-]+", "_", name) or "data", root


def preset_of(data: str, preset: str | None = None) -> str:
    """The preset for --data and --preset: the one that is asked for ('none': none), or the name, or what lies there."""
    if preset not in (None, "none", *DATASETS):
        fail(f"--preset {preset}: there is no such preset; they are {', '.join(DATASETS)} and none")
    if preset:
        return preset.replace("none", "")
    return data if data in DATASETS else recognise(locate(data)[1])


def recognise(root: Path | None) -> str:
    """Which of DATASETS lies at `root`, or ''. It looks at names and at the first lines of CelebA's table only."""
    if root is None:
        return "critters"
    root, files, folders = list_files(root)
    # In the order of `scan`, so that both see the same layout.
    base = base_names(files)
    if idx_name(IDX[0], base):
        return "fashion-mnist" if idx_classes(root, base)[0] == FASHION else ""
    if found := find_celeba(base):
        folder, table = found
        names, _ = celeba_header(root, table, read_rows(root, table))
        complete = set(CELEBA["celeba5"].split(",")) <= set(names)  # other data comes in this layout as well
        # Not CelebAMask-HQ: the paper's settings are for the aligned photos.
        return "celeba" if folder == "img_align_celeba" and complete else ""
    # A table says what the labels are, whatever the folders are called.
    top = find_top([name for name in files if name.lower().endswith(SUFFIXES)], files, folders)
    if {top + "labels.csv", top + "dataset.json"} & set(files):
        return ""
    # AFHQ: the class folders cat, dog and wild, and no others, in a train folder beside another split.
    pairs = [f.split("/")[-2:] for f in folders if "/" in f]
    train = {name for split, name in pairs if SPLITS.get(split.lower()) == "train"}
    other = {name for split, name in pairs if SPLITS.get(split.lower()) in ("val", "test")}
    return "afhq" if train == {"cat", "dog", "wild"} and other else ""


def base_names(files: list[str]) -> dict[str, str]:
    """The files of a source by their names without folders; of two that are called the same, the first."""
    return {name.rpartition("/")[2]: name for name in reversed(files)}


# ---------------------------------------------------------------------------------------------------------------------
# What a source holds, from its names and tables.


@dataclass
class Source:
    """Every image of a source in order, with its split and its labels.

    keys        [N] file names below the root; (IDX file, index) or (split, index) where images are no files
    splits      [N] of 'train', 'val', 'test', or None if the source has no splits
    classes     names of the classes, and class_of int [N]; both empty without classes
    attributes  names of the attributes, and values [N, len(attributes)] of 0 or 1; empty without attributes
    tables      the files that the labels come from
    notes       what a user should know about the labels, a line each
    absent      how many lines of the tables name an image that is not there; they are left out
    hidden      {name: (int [N], names)}, known for evaluation alone
    """

    keys: list
    splits: list[str] | None = None
    classes: list[str] = field(default_factory=list)
    class_of: list[int] = field(default_factory=list)
    attributes: list[str] = field(default_factory=list)
    values: list[list[int]] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    absent: int = 0
    hidden: dict[str, tuple[np.ndarray, list[str]]] = field(default_factory=dict)


def scan(root: Path, files: list[str], folders: list[str]) -> Source:
    """Find the layout of a source and read its labels. `root`, `files` and `folders` are as list_files gives them."""
    # Layouts with files of a name of their own come first: nothing else looks like them.
    base = base_names(files)
    images = [name for name in files if name.lower().endswith(SUFFIXES)]
    unread = unread_pictures(files)
    if idx_name(IDX[0], base):
        source = scan_idx(root, files, base)
    elif found := find_celeba(base):
        source = scan_celeba(root, files, images, base, *found)
    else:
        top = find_top(images, files, folders)
        if top + "dataset.json" in files:
            source = scan_json(root, images, top)
        elif top + "labels.csv" in files:
            source = scan_csv(root, images, top)
        else:
            # A zip stands for the data only where it lies alone; beside other files it is not opened.
            zips = [f"{name} is not unpacked: give it as --data" for name in files if name.lower().endswith(".zip")]
            hints = [hint for hint in (unread, unused_tables(files, []), *zips[:1]) if hint]
            source = scan_folders(root, images, folders, top, "".join(f"; {hint}" for hint in hints))
    check_names(root, source)
    complete_splits(root, source)
    source.notes += [hint for hint in (unread, unused_tables(files, source.tables)) if hint]
    if len(source.classes) == 1 and not source.attributes:
        source.notes.append(f"{source.classes[0]} is the only class, so the labels tell nothing")
    return source


def unread_pictures(files: list[str]) -> str:
    """What to say about pictures in formats that are not read, if there are any."""
    found = sorted({PurePosixPath(name).suffix.lower() for name in files if name.lower().endswith(PICTURES)})
    if found:
        return f"{', '.join(found)} files are not read: convert them to PNG or JPEG"
    # READMEs and the like lie at the top; within folders a file of an unknown ending may be an image.
    others = [name for name in files if "/" in name and not name.lower().endswith((*SUFFIXES, *BESIDE))]
    others = [name for name in others if not re.fullmatch(r".*-(ubyte|idx\d)(\.gz)?", name)]
    return f"{len(others)} files are not read, like {others[0]}: images end in .png, .jpg or the like" if others else ""


def unused_tables(files: list[str], used: list[str]) -> str:
    """What to say about files that look like tables of labels but are not read, if there are any."""
    known = ("list_", "identity_celeba", "celeba-hq-to-celeba", "celebamask-hq-pose")  # of CelebA: they hold no labels
    ends = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx")
    found = []
    for name in set(files) - set(used):
        base = name.rpartition("/")[2].lower()
        # Most .txt files are notes, so only those that are called after labels count.
        text = base.endswith(".txt") and any(word in base for word in ("label", "attr", "anno", "class"))
        if (base.endswith(ends) or text) and not base.startswith(known):
            found.append(name)
    if not found:
        return ""
    which = f"{min(found)} and {len(found) - 1} more tables are" if len(found) > 1 else f"{found[0]} is"
    return f"{which} not used: a table of labels is called labels.csv or dataset.json and lies above all images"


def find_top(images: list[str], files: list[str], folders: list[str]) -> str:
    """The folder in which the layout begins, with a slash at its end: downloads often wrap it in other folders."""
    with_images = {name.rpartition("/")[0] for name in images}
    with_table = {n.rpartition("/")[0] for n in files if n.rpartition("/")[2] in ("dataset.json", "labels.csv")}
    top = ""
    while True:
        # Go into a folder that is alone, as long as it is a wrapping and not yet a part of the layout.
        inside = [f for f in folders if f.startswith(top) and "/" not in f[len(top) :]]
        if top[:-1] in with_images | with_table or len(inside) != 1:
            return top
        # A split that is the only folder is a part of the layout, too.
        if inside[0][len(top) :].lower() in SPLITS:
            return top
        if inside[0] in with_images - with_table:  # a class folder that is the only one
            return top
        top = inside[0] + "/"


def check_names(root: Path, source: Source) -> None:
    """Refuse label names that options and tables could not name, and more of them than anybody has."""
    if (count := max(len(source.classes), len(source.attributes))) > MAX_LABELS:
        fail(f"{root}: {count:,} label names are more than {MAX_LABELS:,}: is a column of numbers taken for classes?")
    for name, times in [*Counter(source.classes).items(), *Counter(source.attributes).items()]:
        # --attributes A,B separates names by commas; classes are never asked for one by one.
        if times > 1 or not name or (source.attributes and "," in name):
            fail(f"{root}: label name {name!r} is {'used twice' if times > 1 else 'empty or has a comma'}")
        if not name.isprintable():
            fail(f"{root}: label name {name!r} has characters that cannot be shown, or is not UTF-8: rename it")


def complete_splits(root: Path, source: Source) -> None:
    """Make sure that there are images to train on and to validate on.

    Without val, test becomes val. Without either, a tenth of each class is held out: the images whose names have the
    lowest hashes, so that the choice depends on nothing but the names.
    """
    splits = np.array(source.splits or ["train"] * len(source.keys), dtype=object)
    class_of = np.array(source.class_of, np.int64)
    if "val" not in splits:
        splits[splits == "test"] = "val"
    if "val" not in splits:
        digests = np.array([hashlib.sha256(json.dumps(key).encode()).hexdigest() for key in source.keys])
        # Without classes all images are one group.
        for c in range(len(source.classes) or 1):
            members = np.flatnonzero(class_of == c) if source.classes else np.arange(len(source.keys))
            # At least one, so that val knows every class; a class of one image is for training.
            # A tenth is about what AFHQ (1,500 of 16,130) and critters (1,500 of 13,500) have in val.
            held_out = 0 if len(members) < 2 else max(1, round(len(members) / 10))
            splits[members[np.argsort(digests[members])[:held_out]]] = "val"
    if "train" not in splits or "val" not in splits:
        left = "train" if "train" not in splits else "val"
        fail(f"{root}: no images are left for {left}: each class needs at least two, and splits a {left} of their own")
    # A class that is in val alone would be asked of a generator that never saw it.
    if source.classes and (missing := set(class_of.tolist()) - set(class_of[splits == "train"].tolist())):
        fail(f"{root}: class {source.classes[min(missing)]} has no training images: add some or remove it")
    if unused := sorted(set(range(len(source.classes))) - set(class_of.tolist())):  # tables may name more than they use
        more = f" (nor of {len(unused) - 1} others)" if len(unused) > 1 else ""
        source.notes.append(f"no image is of the class {source.classes[unused[0]]}{more}")
    source.splits = splits.tolist()


def scan_folders(root: Path, images: list[str], folders: list[str], top: str, hints: str) -> Source:
    """Class folders, alone or in folders that name a split. hints: what to add where images or labels are missed."""
    # Folders as tuples of names, and which of those at the top name a split.
    # Composed names: train/ from macOS and val/ from Linux must not make two classes of one.
    below = [tuple(nfc(f[len(top) :]).split("/")) for f in folders if f.startswith(top)]
    first = [p[0] for p in below if len(p) == 1]
    inner = {f: {p[1] for p in below if len(p) == 2 and p[0] == f} for f in first}
    splits = {f: SPLITS[f.lower()] for f in first if f.lower() in SPLITS}
    # A class can be called "train" as well, so a name alone makes no split: it takes a train folder that is the only
    # folder or has another split beside it, or no folder but splits.
    split = "train" in splits.values() and (len(splits) > 1 or len(first) == 1)
    split = split or (0 < len(splits) == len(first))
    # A folder beside splits would be lost without a word, or its images be a class called "train".
    other = [f for f in first if f not in splits and (split or any(inner[f] & inner[s] for s in splits))]
    if other:
        fail(f"{root / top / min(other)} is neither train, val nor test: rename it or move it away")
    if not images:
        fail(f"{root} holds no images: expected {UNDERSTOOD}{hints}")
    # Splits called training_set or seg_train would pass for classes, so they are refused with the names to use.
    words = {f: [SPLITS[word] for word in re.split("[^a-z]+", f.lower()) if word in SPLITS] for f in first if inner[f]}
    like = {f: found[0] for f, found in words.items() if found}
    inside = set().union(*(inner[f] for f in like))
    others = set(first) - set(like)  # with the same folders in them, they are classes all alike: test_track, car
    if not split and len(like) > 1 and "train" in like.values() and not any(inner[f] & inside for f in others):
        rest = f", and move {min(others)} away" if others else ""  # training_set/cats, test_set/cats
        fail(f"{root / top / min(like)} looks like a split, not like a class: call it {like[min(like)]}{rest}")
    copies = [f for f in first if f not in inner[f] and inner[f] & set(first)]
    if not split and copies:  # flowers/daisy beside daisy; cat/cat alone is how zips unpack
        name = min(inner[copies[0]] & set(first))
        fail(f"{root / top / copies[0]} has a folder {name}, which is a class beside it: move one of the two away")
    within = set.union(*inner.values()) if inner else set()
    if not split and within and all(f.lower() in SPLITS for f in within):  # cats/train, dogs/train
        fail(f"{root / top / first[0]} has the folders {', '.join(sorted(within))}: put the splits above the classes")
    at = 1 if split else 0  # the place of the class in a path
    parts = [tuple(nfc(name[len(top) :]).split("/")) for name in images]
    for name, p in zip(images, parts, strict=True):
        if len(p) < at + 2:
            fail(f"{root / name} is in no class folder, so it has no label; the layouts are {UNDERSTOOD}{hints}")
    # Classes are folders, not what images are in: an empty one is a mistake that would shift all class numbers.
    found = {p for p in below if len(p) == at + 1}
    for p in sorted(found - {p[: at + 1] for p in parts}):
        fail(f"class folder {root / top / '/'.join(p)} has no images: add some or remove it{hints}")
    # Numbered in alphabetical order, as by torchvision's ImageFolder.
    classes = sorted({p[at] for p in found})
    train = {p[at] for p in found if not split or splits[p[0]] == "train"}
    if set(classes) - train:
        fail(f"class {min(set(classes) - train)} of {root / top} has no folder in train/")
    index = {c: i for i, c in enumerate(classes)}
    names = Counter(name for f in first for name in inner[f])
    notes = []
    # Classes whose images all lie deeper: perhaps the deeper folders were meant, as in birds/owl and birds/hen.
    deep = sorted({p[at] for p in parts} - {p[at] for p in parts if len(p) == at + 2})
    if not split and (twice := sorted(name for name, times in names.items() if times > 1)):
        notes = [f"several classes have a folder called {twice[0]}: folders within classes do not count"]
    elif deep:
        notes = [f"the images of class {deep[0]} lie in folders below it, which do not count as classes"]
    # StyleGAN's dataset_tool puts a thousand images into each of 00000, 00001, ..., whatever their labels.
    if all(re.fullmatch(r"\d{5}", c) for c in classes):
        notes.append(f"classes called {classes[0]} look like the shards of StyleGAN's layout, without its dataset.json")
    class_of = [index[p[at]] for p in parts]
    return Source(images, [splits[p[0]] for p in parts] if split else None, classes, class_of, notes=notes)


def splits_of(root: Path, images: list[str], top: str) -> list[str] | None:
    """The splits of the images of a table that names none: those of the folders, where all are in such ones."""
    below = [name[len(top) :].lower().split("/")[:-1] for name in images]
    # Beneath a folder that all images share, such as images/, unless it is a split itself.
    while all(below) and len({folders[0] for folders in below}) == 1 and below[0][0] not in SPLITS:
        below = [folders[1:] for folders in below]
    tops = [folders[0] if folders else "" for folders in below]
    if set(tops) <= set(SPLITS):
        return [SPLITS[name] for name in tops]
    # One folder called train may be a class of vehicles; train and val are splits.
    if len({SPLITS[name] for name in tops if name in SPLITS}) > 1:
        other = next(image for image, name in zip(images, tops, strict=True) if name not in SPLITS)
        fail(f"{root}: {other} lies in no folder of a split, but others do: move it, or give the table a column split")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Tables. A row is (where, cells); `where` names file and line in messages.


def nfc(name: str) -> str:
    """The composed form of a name: macOS writes an accented letter as two characters, others as one.

    What is longer than any path stays as it is: the time may grow with the square of the length.
    """
    return unicodedata.normalize("NFC", name) if len(name) <= 4096 else name


def read_rows(root: Path, table: str) -> Iterator[tuple[str, list[str]]]:
    """The rows of a .csv, or of a file with spaces between the columns; empty lines are left out.

    The columns of a .csv end at commas, or at tabs or semicolons if its first line has more of those.
    """
    place = root / table
    try:
        raw = read(root, table, MAX_TABLE)
        # -sig, since Excel begins UTF-8 with a mark, which would become a part of the first name.
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # 10 is the byte that ends a line.
        fail(f"{place} line {raw[: error.start].count(10) + 1} is not UTF-8: save the table as UTF-8")
    except UNREADABLE as error:
        fail(f"{place} cannot be read: {getattr(error, 'strerror', None) or error}")
    # Before a line is split: every character of it may become a cell.
    if max(map(len, io.StringIO(text)), default=0) > MAX_LINE:
        fail(f"{place} has a line of more than {MAX_LINE:,} characters: it is no table of labels")
    if not table.lower().endswith(".csv"):
        for i, line in enumerate(io.StringIO(text), 1):
            if line.strip():
                yield f"{place} line {i}", [nfc(cell) for cell in line.split()]
        return
    # Excel writes semicolons in countries where the comma is the decimal sign.
    # Of equal counts max takes the first, so a line without any of them has commas.
    end = max(",\t;", key=text.lstrip()[:4096].split("\n")[0].count)
    # newline='' leaves line breaks within quotes; strict: else an open quote makes one cell of the rest of the table.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=end, skipinitialspace=True, strict=True)
    columns = 0  # of the first row; separators at the ends of lines make no more
    try:
        for row in reader:
            cells = [nfc(cell.strip()) for cell in row]
            # A first line `sep=;` tells Excel what separates the columns.
            if not any(cells) or (not columns and text.lstrip().startswith(f"sep={end}") and "".join(cells) == "sep="):
                continue
            columns = columns or len(cells) - next(i for i, cell in enumerate(reversed(cells)) if cell)
            # Something beyond the columns stays in the row, so that it is counted and refused.
            yield f"{place} line {reader.line_num}", cells if any(cells[columns:]) else cells[:columns]
    except csv.Error as error:
        fail(f"{place} line {reader.line_num} cannot be read: {error}")


def matcher(images: list[str], top: str = "") -> Callable[[str], list[str]]:
    """A function that lists the images a table may mean by a name.

    That is the one of this path below `top`, or else all whose paths end like that ("0.png" for "images/0.png").
    """
    paths = {nfc(name[len(top) :]): name for name in images}

    @functools.cache  # made only when a name is no path: it takes some hundred bytes for each image
    def ends() -> dict[str, list[str]]:
        result: dict[str, list[str]] = {}
        for name in images:
            parts = nfc(name).split("/")
            for i in range(len(parts)):
                result.setdefault("/".join(parts[i:]), []).append(name)
        return result

    def find(name: str) -> list[str]:
        name = nfc(name)
        # Only now: on Linux a file's name may have a backslash in it.
        if name not in paths:
            name = name.replace("\\", "/").removeprefix("./")  # Windows and find(1) write them so
        return [paths[name]] if name in paths else ends().get(name, [])

    return find


def by_image(
    place: Path,
    rows: Iterable,
    images: list[str],
    find: Callable,
    columns: int,
    convert: Callable,
    subset: bool = False,
) -> tuple[dict, int]:
    """Read the rows of a table: ({image: convert(cells, where)}, number of rows that name no image).

    Fails unless every image has exactly one row, with so many columns of labels. subset: rows may name no image.
    """
    # Rows are read one at a time, so memory grows with the images that are there and not with the table.
    result, absent = {}, 0
    for where, (name, *cells) in rows:
        found = find(name)
        if not found and subset:
            absent += 1
            continue
        if not found:
            fail(f"{where}: there is no image {name} (the first one there is {images[0] if images else 'none'})")
        if len(found) > 1:
            fail(f"{where}: {name} may be {found[0]} or {found[1]}: give more of the path")
        if len(cells) != columns:
            fail(f"{where}: {len(cells)} values, but there are {columns} names")
        if found[0] in result:
            fail(f"{where}: {name} is there twice")
        result[found[0]] = convert(cells, where)
    # Then the table is that of other images, or has another column before the names.
    if absent and not result:
        fail(f"{place}: none of its {absent:,} rows names an image that is there; the last one names {name}")
    for image in images:
        if image not in result:
            fail(f"{place} has no line for the image {image}")
    return result, absent


def binary(cells: list[str], where: str) -> list[int]:
    """Attribute values, 0 and 1 or -1 and 1, as 0 and 1."""
    try:
        # CelebA writes -1 where an image does not have the attribute.
        return [{"0": 0, "1": 1, "-1": 0}[c] for c in cells]
    except KeyError as error:
        fail(f"{where}: {error.args[0]!r} is not an attribute value (0 or 1, or -1 or 1)")


def from_columns(table: str, keys: list[str], splits: list | None, names: list[str], values: list) -> Source:
    """The source of a table with a column of 0 and 1 for each of `names`."""
    source = Source(keys, splits, attributes=names, values=values, tables=[table])
    # The columns stay attributes as well, so that --attributes can still ask for them.
    if len(names) > 1 and all(sum(row) == 1 for row in values):
        source.classes, source.class_of = list(names), [row.index(1) for row in values]
        source.notes = [
            f"in {table} every row has exactly one 1, so columns are classes, unless --attributes names them"
        ]
    return source


def scan_csv(root: Path, images: list[str], top: str) -> Source:
    """labels.csv: a header, then file names and a class, or several attributes, and perhaps a column `split`."""
    table = top + "labels.csv"
    place, rows, find = root / table, read_rows(root, table), matcher(images, top)
    where, header = next(rows, (f"{place} line 1", [""]))
    second = next(rows, None)
    # Told by the second row: its first cell names no image, and the one after it does.
    if second and not header[0] and len(second[1]) > 1 and not find(second[1][0]) and find(second[1][1]):
        fail(f"{where}: the first column numbers the rows: write the table without its index (pandas: index=False)")
    rows = itertools.chain([second] if second else [], rows)
    # The first column has the file names; of the others, one may be the split.
    split_at = next((i for i, h in enumerate(header[1:]) if h.lower() == "split"), None)
    names = [h for i, h in enumerate(header[1:]) if i != split_at]
    # A first cell that names an image belongs to a row: the header is missing.
    if not names or find(header[0]):
        fail(f"{where}: expected a header: file name, then the names of the labels")

    def convert(cells: list[str], where: str) -> tuple:
        split = cells.pop(split_at).lower() if split_at is not None else "train"
        if split not in SPLITS:
            fail(f"{where}: {split!r} is not a split: train, val or test")
        if cells == [""]:
            fail(f"{where}: the class is missing")
        return SPLITS[split], cells[0] if len(names) == 1 else binary(cells, where)

    found, _ = by_image(place, rows, images, find, len(header) - 1, convert)
    splits = splits_of(root, [*found], top) if split_at is None else [split for split, _ in found.values()]
    labels = [label for _, label in found.values()]
    if len(names) > 1:
        return from_columns(table, list(found), splits, names, labels)
    # Fewer than 20 digits, since Python refuses to read numbers of thousands of them.
    numbers = all(c.isdecimal() and len(c) < 20 for c in labels)  # then 9 comes before 10
    # By c too, since 1 and 01 are two classes, and the order of a set is another one in every process.
    classes = sorted(set(labels), key=lambda c: (int(c), c) if numbers else (0, c))
    index = {c: i for i, c in enumerate(classes)}
    return Source(list(found), splits, classes, [index[c] for c in labels], tables=[table])


def find_celeba(base: dict[str, str]) -> tuple[str, str] | None:
    """The folder of the images and the table of the attributes of CelebA or CelebAMask-HQ, if that is the layout."""
    return next(((folder, base[name]) for name, folder in CELEBA_TABLES.items() if name in base), None)


def celeba_header(root: Path, table: str, rows: Iterator) -> tuple[list[str], str]:
    """Take the header from CelebA's table: names of the attributes, and in a .txt the announced number of images."""
    where, first = next(rows, (f"{root / table} line 1", []))
    # Kaggle's .csv has the names in its first line, the original .txt the number of images, then the names.
    if table.lower().endswith(".csv"):
        if len(first) < 2:
            fail(f"{where}: expected a header: file name, then the names of the attributes")
        return first[1:], ""
    _, names = next(rows, (where, []))
    if len(first) != 1 or not first[0].isdecimal() or not names:
        fail(f"{where}: expected the number of images, then a line of attribute names")
    return names, first[0]


def scan_celeba(
    root: Path, files: list[str], images: list[str], base: dict[str, str], folder: str, table: str
) -> Source:
    """CelebA or CelebAMask-HQ: the images in `folder`, labelled by `table`, split by list_eval_partition if there.

    Lines without an image are counted and left out: many people keep a part of the images with the full table.
    """
    # CelebAMask-HQ comes with its masks, which are PNGs in other folders.
    images = [name for name in images if folder in name.split("/")[:-1]]
    for names in (CELEBA_TABLES, PARTITIONS):
        tables = sorted(f for f in files if f.rpartition("/")[2] in names)
        # Nothing tells which of two is right, as where a .csv lies beside the .txt.
        if len(tables) > 1:
            fail(f"{root} has {tables[0]} and {tables[1]}: keep the one that its images go with")
    if not images:
        fail(f"{root} has CelebA's annotations, but no images in {folder}/: unpack them there")
    place, rows, find = root / table, read_rows(root, table), matcher(images)
    names, announced = celeba_header(root, table, rows)
    if announced:  # a table that was cut off while it was copied shows here
        # Less the line with the number and that with the names.
        count = sum(1 for _ in read_rows(root, table)) - 2
        if announced != str(count):
            fail(f"{place} line 1: announces {announced} images, but {count} lines follow the names")
    found, absent = by_image(place, rows, images, find, len(names), binary, subset=True)
    source = Source(list(found), None, attributes=names, values=list(found.values()), tables=[table], absent=absent)
    if absent:
        lines = f"{absent:,} of {absent + len(found):,} rows"
        source.notes.append(f"{lines} in {table} have no image in {folder}/ (--strict refuses that)")
    if table := next((base[name] for name in PARTITIONS if name in base), None):

        def convert(cells: list[str], where: str) -> str:
            if cells[0] not in ("0", "1", "2"):
                fail(f"{where}: {cells[0]!r} is not a partition: 0 train, 1 val, 2 test")
            return ("train", "val", "test")[int(cells[0])]

        rows = read_rows(root, table)
        if table.lower().endswith(".csv"):
            next(rows, None)  # its header; the .txt has none
        partition, _ = by_image(root / table, rows, images, find, 1, convert, subset=True)
        source.splits = [partition[image] for image in found]
        source.tables.append(table)
    return source


def scan_json(root: Path, images: list[str], top: str) -> Source:
    """StyleGAN's dataset.json: {"labels": [[file name, class or list of 0 and 1], ...]}, perhaps with "label_names"."""
    table = top + "dataset.json"
    place = root / table
    try:
        raw = read(root, table, MAX_TABLE)
        # Before json.loads, which would make all of them: two bytes of a file become a list of 60 or more.
        if raw.count(b"[") + raw.count(b"{") > MAX_LISTS:
            raise ValueError(f"it has more than {MAX_LISTS:,} lists")
        content = json.loads(raw, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        fail(f"{place} line {error.lineno} column {error.colno}: this is not JSON ({error.msg})")
    except (*UNREADABLE, RecursionError) as error:  # RecursionError: thousands of lists within each other
        fail(f"{place} cannot be read: {getattr(error, 'strerror', None) or error}")
    pairs, names = (content.get("labels"), content.get("label_names")) if isinstance(content, dict) else (None, None)
    if not isinstance(pairs, list) or not pairs or not all(is_pair(pair) for pair in pairs):
        fail(f'{place} has no labels in StyleGAN\'s form: {{"labels": [["00000/img.png", 3], ...]}}')
    if names is not None and not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        fail(f"{place}: label_names must be a list of names")
    # type, not isinstance: to Python true is a whole number as well, but it is no class.
    named, kind = names is not None, type(pairs[0][1])
    numbers = {label for _, label in pairs if type(label) is int}
    if not named:  # the names are the numbers of the classes, or of the places in the lists
        most = max(numbers) + 1 if kind is int else len(pairs[0][1]) if kind is list else 0
        names = [str(i) for i in range(min(most, 2**16))]  # more classes than that are a mistake, reported below
    names = [nfc(name).strip() for name in names]
    # Else class 0 would be empty, and all classes one place off their names.
    if kind is int and min(numbers) == 1 and (not named or max(numbers) == len(names)):
        fail(f"{place}: classes are counted from 1 to {max(numbers)}, but must be from 0: subtract 1 from each label")

    def convert(cells: list, where: str) -> int | list[int]:
        label = cells[0]
        if kind not in (int, list) or type(label) is not kind or (kind is int and not 0 <= label < len(names)):
            needed = f"a class from 0 to {len(names) - 1}" if kind is int else "a class, or a list of 0 and 1"
            fail(f"{where}: {label!r:.60} is no label: give {needed}, the same kind for every image")
        if kind is int:
            return label
        if not label or len(label) != len(names):
            fail(f"{where}: {len(label)} values, but there are {len(names)} labels")
        # Some programs write 1.0 for 1.
        return binary([f"{v:g}" if isinstance(v, float) else str(v) for v in label], where)

    rows = ((f"{place}: entry {i}", pair) for i, pair in enumerate(pairs))
    found, _ = by_image(place, rows, images, matcher(images, top), 1, convert)
    splits = splits_of(root, [*found], top)
    if kind is list:
        return from_columns(table, list(found), splits, names, list(found.values()))
    # A number that no image has is a mistake; a class with a name may be empty, which complete_splits says.
    if not named and (gaps := set(range(len(names))) - set(found.values())):
        fail(f"{root}: class {min(gaps)} has no training images: add some or remove it")
    return Source(list(found), splits, names, list(found.values()), tables=[table])


def once(pairs: list[tuple]) -> dict:
    """A JSON object as a dict. Raises ValueError for a key that is there twice: json.loads would take the last."""
    if twice := [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]:
        raise ValueError(f"the key {twice[0]!r:.60} is there twice")
    return dict(pairs)


def is_pair(value: object) -> bool:
    """Whether an entry of "labels" has a file name and one label."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def idx_spellings(name: str) -> list[str]:
    """Under what names an IDX file may come: gzipped or not; some programs write a dot in it."""
    return [spelled + end for spelled in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]


def idx_name(name: str, base: dict[str, str]) -> str | None:
    """The IDX file of this name."""
    return next((base[spelled] for spelled in idx_spellings(name) if spelled in base), None)


def idx_classes(root: Path, base: dict[str, str]) -> tuple[list[str], list[str]]:
    """Names of the ten classes, and a note where they are a guess.

    Other sets come under the same file names: the innermost folder or zip called after one of them tells which it is.
    """
    whole = root.resolve()
    below = PurePosixPath(idx_name(IDX[0], base)).parts
    for part in (*reversed(below), whole.name, whole.parent.name):  # far above, a name says nothing
        # Fashion first, since its name has mnist in it as well.
        if "fashion" in part.lower() or "fmnist" in part.lower():
            return FASHION, []
        if "mnist" in part.lower():
            return [str(i) for i in range(10)], []
    return FASHION, ["taken for Fashion-MNIST; if they are digits, rename the folder to mnist"]


def scan_idx(root: Path, files: list[str], base: dict[str, str]) -> Source:
    """The four IDX files of Fashion-MNIST, MNIST and their like; their test images become val."""
    read_idx.cache_clear()  # the files may have changed
    for name in IDX:
        # torchvision keeps MNIST/raw, FashionMNIST/raw, ... below one folder, with the same file names.
        places = sorted({f.rpartition("/")[0] for f in files if f.rpartition("/")[2] in idx_spellings(name)})
        if len(places) > 1:
            fail(f"{root} has {name} in {places[0] or '.'} and in {places[1]}: give one of these folders as --data")
    keys, splits, labels, tables = [], [], [], []
    # MNIST and its successors have no validation split; a run looks at its test images instead.
    for names, split in ((IDX[:2], "train"), (IDX[2:], "val")):
        for name in names:
            if not idx_name(name, base):
                fail(f"{root}: {name} is missing")
        images, numbers = (idx_name(name, base) for name in names)
        x, y = read_idx(root, images), read_idx(root, numbers)
        if x.ndim != 3 or y.ndim != 1 or 0 in x.shape:
            fail(f"{root / images} and {numbers} hold no list of images and no list of labels")
        if len(x) > MAX_IMAGES:
            fail(f"{root / images}: {len(x):,} images are more than {MAX_IMAGES:,}")
        if len(x) != len(y):
            fail(f"{root / numbers}: {len(y)} labels, but {root / images} has {len(x)} images")
        if y.max(initial=0) > 9:
            fail(f"{root / numbers}: label {y.max()} is not one of the ten classes")
        keys += [(images, i) for i in range(len(x))]
        splits += [split] * len(x)
        labels += y.tolist()
        tables += [images, numbers]
    names, notes = idx_classes(root, base)
    return Source(keys, splits, names, labels, tables=tables, notes=notes)


# ---------------------------------------------------------------------------------------------------------------------
# Clusters.


def read_clusters(tables: str, dataset) -> tuple[dict[str, np.ndarray], list[str]]:
    """The clusters that tables give to the images of a dataset.Dataset: ({split: int64 [N]} in 0..K-1, K names).

    tables: FILE.csv for all splits, or TRAIN.csv,VAL.csv. The header has the columns img and cluster. Each row has the
    path of an image (all of it, or its end: the part below train/ or val/, or the file name) and a whole number. Rows
    for images that are not there are left out. Raises click.ClickException unless every image has one row.
    """
    paths = cluster_tables(tables)
    train, val = (dataset.part(split).names for split in ("train", "val"))
    held_out = set(val)  # val may be a part of train
    # Two tables are how the published clusterings of AFHQ come: train_K.csv and val_K.csv.
    wanted = [[name for name in train if name not in held_out], val]
    if len(paths) != 2:
        wanted = [[*wanted[0], *wanted[1]]]
    if len(paths) > 2:
        fail(f"{tables}: expected one table for all images, or two, for train and val")
    cluster_of: dict[str, int] = {}
    for file, images in zip(paths, wanted, strict=True):
        if not file.is_file() or file.suffix.lower() != ".csv":
            fail(f"{file} is not a .csv file: expected a table with the header img,cluster")
        found, _ = by_image(file, cluster_rows(file), images, matcher(images), 1, cluster_number, subset=True)
        cluster_of |= found
    # Numbers may have gaps; a cluster that training has no image of could not be learned.
    ids = sorted({cluster_of[name] for name in train})
    if other := {cluster_of[name] for name in val} - set(ids):
        fail(f"{tables}: no training image has the cluster {min(other)}, but some of val do")
    index = {number: i for i, number in enumerate(ids)}
    clusters = {s: np.array([index[cluster_of[n]] for n in names]) for s, names in (("train", train), ("val", val))}
    return clusters, [f"cluster{number}" for number in ids]


def cluster_tables(tables: str) -> list[Path]:
    """The files that FILE.csv or TRAIN.csv,VAL.csv names."""
    # A file comes first, since its name may have a comma.
    names = [tables] if os.path.isfile(os.path.expanduser(tables)) else tables.split(",")
    return [Path(os.path.expanduser(name.strip())) for name in names]


def cluster_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Image and cluster of each row of a table of clusters, whatever other columns it has."""
    rows = read_rows(file.parent, file.name)
    where, header = next(rows, (f"{file} line 1", []))
    if not {"img", "cluster"} <= set(header):
        fail(f"{where}: expected a header with the columns img and cluster")
    for where, row in rows:
        if len(row) != len(header):
            fail(f"{where}: {len(row)} values, but there are {len(header)} columns")
        yield where, [row[header.index("img")], row[header.index("cluster")]]


def cluster_number(cells: list[str], where: str) -> int:
    """The number of a cluster."""
    # At most nine digits, which always fit the int64 of the result.
    if not re.fullmatch("[0-9]{1,9}", cells[0]):
        fail(f"{where}: {cells[0]!r} is not the number of a cluster: a whole number from 0")
    return int(cells[0])
