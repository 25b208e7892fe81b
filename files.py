"""Files of a source: lists and reads what is in a folder or zip, and decodes its images.

`list_files` names the files, `read` gives the bytes of one, `read_idx` an IDX file as an array, and `read_image`
decodes an image. Files come from anywhere, so nothing here runs what is in them, writes anything, opens what is not a
regular file, or takes more memory than the constants say, whatever a file claims about itself.
"""

import contextlib
import ctypes
import functools
import gzip
import lzma
import os
import re
import stat
import struct
import threading
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NoReturn

import click
import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

# What reading a damaged file, or a damaged member of a zip, raises.
# RuntimeError: a member with a password, or a zip of a later version; EOFError: a gzip file that is cut off.
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
MAX_TABLE = 44 * 2**20  # bytes of a table: ImageNet's 1.3 million labels take 40 MB, and Python's lists 30 times that
MAX_FILE = 2**28  # bytes of an image in a zip, which is read as a whole: more than 3 for each of MAX_PIXELS
MAX_IDX = 2**29  # bytes of an unpacked IDX file, ten times Fashion-MNIST's, and of any member of a zip
MOST_BYTES = 2**32  # of any file in a folder: a few bytes on a disk can stand for a file of any size


def fail(message: str) -> NoReturn:
    """Stop with one line for the user, shortened in the middle where a name in it is very long."""
    message = printable(message)
    # Both ends stay: what is wrong stands at the beginning, the remedy at the end. A path alone may have 4,096 bytes.
    raise click.ClickException(message if len(message) < 2000 else f"{message[:1000]} ... {message[-900:]}")


