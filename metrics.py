"""Scores two sets of images: FID, IS, KID, precision and recall, t-SNE Chamfer distance. A trained run is scored too.

    python metrics.py --images DIR --reference DIR --resize clean
    python metrics.py --images DIR --reference stats.npz
    python metrics.py --network runs/critters/gan.pt
    python metrics.py --network runs/afhq/gan.pt --metrics fid,is,chamfer,chamfer_sum,accuracy --json afhq.json
    torchrun --nproc-per-node 8 -- metrics.py --network runs/afhq/gan.pt

FID, IS, KID, precision and recall look through the FID Inception network with published weights (`--inception FILE`, or
downloaded once). Where there are none, a run is scored through an independent judge: a small network that is trained on
the real images and their labels alone, which the generator never sees. The distances are then called FD and KD.
`--features encoder` takes the run's own encoder, which flatters it: the generator was trained through it. FID depends by
tens of per cent on how images are resized to 299 px, so every output names it: `torch` as pytorch-fid, `tf` as
torch-fidelity and the original code, `clean` as clean-fid. All images are compared as 8-bit RGB.

Everything random comes from the seed and the index of an image alone, so no number depends on the batch size or on the
number of processes beyond rounding. For two folders this file needs no other, and with `ops/` beside it t-SNE is faster.
For `--network` and `--features FILE` it needs trained.py, which says what the two sets of a run are and what else a run
is asked, and what that needs: all of this project.
"""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import socket
import stat
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import click
import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

try:
    from ops import tsne_forces, tsne_neighbourhoods
except ImportError:  # a copy of this file alone
    tsne_forces = tsne_neighbourhoods = None

# pytorch-fid's conversion of the TensorFlow network of 2015, which FID is defined by.
WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_HASH = "6726825d"  # how the SHA-256 of the published file begins
# torchvision's Inception v3, through which the published code computes IS.
IMAGENET_URL = "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth"
# "fid" and "kid" stand for FD and KD too, where features are not Inception's.
METRICS = (
    "fid", "is", "is_published", "kid", "pr", "spectrum", "chamfer", "chamfer_sum", "accuracy", "diversity",
    "information",
)  # fmt: skip
OF_FOLDERS = ("fid", "is", "kid", "pr", "chamfer")  # what needs no run
FEWEST = 64  # points a side for t-SNE: with fewer, two samples of one distribution can score worse than two far apart
MAX_STATS = 2**29  # bytes of unpacked statistics: those of 8,000 features
JUDGE_STATS = "--save-stats: no command reads statistics of a judge: give --inception or --features FILE"
MOST = 10_000  # features a side for precision and recall, whose time grows with their product

# ---------------------------------------------------------------------------------------------------------------------
# Reading image files: the text of files.py, so that this file works alone. The metrics begin after it.

# --- the image reader: files.py has the same text ---
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
# Where images come from. Each source has a length and `batches(blocks)`, which gives for every block of indices what a
# feature network takes: uint8 RGB images [B, H, W, 3], or those of a folder as its `prepare` makes them.