def printable(text: str) -> str:
    """`text` with control characters and bytes that are not UTF-8 escaped: files can be called anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# --- the image reader: metrics.py has the same text ---
SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
OF_SYSTEMS = (
    "__MACOSX", "__pycache__", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information",
)  # fmt: skip
# Pillow tries only these formats, whatever a file is called: some others (EPS) would start a program.
FORMATS = sorted({name for suffix, name in Image.registered_extensions().items() if suffix in SUFFIXES})
MAX_PIXELS = 2**26  # 67 million: room for cameras; decoding takes up to 24 bytes for each, so 1.6 GB at most
LARGE = threading.Lock()  # images of more than half of that are decoded one at a time
warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata that nothing here uses
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a long text is no fault of the picture
with contextlib.suppress(OSError, AttributeError), open("/proc/self/maps", errors="surrogateescape") as maps:
    for path in {line.split(maxsplit=5)[-1].strip() for line in maps if "libtiff" in line}:  # it prints errors as well
        for kind in ("Error", "Warning"):
            getattr(ctypes.CDLL(path), f"TIFFSet{kind}Handler")(None)


def read_image(file: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as upright 8-bit RGB.

    Of an animation this is the first frame. EXIF tells which side is up, transparency becomes white, and 16-bit and
    float grey are scaled to 8 bits. A JPEG beyond `max_pixels` comes at half its width and height, so that
    memory stays bounded. Raises ValueError with the reason, without the file's name, if the file is no image, damaged,
    still too large, or not a regular file.
    """
    try:
        if isinstance(file, (str, Path)):
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a regular file")  # reading a device or a pipe may never end
            if not status.st_size:
                raise ValueError("it is empty")  # so say those of /proc, some of which never end
            if status.st_size > 8 * max_pixels + 2**20:  # some decoders read the whole file, and copy it
                raise ValueError(f"its {status.st_size >> 20} MB are too many for --max-pixels {max_pixels}")
        if max_pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow refuses anything of more than twice this while it opens it
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                image.draft(None, (image.width // 2, image.height // 2))  # JPEG decodes at fractions; others do nothing
            tags = getattr(image, "tag_v2", {})  # of a TIFF: a tile is decoded as a whole, however little of it is seen
            for width, height in (image.size, (tags.get(322, 0), tags.get(323, 0))):
                if width * height > max_pixels:
                    raise ValueError(f"{width} x {height} pixels are more than --max-pixels {max_pixels}")
            with LARGE if image.width * image.height > MAX_PIXELS // 2 else contextlib.nullcontext():
                return to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError("it is no image") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{str(error).split(',')[0]}: see --max-pixels") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(reason.split("\n")[0]) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image as upright 8-bit RGB. Raises nearly anything for damaged ones."""
    image.load()
    with contextlib.suppress(Exception):  # of damaged EXIF: then the image stays as it is stored
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.asarray(image)
        peak = np.fmax.reduce(grey, axis=None)  # the largest value, NaN aside
        ranges = (1, 255, 65535) if image.mode == "F" else (65535, 2**31 - 1)  # what the files of others use
        white = next((r for r in ranges if peak <= 1.5 * r), ranges[-1])  # resizing and sharpening overshoot
        levels = np.empty(grey.shape, np.uint8)
        for i in range(0, len(grey), 64):  # a few rows at a time: all of them in float64 may be a gigabyte
            rows = np.nan_to_num(grey[i : i + 64].astype(np.float64))
            levels[i : i + 64] = np.rint((rows * (255 / white)).clip(0, 255))
        return Image.fromarray(levels).convert("RGB")
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        background = Image.new("RGB", image.size, "white")
        background.paste(image, mask=image)
        return background
    return image if image.mode == "RGB" else image.convert("RGB")


def is_hidden(name: str) -> bool:
    """Whether systems and editors use the name for files of their own: .x, ._x, .ipynb_checkpoints, __MACOSX."""
    return name.startswith(".") or name in OF_SYSTEMS


def walk(root: Path) -> tuple[list[str], list[str], list[str]]:
    """Sorted names, relative to `root`, of all files and all folders below it; hidden ones are left out.

    Links to folders are followed, but every folder is entered once, so that loops end and no image counts twice. The
    third list has the links to folders that are there under another name, but not those that lead upwards. Raises
    OSError, with its file name, for a folder that cannot be listed.
    """
    files, folders, again, seen = [], [], [], set()
    real, linked = [(str(root), "")], []  # a folder comes under its own name before it comes through a link
    while real or linked:
        path, name = (real or linked).pop()
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            above = os.path.realpath(os.path.dirname(path))
            if os.path.commonpath((above, os.path.realpath(path))) != os.path.realpath(path):
                again.append(name)
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.append(name)
        for entry in sorted(os.scandir(path), key=lambda e: e.name, reverse=True):  # of two links, the first counts
            below = f"{name}/{entry.name}" if name else entry.name
            if is_hidden(entry.name):
                continue
            if entry.is_symlink() and os.path.isdir(entry.path):
                linked.append((entry.path, below))
            elif entry.is_dir(follow_symlinks=False):
                real.append((entry.path, below))
            else:  # devices and links to nothing as well: read_image says what is wrong with them
                files.append(below)
    return sorted(files), sorted(folders[1:]), sorted(again)


def list_images(folder: Path) -> list[Path]:
    """All image files in a folder and the folders in it, in the order of their paths."""
    return [folder / name for name in walk(folder)[0] if name.lower().endswith(SUFFIXES)]


# --- end of the image reader ---


# ---------------------------------------------------------------------------------------------------------------------
# Folders and zips. `root` is one of them; names in it are relative, with forward slashes.


def list_files(root: Path) -> tuple[Path, list[str], list[str]]:
    """The root, files and folders of a source, hidden ones left out. A folder with one zip alone stands for the zip."""
    if root.is_file():
        return root, *list_zip(root)
    try:
        files, folders, again = walk(root)
    except OSError as error:
        fail(f"{error.filename} cannot be read: {error.strerror}")
    # Left out, the images below it would be missing without a word.
    if again:
        fail(f"{root / again[0]} is a link to a folder that is there under another name: remove one of the two")
    whole = [f for f in files if not f.endswith(".part")]  # the others are downloads that have not ended
    if len(whole) == 1 and whole[0].lower().endswith(".zip"):
        return list_files(root / whole[0])
    return root, files, folders


def list_zip(root: Path) -> tuple[list[str], list[str]]:
    """The files and folders in a zip. Refuses names that would lie outside of it, as only an attacker writes them."""
    files, folders = set(), set()
    try:
        members = _archive(root, root.stat().st_mtime_ns, os.getpid()).namelist()
    except UNREADABLE as error:
        fail(f"{root} cannot be read as a zip: {error}")
    for name in members:
        parts = PurePosixPath(name).parts
        # Linux opens no path of more than 4,096 bytes; 100 levels bound the list of folders that is made below.
        if len(name) > 4096 or len(parts) > 100:
            fail(f"{root}: member {name!r:.100} has a longer path than any file, so it is refused")
        # Zips have slashes by their standard. With backslashes all members would lie in one folder, without classes.
        if "\\" in name:
            fail(f"{root}: member {name!r} has backslashes for slashes: unpack it, and give the folder")
        if name.startswith("/") or ".." in parts or re.match("[A-Za-z]:", name):
            fail(f"{root}: member {name!r} points outside the archive, so it is refused")
        if not any(is_hidden(p) for p in parts):
            found, plain = folders if name.endswith("/") else files, "/".join(parts)
            # zipfile gives the last of two, so an image would be lost without a word.
            if found is files and plain in files:
                fail(f"{root}: member {name!r} is there twice")
            found.add(plain)
    # Many programs write no entries for folders.
    folders |= {str(p) for n in files for p in PurePosixPath(n).parents}
    return sorted(files), sorted(folders - {".", ""})


@functools.lru_cache(maxsize=2)
def _archive(path: Path, changed: int, pid: int) -> zipfile.ZipFile:
    """The open zip, for one process and one state of the file: an inherited one would share its file position."""
    # Kept open, since opening it reads the list of all members, and every image asks for it.
    return zipfile.ZipFile(path)


def open_file(root: Path, name: str) -> BinaryIO:
    """Open a file below a folder, or a member of a zip. Raises one of UNREADABLE, for what is no regular file too."""
    if root.is_dir():
        status = os.stat(root / name)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if not status.st_size:
            raise ValueError("it is empty")  # so say those of /proc, some of which never end
        if status.st_size > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES >> 30} GB")
        return open(root / name, "rb")
    archive = _archive(root, root.stat().st_mtime_ns, os.getpid())
    member = archive.NameToInfo.get(name) or archive.NameToInfo.get("./" + name)  # as some programs write them
    if member is None:  # list_zip has "a//b" as "a/b"
        raise ValueError("its name in the zip is not a plain path")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("zip it again by deflate")  # others unpack at once what a few bytes stand for
    # What a zip claims counts: zipfile gives no more bytes of a member than that.
    if member.file_size > MAX_IDX:
        raise ValueError(f"it is larger than {MAX_IDX >> 20} MB")
    return archive.open(member)


def read(root: Path, name: str, most: int) -> bytes:
    """The content of a file of at most `most` bytes: a few kB of a zip can hold gigabytes."""
    with open_file(root, name) as file:
        # One byte more tells a file that is larger from one that just fits.
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most >> 20} MB")
    return content


# Four files are one data set: images and labels, for training and test. Each is read once, not for every image.
@functools.lru_cache(maxsize=4)
def read_idx(root: Path, name: str) -> np.ndarray:
    """An IDX file of unsigned bytes (the format of MNIST), gzipped or not, as uint8 of the shape it names."""
    try:
        with open_file(root, name) as raw, gzip.open(raw) if name.endswith(".gz") else raw as file:
            # Two zero bytes, the type of the numbers (8: unsigned bytes), the number of dimensions; then the sizes.
            zeros, kind, dimensions = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
            size = int(np.prod(shape, dtype=object))  # Python's numbers: those of a damaged header overflow int64
            content = file.read(min(size, MAX_IDX) + 1)  # one more than there should be: gzip then checks its CRC
            if zeros or kind != 8 or len(content) != size:
                raise ValueError
            return np.frombuffer(content, np.uint8).reshape(shape)
    except (*UNREADABLE, struct.error):
        fail(f"{root / name} is damaged: not a whole IDX file of bytes")