def load_image(path: Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """An image file as uint8 RGB [H, W, 3]. Raises click.ClickException naming the file if it cannot be read."""
    try:
        return torch.from_numpy(np.array(read_image(path, max_pixels)))
    except ValueError as error:
        raise click.ClickException(f"{path} cannot be read as an image ({error}): repair or remove it") from None


class Folder:
    """All images of a folder and the folders in it, or `num` of them drawn by the seed, in the order of their paths.

    prepare: what a feature network does first, uint8 [1, H, W, 3] -> float [1, 3, S, S]. It is done as each image is
    read, so that no batch of photos has to be in memory at their own size.
    """

    def __init__(
        self, path: str, prepare: Callable, num: int | None = None, seed: int = 0, max_pixels: int = MAX_PIXELS
    ):
        if not Path(path).is_dir():
            raise click.ClickException(f"{path} is not a folder")
        self.path, self.prepare, self.max_pixels = path, prepare, max_pixels
        self.files = list_images(Path(path))
        if len(self.files) < 2:
            what = "only one image, but a distance needs at least two" if self.files else "no image"
            raise click.ClickException(f"{path} has {what} ({', '.join(SUFFIXES)})")
        if num and num < len(self.files):
            # 6 keeps this draw apart from others by the same seed, which have other numbers there.
            chosen = np.random.default_rng([seed, 6]).choice(len(self.files), num, replace=False)
            self.files = [self.files[i] for i in np.sort(chosen)]
        self.sizes: set[tuple] = set()  # of the images that were read; a note says if they differ

    def __len__(self) -> int:
        return len(self.files)

    def load(self, i: int) -> Tensor:
        """Image i as `prepare` makes it."""
        image = load_image(self.files[i], self.max_pixels)
        self.sizes.add(tuple(image.shape))
        # One at a time here too: as floats, a picture takes four times the bytes.
        with LARGE if image.numel() > 3 * MAX_PIXELS // 2 else contextlib.nullcontext():
            return self.prepare(image[None])

    def batches(self, blocks: Sequence[np.ndarray]) -> Iterator[Tensor]:
        if not blocks:  # more processes than blocks
            return
        # Each thread holds a picture at its own size: 8 at most, so that memory stays bounded.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

            def submit(block: Sequence[int]) -> list:
                return [pool.submit(self.load, i) for i in block]

            ahead = [submit(blocks[0])]
            try:
                for block in [*blocks[1:], []]:  # decode the next block while the network looks at this one
                    ahead.append(submit(block))
                    yield torch.cat([job.result() for job in ahead.pop(0)])
            finally:
                # After an error nobody waits for the pictures that are still in the queue.
                pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# The FID Inception network.


def resize(images: Tensor, how: str) -> Tensor:
    """uint8 RGB images [B, H, W, 3] -> float32 [B, 3, 299, 299], resized and scaled as `how` ('torch', 'tf' or 'clean') does.

    torch: bilinear between pixel centres, 2x/255 - 1. tf: bilinear between pixel corners, as TensorFlow 1. clean:
    antialiased bicubic, clipped to [0, 255]. The last two scale by (x - 128)/128. Raises ValueError for another `how`.
    """
    if how not in ("torch", "tf", "clean"):
        raise ValueError(f"no resize {how!r}: torch, tf or clean")
    x = images.permute(0, 3, 1, 2).float()
    # Arithmetic and scale are each library's own, so that features agree with it to 1e-4.
    if how == "torch":
        return F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    if how == "clean":
        # Bicubic overshoots at edges. clean-fid clips that, and does not round.
        x = F.interpolate(x, (299, 299), mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
    else:  # "tf": no half pixel is added, so that pixel 0 stays where it is
        for dim in (3, 2):
            n = x.shape[dim]
            # In float32, as TensorFlow: rounded otherwise, a place at a whole number may fall to the pixel before.
            at = torch.arange(299, device=x.device, dtype=torch.float32) * torch.tensor(n / 299, dtype=torch.float32)
            low = at.long()
            weight = (at - low).view(-1, 1) if dim == 2 else at - low
            # The last pixel has no next one, and takes itself.
            a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
            x = a + (b - a) * weight
    return (x - 128) / 128


# Branches of each block that start with a 1x1 convolution of its input, or of its input's average pooling.
HEADS = {
    **{f"Mixed_5{b}": ["branch1x1", "branch5x5_1", "branch3x3dbl_1", "branch_pool"] for b in "bcd"},
    **{f"Mixed_6{b}": ["branch1x1", "branch7x7_1", "branch7x7dbl_1", "branch_pool"] for b in "bcde"},
    # 6a has only one such branch. In 7a and 7c a maximum is pooled, which changes places with no convolution.
    "Mixed_7a": ["branch3x3_1", "branch7x7x3_1"],
    "Mixed_7b": ["branch1x1", "branch3x3_1", "branch3x3dbl_1", "branch_pool"],
    "Mixed_7c": ["branch1x1", "branch3x3_1", "branch3x3dbl_1"],
}


def load_weights(net: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy the weights. Raises ValueError with the reason in one line if they do not fit."""
    try:
        net.load_state_dict(weights)
    except Exception as error:  # what is no dict of tensors raises nearly anything
        raise ValueError(f"{str(error).splitlines()[-1].strip():.200}") from None


class Inception(nn.Module):
    """The Inception v3 that FID is defined by: torchvision's with TensorFlow's pooling and 1,008 classes.

    It differs from torchvision's in three places: average pooling leaves the padding out, the last block's pooling takes
    the maximum, and there are 1,008 logits. For speed, batch norms are folded into the convolutions, all 1x1
    convolutions that read the same input are one, and where average pooling precedes a 1x1 convolution the two change
    places (both are linear, and fewer channels are pooled).

    weights: state dict with torchvision's names, as in the published file. Raises ValueError if it does not fit.
    """

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        # The published file has no auxiliary classifier. Random first weights would take seconds and be overwritten.
        net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
        load_weights(net, weights)
        # In eval mode the statistics of a batch norm are fixed, so that it folds into its convolution.
        net.eval().requires_grad_(False)
        self.classes = net.fc.weight  # of the logits, which IS takes without their bias
        # Plain dicts: nn.Module moves none of their tensors, so `to` below does.
        self.convs: dict[str, tuple] = {}  # name: weight, bias, stride, padding
        self.sizes: dict[str, list[int]] = {}  # block: channels of its branches' first layers
        for name, module in net.named_modules():
            if isinstance(module, torchvision.models.inception.BasicConv2d):
                conv = nn.utils.fusion.fuse_conv_bn_eval(module.conv, module.bn)
                self.convs[name] = (conv.weight, conv.bias, conv.stride, conv.padding)
        for block, branches in HEADS.items():
            weight, bias = zip(*(self.convs.pop(f"{block}.{branch}")[:2] for branch in branches), strict=True)
            self.convs[block] = (torch.cat(weight), torch.cat(bias), 1, 0)
            self.sizes[block] = [len(b) for b in bias]

    def to(self, device: torch.device) -> "Inception":
        self.convs = {  # channels_last, as images are that come as [B, H, W, 3]
            name: (w.detach().to(device, memory_format=torch.channels_last), b.detach().to(device), stride, padding)
            for name, (w, b, stride, padding) in self.convs.items()
        }
        return super().to(device)

    def conv(self, x: Tensor, *names: str) -> Tensor:
        """Convolutions with ReLU, one after the other."""
        for name in names:
            weight, bias, stride, padding = self.convs[name]
            x = F.conv2d(x, weight, bias, stride, padding).relu_()
        return x

    def heads(self, x: Tensor, block: str) -> list[Tensor]:
        """The first layer of a block's branches."""
        weight, bias, _, _ = self.convs[block]
        sizes = self.sizes[block]
        if "branch_pool" not in HEADS[block]:
            return list(F.conv2d(x, weight, bias).relu_().split(sizes, 1))
        # Bias and ReLU come after the pooling, as in the network before the two changed places.
        x = F.conv2d(x, weight)
        *branches, pool = x.split(sizes, 1)
        *biases, pool_bias = (b.view(-1, 1, 1) for b in bias.split(sizes))
        pool = F.avg_pool2d(pool, 3, 1, 1, count_include_pad=False)
        return [x.add_(b).relu_() for x, b in zip([*branches, pool], [*biases, pool_bias], strict=True)]

    @torch.inference_mode()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x float32 [B, 3, 299, 299] as from `resize` -> features [B, 2048], logits without bias [B, 1008]."""
        conv, heads = self.conv, self.heads
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(conv(x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"), 3, 2)
        x = F.max_pool2d(conv(x, "Conv2d_3b_1x1", "Conv2d_4a_3x3"), 3, 2)
        for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            one, five, three, pool = heads(x, b)
            three = conv(three, f"{b}.branch3x3dbl_2", f"{b}.branch3x3dbl_3")
            # In torchvision's order of branches, which the next layer's weights expect.
            x = torch.cat([one, conv(five, f"{b}.branch5x5_2"), three, pool], 1)
        b = "Mixed_6a"
        three = conv(x, *(f"{b}.branch3x3dbl_{i}" for i in (1, 2, 3)))
        x = torch.cat([conv(x, f"{b}.branch3x3"), three, F.max_pool2d(x, 3, 2)], 1)
        for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            one, seven, double, pool = heads(x, b)
            seven = conv(seven, *(f"{b}.branch7x7_{i}" for i in (2, 3)))
            double = conv(double, *(f"{b}.branch7x7dbl_{i}" for i in (2, 3, 4, 5)))
            x = torch.cat([one, seven, double, pool], 1)
        b = "Mixed_7a"
        three, seven = heads(x, b)
        seven = conv(seven, *(f"{b}.branch7x7x3_{i}" for i in (2, 3, 4)))
        x = torch.cat([conv(three, f"{b}.branch3x3_2"), seven, F.max_pool2d(x, 3, 2)], 1)
        for b in ("Mixed_7b", "Mixed_7c"):
            one, three, double, *pool = heads(x, b)
            # 7c pools by maximum: probably a slip in the original network, but every published FID has it.
            pool = pool or [conv(F.max_pool2d(x, 3, 1, 1), f"{b}.branch_pool")]
            double = conv(double, f"{b}.branch3x3dbl_2")
            ends = [conv(three, f"{b}.branch3x3_2{i}") for i in "ab"]
            ends += [conv(double, f"{b}.branch3x3dbl_3{i}") for i in "ab"]
            x = torch.cat([one, *ends, *pool], 1)
        x = x.mean((2, 3))
        return x, F.linear(x, self.classes)  # without bias, as in the original IS


def published_weights(url: str, option: str) -> Path:
    """The published weight file in torch's hub folder, downloaded and checked there the first time.

    Its name ends with the first digits of its SHA-256. Raises click.ClickException if it can be neither found nor
    fetched, or is not what was published.
    """
    folder = torch.hub.get_dir()
    if folder.startswith("~"):  # of a user without a home: a folder of that name would be made here
        folder = os.path.join(tempfile.gettempdir(), f"torch-hub-{os.getuid()}")
    path = Path(folder) / "checkpoints" / url.rsplit("/", 1)[1]
    digits = path.stem.rsplit("-", 1)[1]  # of the SHA-256, by the custom of PyTorch's hub
    if not path.exists():
        timeout = socket.getdefaulttimeout()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(15)  # seconds without an answer; torch.hub would wait for ever
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digits)
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: it has another hash
            raise click.ClickException(
                f"the Inception weights are not on this machine and cannot be downloaded ({error}): fetch {url} "
                f"elsewhere and save it as {path}, or give it by {option} FILE"
            ) from None
        finally:
            socket.setdefaulttimeout(timeout)  # the setting is the whole program's
    # A file that lay there is checked too: other weights would give numbers that look all right.
    if not file_hash(path).startswith(digits):
        raise click.ClickException(f"{path} is not the published weight file (SHA-256 {digits}...): delete it")
    return path


def file_hash(path: Path | str) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):  # the files have about 100 MB
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Feature networks: uint8 images [B, H, W, 3], or what their `prepare` makes of these -> features float32 [B, D] and
# log p(c|x) [B, C] for IS (None where there is none).


class InceptionFeatures:
    """Features of the FID Inception network. file: weights by name, or None for the published ones."""

    name = "inception"
    dims = 2048

    def __init__(self, file: str | None, how: str, device: torch.device):
        net, path = inception_network(file, WEIGHTS_URL, "--inception", Inception)
        self.net = net.to(device)
        self.hash = file_hash(path)[:16]  # statistics keep it: those of other weights are refused
        self.published = self.hash.startswith(WEIGHTS_HASH)
        self.resize, self.device = how, device

    def prepare(self, images: Tensor) -> Tensor:
        return resize(images, self.resize)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.device)
        # A folder's images come prepared, those of a run do not.
        features, logits = self.net(self.prepare(images) if images.dtype == torch.uint8 else images)
        # In float64, as torch-fidelity: IS adds up the small probabilities of 50,000 images.
        return features, logits.double().log_softmax(1)


def inception_network(file: str | None, url: str, option: str, build: Callable) -> tuple[nn.Module, Path]:
    """build(weights) and the file they come from: `file`, given by `option`, or else the published one at `url`.

    Raises click.ClickException if there are no weights, or others.
    """
    path = Path(file) if file else published_weights(url, option)
    try:
        # Mapped, a damaged zip cannot make torch.load read beyond its end. Older weight files are no zips.
        return build(torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))), path
    except Exception as error:  # damaged files raise nearly anything
        why = "it is no file of tensors"
        if isinstance(error, OSError | ValueError):
            why = getattr(error, "strerror", None) or error
        raise click.ClickException(f"{path} holds no weights for {option}: {why}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of features and the numbers made from them.


class Moments:
    """Mean and covariance as a stream, in float64 on the features' device: memory does not grow with the images.

    Chan's update: parts are centred on their own means before they are joined, so nothing cancels.
    """

    def __init__(self, n: int = 0, mean: Tensor | None = None, scatter: Tensor | None = None):
        self.n, self.mean, self.scatter = n, mean, scatter  # scatter: sum of (x - mean)(x - mean)^T

    def add(self, x: Tensor) -> None:
        """Take in features [B, D]."""
        # FID is a small difference of large traces, so float32 would not do.
        x = x.double()
        mean = x.mean(0)
        x = x - mean
        self.join(Moments(len(x), mean, x.T @ x))

    def join(self, other: "Moments") -> None:
        if self.n == 0 and other.n:
            # A copy, since later parts are added to it in place.
            self.n, self.mean, self.scatter = other.n, other.mean, other.scatter.clone()
        elif other.n:
            n, shift = self.n + other.n, other.mean - self.mean
            # The two scatters, and that of their two means (Chan et al. 1979).
            self.scatter.add_(other.scatter).addr_(shift, shift, alpha=self.n * other.n / n)
            self.mean = self.mean + shift * (other.n / n)
            self.n = n

    def gaussian(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and unbiased covariance [D, D]. Raises click.ClickException for fewer than two images."""
        if self.n < 2:
            raise click.ClickException("one image has no covariance: a distance needs at least two")
        return self.mean.cpu().numpy(), (self.scatter / (self.n - 1)).cpu().numpy()


def is_covariance(cov: np.ndarray) -> bool:
    """Whether a square matrix is symmetric and has no negative variance."""
    # Symmetric up to rounding: 1e-3 of an entry, or 1e-6 of the largest.
    symmetric = np.allclose(cov, cov.T, rtol=1e-3, atol=1e-6 * np.abs(cov).max())
    return symmetric and bool((cov.diagonal() >= 0).all())


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al. 2017.

    With C1 = A A^T and C2 = B B^T (Cholesky with pivoting, which stops at the rank of a singular matrix), the last trace
    is the sum of the singular values of A^T B: real and not negative whatever the rank. In high rank they are the roots
    of the eigenvalues of the symmetric (A^T B)(A^T B)^T, with an error of 1e-8 of the largest each.

    means [D], covariances [D, D]. Raises ValueError if they are not finite or are no means and covariances.
    """
    cov1, cov2 = np.asarray(cov1, np.float64), np.asarray(cov2, np.float64)
    # LAPACK is called directly below, and does not look for NaN.
    if not all(np.isfinite(a).all() for a in (mean1, cov1, mean2, cov2)):
        raise ValueError("a mean or covariance is not finite")
    D = len(cov1)
    if not (np.shape(mean1) == np.shape(mean2) == (D,) and cov1.shape == cov2.shape == (D, D)):
        raise ValueError(f"no means and covariances of one size: {[np.shape(a) for a in (mean1, cov1, mean2, cov2)]}")
    if not (is_covariance(cov1) and is_covariance(cov2)):
        raise ValueError("a covariance is not symmetric, or has a negative variance")

    def factor(cov: np.ndarray) -> np.ndarray:
        # LAPACK counts rows from 1. Above the diagonal and beyond the rank there is nothing of the factor.
        lower, pivot, rank, _ = scipy.linalg.lapack.dpstrf(cov, lower=1)
        a = np.empty((len(cov), rank))
        a[pivot - 1] = np.tril(lower)[:, :rank]
        return a

    product = factor(cov1).T @ factor(cov2)  # [rank of cov1, rank of cov2]: small where a set has few images
    if min(product.shape) <= 256:  # the more exact way, while it is cheap
        trace = scipy.linalg.svdvals(product).sum() if product.size else 0.0
    else:
        # Of the shorter side: the longer one adds nothing but zeros to the eigenvalues.
        gram = product @ product.T if product.shape[0] <= product.shape[1] else product.T @ product
        # Rounding puts some eigenvalues just below 0, where the root would be NaN.
        trace = np.sqrt(scipy.linalg.eigvalsh(gram, check_finite=False, overwrite_a=True).clip(0)).sum()
    shift = np.asarray(mean1, np.float64) - np.asarray(mean2, np.float64)
    # For equal sets, rounding could give a distance just below 0.
    return max(0.0, float(shift @ shift + np.trace(cov1) + np.trace(cov2) - 2 * trace))


class InceptionScore:
    """IS (Salimans et al. 2016): exp of the mean KL(p(c|x) || p(c)) over 10 splits, its mean and spread, as a stream.

    An image's split comes from the permutation that torch-fidelity draws, so the two agree.
    """

    def __init__(self, n: int, splits: int = 10, seed: int = 2020):  # torch-fidelity's seed
        if n < splits:
            raise click.ClickException(f"IS needs at least {splits} images, one a split; there are {n}")
        # NumPy's old generator and these bounds of the splits, since torch-fidelity has them.
        order = np.random.RandomState(seed).permutation(n)
        self.split = np.empty(n, np.int64)
        for i in range(splits):
            self.split[order[i * n // splits : (i + 1) * n // splits]] = i
        self.entropy, self.p, self.added = torch.zeros(splits, dtype=torch.float64), None, 0

    def add(self, index: np.ndarray, log_p: Tensor) -> None:
        """Take in log p(c|x) float64 [B, C] of the images at `index`."""
        log_p, split = log_p.cpu(), torch.from_numpy(self.split[index])
        self.added += len(log_p)
        p = log_p.exp()
        if self.p is None:
            self.p = torch.zeros(len(self.entropy), p.shape[1], dtype=torch.float64)
        # entr(p) is -p log p, and 0 at p = 0, where p.log() is infinite.
        self.entropy.index_add_(0, split, -torch.special.entr(p).sum(1))
        self.p.index_add_(0, split, p)

    def join(self, other: "InceptionScore") -> None:
        if other.p is not None:
            self.p = other.p if self.p is None else self.p + other.p
            self.entropy, self.added = self.entropy + other.entropy, self.added + other.added

    def value(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits. Raises ValueError before all images were added."""
        if self.added != len(self.split):
            raise ValueError(f"{self.added} images were added of {len(self.split)}")
        n = torch.from_numpy(np.bincount(self.split, minlength=len(self.entropy)))
        q = self.p / n[:, None]
        # Mean KL(p || q) = mean of sum p log p - sum q log q: so one pass is enough, before q is known.
        scores = (self.entropy / n - torch.special.xlogy(q, q).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()  # of the population, as torch-fidelity


# The defaults are torch-fidelity's: 100 subsets of 1,000, drawn by the seed 2020.
def kernel_distance(
    x: Tensor, y: Tensor, subset: int = 1000, subsets: int = 100, seed: int = 2020
) -> tuple[float, float]:
    """KID (Binkowski et al. 2018): unbiased squared MMD of the kernel (x.y / D + 1)^3 over random subsets.

    x [N, D], y [M, D]. Subsets are drawn as torch-fidelity does. Returns mean and standard deviation over the subsets.
    Raises click.ClickException if a subset is larger than a set.
    """
    if not 2 <= subset <= min(len(x), len(y)):
        raise click.ClickException(
            f"--kid-subset {subset} must be from 2 to the {min(len(x), len(y))} images there are"
        )

    def pick(points: Tensor, drawn: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """The points that were drawn, and a column for each subset that is 1 at its own."""
        # A point that many subsets have drawn has its kernels computed once.
        rows = np.unique(np.concatenate(drawn))
        members = torch.zeros(len(rows), len(drawn), dtype=torch.float64, device=points.device)
        for column, index in enumerate(drawn):
            members[np.searchsorted(rows, index), column] = 1
        return points[rows].double(), members

    def sums(a: Tensor, b: Tensor, in_a: Tensor, in_b: Tensor, block: int = 1024) -> Tensor:
        """The sum of the kernel over all pairs, for each subset."""
        # 1,024 rows at a time: a matrix of all pairs in float64 could fill the memory.
        parts = zip(a.split(block), in_a.split(block), strict=True)
        return sum((m * ((part @ b.T).div_(a.shape[1]).add_(1).pow_(3) @ in_b)).sum(0) for part, m in parts)

    def within(a: Tensor, in_a: Tensor) -> Tensor:
        # The unbiased estimate leaves out pairs of a point with itself.
        own = (a.square().sum(1) / a.shape[1] + 1).pow(3)  # of each point with itself
        return (sums(a, a, in_a, in_a) - own @ in_a) / (subset * (subset - 1))

    draw, values = np.random.RandomState(seed), []
    # For each subset first x, then y: torch-fidelity's order of draws.
    drawn = [[draw.choice(len(s), subset, replace=False) for s in (x, y)] for _ in range(subsets)]
    # One matrix of all kernels serves all subsets; where that is larger than all of theirs, each has its own.
    step = subsets if max(len(x), len(y)) ** 2 < subsets * subset**2 else 1
    for i in range(0, subsets, step):
        of_x, of_y = zip(*drawn[i : i + step], strict=True)
        (a, in_a), (b, in_b) = pick(x, of_x), pick(y, of_y)
        values += (within(a, in_a) + within(b, in_b) - 2 / subset**2 * sums(a, b, in_a, in_b)).tolist()
    return float(np.mean(values)), float(np.std(values))


# k = 3: the paper's choice. block: rows of distances in memory at a time.
def precision_recall(real: Tensor, fake: Tensor, k: int = 3, block: int = 1024) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features real [N, D] and fake [M, D].

    Each real image has a ball that reaches to its k-th nearest real neighbour. Precision is the share of generated images
    inside any ball; recall swaps the roles. Both in [0, 1]. Of k images or fewer, the farthest other one counts. Raises
    ValueError for features that are not finite.
    """
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("features are not finite")

    def distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
        square = b.square().sum(1)
        for part in a.split(block):
            yield torch.addmm(part.square().sum(1, keepdim=True) + square, part, b.T, alpha=-2)

    def within(points: Tensor, centres: Tensor) -> float:
        k_th = min(k + 1, len(centres))  # each point is the nearest to itself
        radius = torch.cat([d.kthvalue(k_th, 1).values for d in distances(centres, centres)])
        return torch.cat([(d <= radius).any(1) for d in distances(points, centres)]).double().mean().item()

    real, fake = real.double(), fake.double()  # |a|^2 + |b|^2 - 2 a.b cancels for close points
    return within(fake, real), within(real, fake)


def is_stats(reference: str) -> bool:
    """Whether a --reference is a file of statistics and no folder."""
    return reference.endswith(".npz") or Path(reference).is_file()


def save_stats(path: Path, moments: Moments, features) -> None:
    """Write a reference's statistics as an .npz that pytorch-fid reads too."""
    mean, cov = moments.gaussian()
    with aside(path) as temporary, open(temporary, "wb") as file:
        # mu and sigma are pytorch-fid's names; the others tell `load_stats` whether they fit.
        np.savez(file, mu=mean, sigma=cov, n=moments.n, network=features.hash, resize=features.resize)


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`, which it becomes if nothing fails. Raises click.ClickException if it cannot."""
    # In the same folder, since renaming does not cross disks.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def is_result(file: str, option: str) -> bool:
    """Whether a file is what --json or --save-stats wrote earlier, so that it may be written anew."""
    try:
        # A slip in the name must not cost a user another file.
        if option == "--save-stats":
            with zipfile.ZipFile(file) as parts:
                return {"mu.npy", "sigma.npy"} <= set(parts.namelist())
        content = json.loads(Path(file).read_text())
        # Every result has its seed: of one run at the top, of several within each.
        return any("seed" in found for found in (content, *content.values()) if isinstance(found, dict))
    except Exception:  # anything may be there
        return False


def load_stats(path: Path | str, features) -> tuple[Moments, bool]:
    """Read statistics made by `save_stats` or by pytorch-fid; says whether the file names its network and resize.

    Raises click.ClickException if they are of another network or resize, or no statistics at all.
    """
    try:
        with zipfile.ZipFile(path) as parts:
            if sum(part.file_size for part in parts.infolist()) > MAX_STATS:  # a few kB can unpack to any size
                raise ValueError
        # A pickle could run any code.
        with np.load(path, allow_pickle=False) as file:
            stats = {k: file[k] for k in ("mu", "sigma", "n", "network", "resize") if k in file.files}
        # Real numbers alone: no text, nothing complex.
        if any(stats[name].dtype.kind not in "fiu" for name in ("mu", "sigma")):
            raise ValueError
        mean, cov = (torch.from_numpy(np.asarray(stats[name], np.float64)) for name in ("mu", "sigma"))
        # pytorch-fid does not say how many images: then so many that no note calls them too few.
        n = int(stats.get("n", 10**9))
    except Exception as error:  # damaged files raise nearly anything
        why = f": {error.strerror}" if getattr(error, "strerror", None) else ""
        raise click.ClickException(f"{path} holds no statistics ('mu' and 'sigma'){why}") from None
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)) or not all(t.isfinite().all() for t in (mean, cov)):
        raise click.ClickException(f"{path}: mu {[*mean.shape]} and sigma {[*cov.shape]} are no mean and covariance")
    if n < 2 or not is_covariance(cov.numpy()):
        raise click.ClickException(f"{path}: sigma is no covariance of two images or more")
    if len(mean) != features.dims:
        raise click.ClickException(
            f"{path} has {len(mean)} features and the {features.name} network {features.dims}: it is of another network"
        )
    for key, ours in (("network", features.hash), ("resize", features.resize)):
        if str(stats.get(key, ours)) != ours:
            raise click.ClickException(f"{path} was made with {key} {stats[key]}, here it is {ours}: make it again")
    return Moments(n, mean, cov * (n - 1)), "network" in stats  # back from covariance to scatter


# ---------------------------------------------------------------------------------------------------------------------
# t-SNE and Chamfer distance.


def neighbourhoods(d: Tensor, first: int, perplexity: float) -> None:
    """Turn squared distances [rows, N] of the points from `first` on into their neighbourhoods, rows of sum 1, in place.

    What ops.tsne_neighbourhoods computes without temporaries. The width of each neighbourhood is found by Newton's method
    on its entropy to 1e-5, kept in brackets by bisection.
    """
    target = math.log(perplexity)
    own = (torch.arange(len(d), device=d.device), torch.arange(first, first + len(d), device=d.device))
    # Only differences count: from the nearest at 0 on, exp() neither overflows nor loses all its terms.
    d[own] = torch.inf
    d -= d.amin(1, keepdim=True)
    d[own] = 0
    # Start where the mean distance counts as one. 1e-30: log(0) is infinite, where all points are one.
    log_beta = -d.mean(1, keepdim=True).clamp(min=1e-30).log()
    low, high = log_beta - 40, log_beta + 40  # a factor of 10^17 either way
    for _ in range(60):  # enough for bisection alone; Newton's method takes a handful
        beta = log_beta.clamp(max=80).exp()  # exp(89) overflows: where all points are one
        e = torch.exp(-beta * d)
        e[own] = 0
        total = e.sum(1, keepdim=True)
        ed = e.div_(total) * d
        mean = ed.sum(1, keepdim=True)
        gap = total.log() + beta * mean - target  # entropy minus what it should be
        found = gap.abs() < 1e-5  # scikit-learn's tolerance
        if found.all():
            break
        # Too much entropy: the neighbourhood has to shrink, so beta has to grow.
        low, high = torch.where(gap > 0, log_beta, low), torch.where(gap > 0, high, log_beta)
        # By log(beta) the entropy falls at the rate beta^2 var(d). Steps above 1 would go beyond where that holds.
        variance = ed.mul_(d).sum(1, keepdim=True) - mean.square()
        step = log_beta + (gap / (beta.square() * variance)).clamp(-1, 1)
        step = torch.where((step > low) & (step < high), step, (low + high) / 2)
        log_beta = torch.where(found, log_beta, step)  # a found row stays, however long others take
    d.copy_(e)


def affinities(x: Tensor, perplexity: float, block: int = 1024) -> Tensor:
    """P of t-SNE, symmetric float32 [N, N] with sum 1: Gaussian neighbourhoods of the given perplexity in x [N, D]."""
    n = len(x)
    # Distances come from a matrix product, which loses digits where all points are far from 0.
    x = x.float() - x.float().mean(0)
    square = x.square().sum(1)
    p = torch.empty(n, n, device=x.device)  # distances first, then neighbourhoods, then P
    for a in range(0, n, block):
        d = torch.addmm(square[a : a + block, None] + square, x[a : a + block], x.T, alpha=-2, out=p[a : a + block])
        (tsne_neighbourhoods or neighbourhoods)(d.clamp_(min=0), a, perplexity)  # rounding makes some negative
    for a in range(0, n, block):  # P = (P + P^T) / 2N in place
        for b in range(a, n, block):
            both = (p[a : a + block, b : b + block] + p[b : b + block, a : a + block].T) / (2 * n)
            p[a : a + block, b : b + block] = both
            p[b : b + block, a : a + block] = both.T
    return p.clamp_(min=torch.finfo(torch.float64).eps)  # scikit-learn's floor


def forces(p: Tensor, y: Tensor, dims: int, block: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of one t-SNE iteration, by blocks of rows: what ops.tsne_forces computes without temporaries.

    p float32 [N, N], y float32 [3, N] (the third row 0 in the plane). With d = y_i - y_j, w = 1 / (1 + |d|^2/v) and
    q = w^((v+1)/2), returns sum_j p w d and sum_j q w d of every point i, both [3, N], and the sum of q over all pairs.
    """
    points, v = y.T.contiguous(), max(dims - 1, 1)
    attract, repel, total = torch.empty_like(points), torch.empty_like(points), 0.0
    for a in range(0, len(points), block):
        own = points[a : a + block]
        w = torch.cdist(own, points, compute_mode="donot_use_mm_for_euclid_dist")  # exact for close pairs too
        w = w.square_().div_(v).add_(1).reciprocal_()
        q = w * w.sqrt() if dims == 3 else w  # w^((v + 1) / 2): v is 2 in space, 1 in the plane
        total = total + q.sum(dtype=torch.float64) - len(own)  # q of a point with itself is 1
        for out, weight in ((attract, p[a : a + block] * w), (repel, q * w)):
            out[a : a + block] = weight.sum(1, keepdim=True) * own - weight @ points
    return attract.T.contiguous(), repel.T.contiguous(), total


def tsne(x: Tensor, dims: int = 3, perplexity: float = 30.0, iterations: int = 1000) -> Tensor:
    """Exact t-SNE (van der Maaten and Hinton 2008) with the settings and the schedule of scikit-learn's exact method.

    x float [N, D] on the device to compute on -> float32 [N, dims], dims 2 or 3. Kernel (1 + d^2/v)^(-(v+1)/2), v = dims
    - 1. From the principal components, so nothing is drawn; learning rate max(N/48, 50); 250 iterations of early
    exaggeration 12 at momentum 0.5, the rest at 0.8; gains +0.2 and x0.8, at least 0.01.
    Memory: 4 N^2 bytes. Raises ValueError for too few points.

    In the plane it finds the minima that scikit-learn finds. In 3-D that library moves points by what is not the gradient
    of KL(P || Q), and ends at a higher divergence, with distances several times as large: the two have other scales.
    """
    n = len(x)
    if n <= perplexity:
        raise ValueError(f"t-SNE of perplexity {perplexity:g} needs more than {perplexity:g} points, got {n}")
    p = affinities(x, perplexity)
    y = torch.zeros(3, n, device=x.device)  # in the plane the third row stays 0
    centred = (x - x.mean(0)).double()
    # Eigenvalues ascend: the last vectors are the first principal components.
    vectors = torch.linalg.eigh(centred.T @ centred)[1][:, -dims:].flip(1)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # as scikit-learn's
    y[:dims] = (centred @ vectors).T
    # scikit-learn's first scale. 1e-30: where all points are one, they stay at 0.
    y *= 1e-4 / y[0].std(correction=0).clamp(min=1e-30)
    # n / 48 = n / exaggeration / 4: scikit-learn's "auto" (Belkina et al. 2019). v: degrees of freedom.
    rate, v = max(n / 48, 50.0), max(dims - 1, 1)
    step = tsne_forces or forces
    # These, and the 0.8, 0.2, 0.01, 50 and 1e-7 below, are scikit-learn's.
    exaggeration, momentum, end = 12.0, 0.5, 250
    gains, velocity = torch.ones_like(y), torch.zeros_like(y)
    for i in tqdm(range(iterations), desc=f"t-SNE of {n:,} points", unit="it", leave=False, dynamic_ncols=True):
        if i == end:
            exaggeration, momentum = 1.0, 0.8
            # scikit-learn's second phase starts its gains and its velocity anew.
            gains, velocity = torch.ones_like(y), torch.zeros_like(y)
        attract, repel, total = step(p, y, dims)
        # Exaggeration multiplies P, and so the attraction alone.
        gradient = (attract.mul_(exaggeration) - repel.div_(total)).mul_(2 * (v + 1) / v)
        # The velocity goes against the gradient, so a negative product means that the two still agree.
        gains = torch.where(velocity * gradient < 0, gains + 0.2, gains * 0.8).clamp_(min=0.01)
        gradient *= gains
        velocity = momentum * velocity - rate * gradient
        y = y + velocity
        if i % 50 == 49 and i < end and gradient.norm() <= 1e-7:
            end = i + 1  # exaggeration pulls some data into one point: let go before it is lost to rounding
    return y[:dims].T.contiguous()


def chamfer(a: Tensor, b: Tensor, block: int = 1024) -> tuple[float, float]:
    """Chamfer distance of two clouds [N, D], [M, D] in both conventions.

    First PyTorch3D's (Ravi et al. 2020): mean squared distance to the nearest point of the other cloud, both directions
    added. Second the sum of squared distances from a to its nearest in b.
    """

    def nearest(a: Tensor, b: Tensor) -> Tensor:
        # By differences: a matrix product would lose the distances of close points, which are the ones that count.
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cat([torch.cdist(part, b, compute_mode=exact).amin(1) for part in a.split(block)]).square()

    rows, columns = nearest(a.double(), b.double()), nearest(b.double(), a.double())
    return (rows.mean() + columns.mean()).item(), rows.sum().item()


def perplexity_of(points: int) -> float:
    """t-SNE's perplexity for `points` a side: 30, or of fewer than 91 points a third of them."""
    # 30: scikit-learn's default. (n - 1) / 3: the most that van der Maaten's own t-SNE allows for n points. Both sides
    # together have twice as many, and so stay well below it.
    return min(30.0, (points - 1) / 3)


def tsne_chamfer(real: Tensor, other: Tensor, seed: int, device: torch.device | str, published: bool = False) -> float:
    """Chamfer distance of two sets of features [N, D] in the 3-D t-SNE of both: mean squared distances, both ways added.

    published: as the published code has it, by scikit-learn's t-SNE with the defaults of that time (Barnes-Hut, from
    points drawn by the seed) on the CPU, the sum from real to other. Without it the seed has no effect, since our t-SNE
    starts from principal components: for a spread, draw other images. Raises click.ClickException without scikit-learn.
    """
    # One t-SNE of both sets: two of them would share no axes.
    x, perplexity = torch.cat([real, other]), perplexity_of(min(len(real), len(other)))
    if published:
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            raise click.ClickException("chamfer_sum needs scikit-learn: pip install scikit-learn") from None
        # scikit-learn's defaults up to version 1.1; later ones start from principal components, at another rate.
        how = {"init": "random", "learning_rate": 200.0, "random_state": seed, "n_jobs": torch.get_num_threads()}
        y = torch.from_numpy(TSNE(3, perplexity=perplexity, **how).fit_transform(x.cpu().numpy()))
    else:
        y = tsne(x.to(device), perplexity=perplexity)
    mean, total = chamfer(y[: len(real)], y[len(real) :])
    return total if published else mean


# ---------------------------------------------------------------------------------------------------------------------
# Processes, one pass over a source, and what takes passes of its own.


@dataclass
class World:
    """This process, of how many; its device; images at once."""

    device: torch.device
    rank: int = 0
    size: int = 1
    batch: int = 64

    def gather(self, value) -> list:
        """The values of all processes in the order of their ranks, everywhere."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def joined(self, stream):
        """The streams of all processes (Moments, InceptionScore) as one."""
        whole, *others = self.gather(stream)
        for other in others:
            whole.join(other)
        return whole

    def first(self, action: Callable[[], object]) -> None:
        """Run something on the first process only, the others waiting; its error for the user is raised on all."""
        error = None
        if self.rank == 0:
            try:
                action()
            except click.ClickException as e:
                error = e.message
        if error := self.gather(error)[0]:
            raise click.ClickException(error)

    def scan(self, source, network: Callable, what: str) -> Iterator[tuple[np.ndarray, object]]:
        """network(images) for the blocks of a source that are this process's, with the images' indices."""
        n, b = len(source), self.batch
        # Every size-th block: the processes' shares differ by one block at most.
        blocks = [np.arange(i, min(i + b, n)) for i in range(0, n, b)][self.rank :: self.size]
        total = sum(map(len, blocks))
        with tqdm(total=total, desc=what, unit="img", leave=False, dynamic_ncols=True, disable=self.rank > 0) as bar:
            for block, images in zip(blocks, source.batches(blocks), strict=True):
                yield block, network(images)
                bar.update(len(block))

    def in_order(self, parts: dict[int, Tensor]) -> Tensor:
        """Join the blocks {first index: tensor} of all processes."""
        for others in self.gather(parts):
            parts = parts | others
        return torch.cat([parts[i] for i in sorted(parts)])


def start(device: str, batch: int) -> World:
    """Choose the device, join the processes of torchrun. Raises click.ClickException for a device that is not there."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError("neither a CPU nor a CUDA device")
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # torchrun's: a GPU for each process
        torch.empty(1, device=chosen)  # only memory on it shows that it works
    # AssertionError: so says a PyTorch that was built without CUDA.
    except (RuntimeError, AssertionError, ValueError, OverflowError) as error:
        raise click.ClickException(f"--device {device}: {str(error).splitlines()[0]}") from None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.allow_tf32 = False  # features must agree to 1e-4 with other code
    if size > 1 and not dist.is_initialized():
        # For objects on CPUs: NCCL would send their pickles by way of the GPUs.
        dist.init_process_group("gloo")
    return World(chosen, rank, size, batch)


def measure(source, features: Callable, world: World, what: str, score: bool = False, keep: bool = False):
    """One pass over a source: Moments, and if wanted InceptionScore and all features [N, D] (else None)."""
    moments, kept, scores = Moments(), {}, InceptionScore(len(source)) if score else None
    for index, (f, log_p) in world.scan(source, features, what):
        moments.add(f)
        if score:
            scores.add(index, log_p)
        if keep:
            kept[index[0]] = f.cpu()  # by the first image's index: `in_order` sorts by it
    if moments.n:  # sent from a GPU, they would arrive on that same one in every process
        moments = Moments(moments.n, moments.mean.cpu(), moments.scatter.cpu())
    joined = world.joined(moments), world.joined(scores) if score else None
    return *joined, world.in_order(kept) if keep else None


def imagenet_inception(file: str | None, world: World) -> nn.Module:
    """torchvision's Inception v3 with the 1,000 classes of ImageNet, for IS as published."""

    def build(weights: dict[str, Tensor]) -> nn.Module:
        # The file has the auxiliary classifier, which eval mode leaves out. Images come in [-1, 1], as published.
        net = torchvision.models.inception_v3(weights=None, init_weights=False, transform_input=False)
        load_weights(net, weights)
        return net.eval()

    # One process downloads, and the others find the file.
    world.first(lambda: file or published_weights(IMAGENET_URL, "--imagenet-inception"))
    return inception_network(file, IMAGENET_URL, "--imagenet-inception", build)[0].to(world.device)


def measure_is_published(images, net: nn.Module, world: World) -> dict:
    """IS as the paper has it: of the images of a source, in one split, by `imagenet_inception`.

    Images in [-1, 1] go in as they are, bilinearly resized to 299 px.
    """

    @torch.inference_mode()
    def classes(images: Tensor) -> Tensor:
        # "torch" is what the published code's nn.Upsample does.
        return net(resize(images.to(world.device), "torch")).double().log_softmax(1)

    score = InceptionScore(len(images), splits=1)  # as published
    for index, log_p in world.scan(images, classes, "IS as published"):
        score.add(index, log_p)
    return {"is_published": world.joined(score).value()[0], "is_published_n": len(images)}


def measure_chamfer(name: str, clouds: Callable, seeds: Sequence[int], points: int, world: World) -> dict:
    """t-SNE Chamfer distance over seeds: mean and standard deviation (of a sample), keyed as in the JSON file.

    name: 'chamfer', or 'chamfer_sum' for the published one, which may change with the number of threads, in whose order
    scikit-learn adds. clouds(points, seed) draws features [points, D] of real images, of those to score, and of other
    real ones or None: these give the floor, the same number between two sets of real images.
    """
    # Drawn for all seeds ahead, since a run's processes embed the images of each seed together.
    published, drawn = name == "chamfer_sum", {seed: clouds(points, seed) for seed in seeds}
    if published and world.rank == 0:
        click.echo(f"t-SNE of {2 * points:,} points by scikit-learn, {2 * len(seeds)} times: minutes", err=True)
    values, floors = {}, {}
    for seed in seeds[world.rank :: world.size]:  # the t-SNEs of different seeds go to different processes
        real, images, other = drawn[seed]
        values[seed] = tsne_chamfer(real, images, seed, world.device, published)
        if other is not None:
            floors[seed] = tsne_chamfer(real, other, seed, world.device, published)
    for v, f in world.gather((values, floors)):
        values, floors = values | v, floors | f
    results: dict = {"_n": points, "_values": [values[seed] for seed in seeds]}
    for key, found in (("", values), ("_floor", floors)):
        if found:
            results[key] = float(np.mean([*found.values()]))
        if len(found) > 1:  # one seed has no spread
            results[f"{key}_std"] = float(np.std([*found.values()], ddof=1))
    return {name + key: value for key, value in results.items()} | {"seeds": [*seeds]}


def draw_clouds(real: Tensor, images: Tensor, points: int, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """`points` of the features of each of two sets; others of `real`, where there are enough of them, for the floor."""
    draw = np.random.default_rng([seed, 4])  # the second number keeps draws for other purposes apart
    images, real = (f[draw.permutation(len(f))[: 2 * points]] for f in (images, real))
    return real[:points], images[:points], real[points:] if len(real) == 2 * points else None


# ---------------------------------------------------------------------------------------------------------------------
# The command.

# How much is looked at by default: on a GPU what is usual, on a CPU what takes some minutes. num: images a side for FID,
# IS and KID, with Inception `inception`; points: images a side for chamfer, seeds: of it; control: images for attribute
# control and information; each: images of one y for diversity; judge: its training steps; imagenet: images for
# is_published.
# 50,000 is usual for FID since Heusel et al. 2017. 6,400 (200 batches of 32) and 100,000 are the published code's.
AMOUNTS = {
    "gpu": dict(num=50_000, inception=50_000, points=6400, seeds=5, control=20_000, each=500, judge=4000, imagenet=100_000),
    "cpu": dict(num=5000, inception=1000, points=500, seeds=3, control=1500, each=100, judge=1500, imagenet=100_000),
    "smoke": dict(num=64, inception=64, points=64, seeds=1, control=60, each=8, judge=8, imagenet=64),
}  # fmt: skip


def import_trained(option: str):
    """trained.py, which an option needs and a copy of this file alone has not got: so it is not imported at the top."""
    try:
        import trained
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{option} needs {error.name}.py beside metrics.py") from None
    return trained


def choose_features(options: dict, steps: int, run, world: World):
    """The feature network for FID, IS, KID, precision and recall, by --features. steps: of the judge's training."""
    option, inception, seed = options["features"], options["inception"], options["seed"]
    if option in ("encoder", "judge") and run is None:
        raise click.UsageError(f"--features {option} needs --network; two folders take inception or FILE")
    if option in ("encoder", "judge"):
        return run.own_features(option, steps, seed)
    if option not in ("auto", "inception"):
        if not os.path.isfile(option):
            raise click.UsageError(
                f"--features {option}: there is no such file; else auto, inception, judge or encoder"
            )
        return import_trained(f"--features {option}").features_of(option, world.device)
    try:
        if inception is None:
            world.first(lambda: published_weights(WEIGHTS_URL, "--inception"))
        features = InceptionFeatures(inception, options["resize"] or "torch", world.device)
    except click.ClickException as error:
        if option == "inception" or inception or run is None:  # asked for by name, or nothing to take instead
            raise
        features = run.judge(steps, seed) or run.features
        if features is None:
            raise
        if world.rank == 0:
            who = "an independent judge" if features.name == "judge" else "the run's own encoder"
            click.echo(f"Warning: FD and KD through {who} in place of FID and KID: {error.message}", err=True)
        return features
    if not features.published and world.rank == 0:
        click.echo(
            f"Warning: {inception} is not the published weight file: its numbers compare with no others", err=True
        )
    return features


def measure_fidelity(options: dict, amounts: dict, need: set, run, world: World, notes: list[str]) -> dict:
    """Frechet and kernel distance, IS, precision and recall, the spectrum, and for two folders Chamfer.

    need: which of them. What the user should know of the results is added to `notes`.
    """
    num, seed, reference = options["num"], options["seed"], options["reference"] or ""
    features = choose_features(options, amounts["judge"], run, world)
    results: dict = {"features": features.name, "features_hash": features.hash, "resize": features.resize}
    if options["save_stats"] and features.name == "judge":
        raise click.UsageError(JUDGE_STATS)
    if options["features"] not in ("auto", "inception", "judge", "encoder"):
        results["features_file"] = options["features"]
    if run:
        if run.protocol == "paper" and not options["smoke"]:
            num = num or len(run.train)  # as many generated as real images
        num = num or amounts["inception" if features.name == "inception" else "num"]
        images, real = run.sides(num, seed)
        results["reference"] = f"{len(real):,} of {len(run.train):,} training images"
    else:
        num = num or (amounts["num"] if options["smoke"] else None)  # None: all of a folder
        how = (features.prepare, num, seed, options["max_pixels"])
        images = Folder(options["images"], *how)
        real = Folder(reference, *how) if reference and not is_stats(reference) else None
        if real is None and need & {"kid", "pr", "chamfer"}:
            raise click.UsageError(
                "kid, pr and chamfer need a folder as --reference: statistics hold no single features"
            )
    if features.name == "encoder" and features.classifier is None and "is" in need:
        if options["metrics"]:
            raise click.UsageError(
                "--metrics is: it needs class probabilities, and there is no classifier with this encoder"
            )
        notes.append("no IS: it needs class probabilities, and there is no classifier with this encoder")
        need = need - {"is"}
    if len(images) < 10 and "is" in need and not options["metrics"]:
        notes.append(f"no IS: it needs at least 10 images, one per split; there are {len(images)}")
        need = need - {"is"}
    if "is" in need and len(images) < 1000:
        # q is the mean of its split's p, so p <= n q: KL is at most log n, for the n images of a split and one attribute.
        several = run and run.kind == "multi-label" and features.name != "inception"
        limit = "" if several else f" is at most {-(-len(images) // 10)}, as many as a split has"
        notes.append(f"IS of {len(images)} images{limit}: compare it at equal n only")
    if "kid" in need:
        fewest = min(len(images), len(real))
        subset = options["kid_subset"] or min(1000, fewest)  # 1,000 as torch-fidelity
        if subset > fewest:
            raise click.UsageError(f"--kid-subset {subset} must be at most the {fewest} images there are")
    if "chamfer" in need:
        points = min(options["points"] or amounts["points"], len(images), len(real))
        if points < FEWEST:
            why = f"its t-SNE needs at least {FEWEST} images a side, there are {points}"
            if options["metrics"]:
                raise click.ClickException(f"no Chamfer distance: {why}")
            notes.append(f"no Chamfer distance: {why}")
            need = need - {"chamfer"}
        else:
            notes.extend(few_points(points))
            if points == len(images) == len(real):
                notes.append("Chamfer distance: every t-SNE has all images: its spread over seeds is that of rounding")
            world = replace(world, batch=64)  # as for runs: t-SNE makes more of the rounding

    # One pass over each side, or the statistics of one.
    compared = need - {"is"}
    if compared and real is None:
        theirs, named = load_stats(reference, features)  # first: a wrong file ends the command before the pass
        if not named:
            notes.append(f"{reference} does not name its network and resize: assumed to be the ones used here")
        results |= {"n_reference": theirs.n} if theirs.n < 10**9 else {}  # files of pytorch-fid do not say it
    keep = bool(need & {"kid", "pr", "chamfer"})  # FID and IS need sums alone
    spectra = [import_trained("--metrics spectrum").Spectrum() for _ in range(2)] if "spectrum" in need else []
    look, look_real = [spectrum.watch(features) for spectrum in spectra] or [features, features]
    what = "generated" if run else "images"
    moments, scores, kept = measure(images, look, world, what, "is" in need, keep)
    results["n"] = moments.n
    if "is" in need:
        results["is"], results["is_std"] = scores.value()
    if compared and real is not None:
        theirs, _, kept_real = measure(real, look_real, world, "reference", keep=keep)
        if options["save_stats"]:
            world.first(lambda: save_stats(Path(options["save_stats"]), theirs, features))
        results["n_reference"] = theirs.n

    # The distances.
    if "fid" in need:
        name, n = "fid" if features.name == "inception" else "fd", min(moments.n, theirs.n)
        try:
            results[name] = frechet_distance(*moments.gaussian(), *theirs.gaussian())
        except ValueError as error:
            raise click.ClickException(f"no {name.upper()}: {error} in the features of these images") from None
        if n <= features.dims:
            notes.append(f"{n:,} images for {features.dims:,} features: the covariance is singular and {name.upper()} "
                         "comes out too high; compare it at equal n only")  # fmt: skip
    if "kid" in need:
        name = "kid" if features.name == "inception" else "kd"
        mean, std = kernel_distance(kept, kept_real, subset)
        results |= {name: mean, f"{name}_subset": subset}
        if subset < max(len(kept), len(kept_real)):  # else all subsets are the same
            results[f"{name}_std"] = std
    if "pr" in need:
        n = results["pr_n"] = min(MOST, len(kept), len(kept_real))  # both sides alike: both numbers depend on it
        # Drawn, since the first images of a folder may all be of one class.
        parts = (
            f[np.random.default_rng([seed, 7]).permutation(len(f))[:n]].to(world.device) for f in (kept_real, kept)
        )
        try:
            results["precision"], results["recall"] = precision_recall(*parts)
        except ValueError as error:
            raise click.ClickException(f"no precision and recall: {error}") from None
    if "spectrum" in need:
        fake, true = (world.joined(spectrum).nyquist() for spectrum in spectra)
        # b = 0: real images without any power at that frequency, so there is no ratio to it.
        results |= {f"nyquist_{way}": a / b for way, a, b in zip("hv", fake, true, strict=True) if b > 0}
    if "chamfer" in need:
        seeds = range(seed, seed + (options["seeds"] or amounts["seeds"]))
        results |= measure_chamfer("chamfer", partial(draw_clouds, kept_real, kept), seeds, points, world)
    folders = [source for source in (images, real) if isinstance(source, Folder)]
    sizes = [set().union(*world.gather(source.sizes)) for source in folders]
    for source, found in zip(folders, sizes, strict=True):
        if len(found) > 1:
            notes.append(f"{source.path} has images of {len(found)} sizes: each is resized from its own")
    if len(folders) == 2 and compared and sizes[0] != sizes[1]:
        notes.append("the two folders have images of different sizes: their sharpness alone tells them apart")
    return results


def few_points(points: int) -> list[str]:
    """What to say of a t-SNE of `points` a side, if these are few."""
    if perplexity_of(points) == 30:
        return []
    return [f"Chamfer distance of {points} points a side: perplexity {perplexity_of(points):.0f} in place of 30; "
            "compare it at equal numbers of points only"]  # fmt: skip


def evaluate(options: dict, world: World) -> dict:
    """Run the command with its options; returns the results, keyed as in the JSON file."""
    began, seed, notes, run = time.time(), options["seed"], [], None
    if options["network"]:
        run = import_trained("--network").TrainedRun(options["network"], world, options["data"])
        run.protocol = options["protocol"] or run.protocol
    wanted = options["metrics"]
    possible = run.possible(METRICS) if run else OF_FOLDERS
    for name in wanted:
        if name not in possible:
            raise click.UsageError(f"--metrics {name} needs {run.lacks() if run else '--network'}")
    need = set(wanted or possible)
    if run:
        need = run.choose(need, not wanted, FEWEST, notes)
    elif not wanted and is_stats(options["reference"] or ""):
        need -= {"kid", "pr", "chamfer"}  # which need single features
    amounts = AMOUNTS["smoke" if options["smoke"] else "cpu" if world.device.type == "cpu" else "gpu"]
    if "is_published" in need:  # looked for now, since the other metrics take long
        try:
            imagenet = imagenet_inception(options["imagenet_inception"], world)
        except click.ClickException as error:
            if wanted or options["imagenet_inception"]:
                raise
            notes.append(f"no IS as published: {error.message}")
            need = need - {"is_published"}
    results: dict = {key: options[key] for key in ("network", "images", "reference") if options[key]}
    results |= {"seed": seed, "processes": world.size, "device": world.device.type}
    results |= {"protocol": run.protocol} if run else {}
    results |= {"encoder_hash": run.features.hash} if run and run.features else {}

    in_pass = need & ({"fid", "is", "kid", "pr", "spectrum"} | (set() if run else {"chamfer"}))  # a run's has its own
    if in_pass:
        results |= measure_fidelity(options, amounts, in_pass, run, world, notes)
    if run:
        seeds = range(seed, seed + (options["seeds"] or amounts["seeds"]))
        for name in [m for m in ("chamfer", "chamfer_sum") if m in need]:
            # A sum grows with the number of points, so as many as published, where there are enough images.
            points = 6400 if name == "chamfer_sum" and not options["smoke"] else amounts["points"]
            points = min(options["points"] or points, len(run.train) // 2)  # the other half is for the floor
            notes.extend(note for note in few_points(points) if note not in notes)
            results |= measure_chamfer(name, run.clouds, seeds, points, world)
        if "is_published" in need:
            images = run.generated(options["num"] or amounts["imagenet"], seed)
            results |= measure_is_published(images, imagenet, world)
        results |= run.ask(need, options["num"] or amounts["control"], seed, amounts, notes)
    return results | {"seconds": round(time.time() - began, 1)} | ({"notes": notes} if notes else {})


# Lines of the report: key, name, number, remark.
LINES = (
    ("fid", "FID", "{:.4f}", "lower is better"),
    ("fd", "FD", "{:.4f}", "lower is better; {by} in place of Inception"),
    ("is", "IS", "{:.4f}", "+- {is_std:.4f} over 10 splits; class probabilities of the network above"),
    ("is_published", "IS as published", "{:.4f}", "ImageNet's classes, {is_published_n:,} images, one split"),
    ("kid", "KID", "{:.6f}", "{kid_spread}"),
    ("kd", "KD", "{:.6f}", "{kd_spread}; kernel distance, unbiased"),
    ("precision", "precision", "{:.4f}", "share of generated images inside the real manifold, {pr_n:,} + {pr_n:,}"),
    ("recall", "recall", "{:.4f}", "share of real images inside the generated manifold"),
    ("nyquist_h", "Nyquist power across", "{:.2f}", "times that of the real images: far above 1 is a checkerboard"),
    ("nyquist_v", "Nyquist power down", "{:.2f}", ""),
    ("chamfer", "t-SNE Chamfer", "{:.3f}", "{spread[chamfer]}mean squared distance to the nearest, both ways, {chamfer_n:,} + {chamfer_n:,} images, seeds {seeds}{own}"),
    ("chamfer_floor", "  real against real", "{:.3f}", "{spread[chamfer_floor]}"),
    ("chamfer_sum", "t-SNE Chamfer, sum", "{:.1f}", "{spread[chamfer_sum]}real to generated, {chamfer_sum_n:,} + {chamfer_sum_n:,} images, seeds {seeds}"),
    ("chamfer_sum_floor", "  real against real", "{:.1f}", "{spread[chamfer_sum_floor]}"),
    ("accuracy", "control accuracy", "{:.2%}", "by the run's own classifier, {accuracy_n:,} images{chance}"),
    ("accuracy_published", "", "{:.2%}", "as published: attribute on only, probability above 0.2"),
    ("accuracy_exact", "", "{:.2%}", "all attributes of an image at once"),
    ("accuracy_judge", "", "{:.2%}", "by an independent judge, right on {judge_real:.2%} of {judge_real_n:,} real images held out, weighed alike"),
    ("diversity", "diversity within one y", "{:.3f}", "of real images {diversity_real:.3f}, over {diversity_n:,} images{own}"),
    ("mi_encoder_bits", "I(X;E)     eq. (1)", "{:.3f}", "bits at least, InfoNCE in training"),
    ("h_y_bits", "H(Y)", "{:.3f}", "bits, the ceiling of the next two"),
    ("mi_real_bits", "I(Y;E)     eqs. (2)-(3)", "{:.3f}", "bits at least, {mi_real_n:,} real validation images"),
    ("mi_generated_bits", "I(Y;E~)    eqs. (4)-(5)", "{:.3f}", "bits at least, {information_n:,} generated images"),
    ("jsd_bits", "JSD(x, x~) eqs. (6)-(7)", "{:.3f}", "bits at least, by the discriminator in training"),
)  # fmt: skip


def report(r: dict) -> str:
    """The results as text, for a run with the table of its attribute control."""
    lines = [r.get("network") or " against ".join(r[side] for side in ("images", "reference") if side in r)]
    if "features" in r:
        against = f", against {r['reference']}" if "network" in r else ""
        if "network" not in r and "n_reference" in r:
            against = f" against {r['n_reference']:,}"
        file = f" of {r['features_file']}" if "features_file" in r else ""
        if "network" in r and r["features"] == "encoder" and not file:
            file = " of the run, through which its generator was trained"
        lines.append(
            f"features: {r['features']}{file}, resize: {r['resize']}, seed: {r['seed']}, n: {r['n']:,}{against}"
        )
    words = {"by": "by an independent judge" if r.get("features") == "judge" else "by an encoder"}
    words["chance"] = f"; chance {r['accuracy_chance']:.0%}" if "accuracy_chance" in r else ""
    for key in {"kid", "kd"} & r.keys():
        std, of = r.get(f"{key}_std"), f"{r[f'{key}_subset']:,}"
        words[f"{key}_spread"] = f"of all {of}" if std is None else f"+- {std:.6f} over 100 overlapping subsets of {of}"
    words["spread"] = {key: f"+- {r[f'{key}_std']:.3f}; " if f"{key}_std" in r else "" for key, *_ in LINES}
    words["own"] = ", in the run's own encoder" if "network" in r else ""
    for key, name, form, more in LINES:
        if key in r:
            lines.append(f"  {name:25s}{form.format(r[key]):>12s}  {more.format(**r, **words)}".rstrip())
    lines += [f"  note: {note}" for note in r.get("notes", [])]
    if "accuracy" in r:
        lines += ["", *import_trained("--network").control_table(r)]
    return "\n".join(lines)


def metric_names(context: click.Context, option: click.Parameter, text: str | None) -> list[str]:
    """'fd, is' -> ['fid', 'is'], '' -> []. Raises click.UsageError for a name that there is not."""
    names = [name.strip() for name in text.split(",")] if text else []
    names = list(dict.fromkeys({"fd": "fid", "kd": "kid"}.get(name, name) for name in names))
    for name in names:
        if name not in METRICS:
            raise click.UsageError(f"--metrics: no {name!r}; choose from {', '.join(METRICS)}")
    return names


# fmt: off
OPTIONS = [
    click.Option(["--network"], metavar="FILE", multiple=True, help="A run's gan.pt, scored against its training images; several times: a table of runs."),
    click.Option(["--data"], metavar="PATH", help="The run's images, if they have moved."),
    click.Option(["--images"], metavar="DIR", help="Folder of images to score without a run."),
    click.Option(["--reference"], metavar="DIR|NPZ", help="What to score --images against: a folder, or statistics."),
    click.Option(["--metrics"], metavar="A,B,...", callback=metric_names, help=f"Some of {', '.join(METRICS)}.  [default: those that apply, is_published and chamfer_sum with --protocol paper only]"),
    click.Option(["--json", "json_file"], metavar="FILE", help="Write the results as one JSON object (several runs: keyed by file)."),
    click.Option(["--features"], metavar="auto|inception|judge|encoder|FILE", default="auto", help="Network of FID, IS, KID and pr. judge: trained on the real images alone; encoder: the run's own, which the generator was trained through; FILE: of that encoder.pt or gan.pt. auto: Inception if its weights are there or can be fetched, else the judge, else the encoder."),
    click.Option(["--inception"], metavar="FILE", help="The Inception weights, if not to be downloaded."),
    click.Option(["--imagenet-inception"], metavar="FILE", help="Weights of torchvision's Inception v3, for is_published, if not to be downloaded."),
    click.Option(["--protocol"], type=click.Choice(["paper", "ours"]), help="paper: FID of as many generated as real images, IS, Chamfer and control accuracy as published.  [default: the run's]"),
    click.Option(["--resize"], type=click.Choice(["torch", "tf", "clean"]), help="To 299 px for Inception, as pytorch-fid, torch-fidelity or clean-fid does.  [default: torch]"),
    click.Option(["--num"], metavar="N", type=click.IntRange(2, 10**7), help="Images a side; also those of accuracy, information and is_published.  [default: folders all; runs 50,000, on CPUs 5,000, with Inception 1,000]"),
    click.Option(["--points"], metavar="N", type=click.IntRange(FEWEST, 25_000), help="Images a side for Chamfer, at most half the training images and 25,000: t-SNE's affinities are 10 GB then.  [default: 6,400; chamfer on CPUs 500]"),
    click.Option(["--kid-subset"], metavar="N", type=click.IntRange(2, 10**5), help="Images in a subset of KID.  [default: 1,000, or all if fewer]"),
    click.Option(["--max-pixels"], metavar="N", type=click.IntRange(1), default=MAX_PIXELS, help="Largest picture that is read; memory grows with it."),
    click.Option(["--save-stats"], metavar="NPZ", help="Keep the statistics of the reference here."),
    click.Option(["--seed"], metavar="N", type=click.IntRange(0, 2**31), default=0, help="Seed of everything random, except the subsets of KID and the splits of IS, which are torch-fidelity's."),
    click.Option(["--seeds"], metavar="N", type=click.IntRange(1, 1000), help="Seeds of Chamfer, from --seed on.  [default: 5, on CPUs 3]"),
    click.Option(["--batch"], metavar="N", type=click.IntRange(1, 2**16), default=64, help="Images at once; changes results by rounding only."),
    click.Option(["--device"], metavar="DEVICE", default="auto", help="cpu, cuda, cuda:1; auto: cuda if there is one."),
    click.Option(["--smoke"], is_flag=True, help="A run of seconds that takes every code path; its results mean nothing."),
]
# fmt: on


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Within it, errors about options and files become one line, without the usage that click prints above them."""
    # The inner try makes click's errors of the others; the outer one cuts the text of all to one line.
    try:
        try:
            yield
        except click.UsageError as error:
            raise click.UsageError(error.format_message()) from None
        except BrokenPipeError:  # the reader has seen enough, as `head` does: click ends without a word
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{where}{error.strerror or error}") from None
    except click.ClickException as error:
        # Names come from anywhere, and may hold control characters, or be as long as a page.
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in error.message)
        # The middle goes: what is wrong stands at the beginning, what to do about it at the end.
        error.message = text if len(text) < 500 else f"{text[:250]} ... {text[-200:]}"
        raise


class OneLine(click.Command):
    """A command that reports errors by `one_line`."""

    def make_context(self, *arguments, **options) -> click.Context:
        with one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context) -> object:
        with one_line():
            return super().invoke(context)


@click.command(
    cls=OneLine,
    params=OPTIONS,
    # \b: click leaves the lines of the next paragraph, the commands, as they are.
    help=__doc__.replace("\n\n", "\n\n\b\n", 1),
    context_settings=dict(max_content_width=120, show_default=True),
)
def main(network: tuple[str, ...], json_file: str | None, **options) -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as some schedulers start jobs
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # names of files must not end a run in an ASCII terminal
        with contextlib.suppress(AttributeError, ValueError):  # notebooks put streams of their own there
            stream.reconfigure(errors="backslashreplace")
    # Errors in options and file names are reported first: before processes join and anything is measured.
    if bool(network) == bool(options["images"]) or bool(network and options["reference"]):
        raise click.UsageError("give either --network FILE, or --images DIR and --reference DIR|NPZ")
    for name in ("data", "protocol"):
        if options[name] and not network:
            raise click.UsageError(f"--{name} goes with --network")
    for name in ("inception", "resize"):
        if options[name] and options["features"] not in ("auto", "inception"):
            raise click.UsageError(f"--{name} is for Inception, not for --features {options['features']}")
    if len(network) > 1 and options["save_stats"]:
        raise click.UsageError("--save-stats takes one --network")
    if options["save_stats"] and options["features"] == "judge":
        raise click.UsageError(JUDGE_STATS)
    if options["images"] and not options["reference"] and options["metrics"] != ["is"]:
        raise click.UsageError("--images needs a --reference, except for --metrics is")
    if options["save_stats"] and (is_stats(options["reference"] or "") or "fid" not in (options["metrics"] or ["fid"])):
        raise click.UsageError("--save-stats keeps the statistics of a folder or a run that FID is measured against")
    for name, file in (("--json", json_file), ("--save-stats", options["save_stats"])):
        if file and not os.path.isdir(os.path.dirname(os.path.abspath(file))):
            raise click.UsageError(f"{name} {file}: there is no such folder")
        if file and os.path.exists(file) and not os.path.isfile(file):
            raise click.UsageError(f"{name} {file} is no regular file")
        if file and os.path.exists(file) and os.path.getsize(file) and not is_result(file, name):
            raise click.UsageError(f"{name} {file} is there and holds something else: give another name")
    network = tuple(os.path.join(file, "gan.pt") if os.path.isdir(file) else file for file in network)
    for file in network:
        if not os.path.isfile(file):
            raise click.ClickException(f"--network {file}: there is no such file; gan.py writes gan.pt to its --outdir")
    world = start(options["device"], options["batch"])  # it joins torchrun's processes
    results = []
    for file in network or (None,):
        try:
            results.append(evaluate(options | {"network": file}, world))
        except click.ClickException as error:
            error.message = f"{file}: {error.message}" if len(network) > 1 else error.message
            raise
        if world.rank == 0:
            click.echo(report(results[-1]))
            if json_file:  # after each run: what is measured is not lost
                # One run: its numbers at the top level, where scripts look for them.
                found = results[0] if len(network) < 2 else {r["network"]: r for r in results}
                with aside(Path(json_file)) as temporary:
                    temporary.write_text(json.dumps(found, indent=2) + "\n")
    if world.rank == 0 and len(results) > 1:
        click.echo("\n" + import_trained("--network").compare(results))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
