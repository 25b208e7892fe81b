"""Images per second that a training loop is fed: dataset.py's batches against torchvision's ImageFolder."""

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from dataset import open_dataset
from training import to_float

from .timing import row


def image_folder(root: Path, count: int, side: int) -> None:
    """Class folders of JPEGs, smoothed noise, about as detailed as photographs."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / "train" / "abc"[i % 3] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        # A quarter of the side, then enlarged: noise in every pixel would take JPEG far longer than a photograph.
        noise = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
        noise.resize((side, side), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1)).save(path, quality=90)
    for c in "abc":
        # Without val images, dataset.py would hold out a tenth, and the two sides would read different images.
        (root / "val" / c).mkdir(parents=True)
        noise.resize((side, side)).save(root / "val" / c / "v.jpg")


def usual_batches(root: Path, batch: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled float32 batches in [-1, 1] with their labels, without end: ImageFolder, decoded by two workers."""
    # The central square at `size`, as dataset.py has it.
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    folder = ImageFolder(str(root), transforms.Compose([*steps, transforms.Normalize([0.5] * 3, [0.5] * 3)]))
    # persistent_workers: else every epoch would wait for new processes.
    loader = DataLoader(folder, batch, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True)
    while True:
        yield from loader


def seconds_per_image(batches: Iterable, batch: int, count: int, repeats: int) -> list[float]:
    """Seconds per image over `repeats` runs of `count` batches from one iterator, after one batch to warm up."""
    batches = iter(batches)
    next(batches)
    result = []
    for _ in range(repeats):
        start = time.perf_counter()
        for x, _ in islice(batches, count):
            # Seconds are divided by batch * count below, so every batch must be full.
            assert x.shape[0] == batch
        result.append((time.perf_counter() - start) / (batch * count))
    return result


def data_rows(quick: bool = False) -> list[dict]:
    """A row for each way of loading, with images per second and the ratio to ImageFolder.

    Both give shuffled float32 batches of 32 in [-1, 1] at 64 px from the same JPEGs, stored at 64 px, which need no
    resizing, or at 256 px. ImageFolder decodes with two worker processes; ours reads the pack, made before, with one
    thread, and converts in the caller's one (`uint8`: does not convert). They run one after another and not in turns:
    workers read ahead, and what one side left running would slow the next.
    """
    rows, batch, repeats, threads = [], 32, 3 if quick else 7, torch.get_num_threads()
    # In training the other threads compute; and ImageFolder's workers have one each.
    torch.set_num_threads(1)
    old = os.environ.get("INFOSCC_CACHE")
    for stored in (64,) if quick else (64, 256):
        with tempfile.TemporaryDirectory() as temporary:
            os.environ["INFOSCC_CACHE"] = f"{temporary}/cache"
            # Batches to time, `few` for ImageFolder: the pack is so much faster that it takes many.
            root, few, many = Path(temporary) / "images", 20 if quick else 60, 200 if quick else 2000
            # As many images as `few` batches take: one epoch.
            image_folder(root, 640 if quick else 1920, stored)
            theirs = seconds_per_image(usual_batches(root / "train", batch, 64), batch, few, repeats)
            # Packs the images, which is not timed: it happens once.
            packed = open_dataset(str(root), 64)
            floats = ((to_float(x), y) for x, y in packed.batches(batch, "cpu"))
            ways = {"ImageFolder, 2 workers": theirs, "packed": seconds_per_image(floats, batch, many, repeats)}
            ways["packed, uint8"] = seconds_per_image(packed.batches(batch, "cpu"), batch, many, repeats)
            for name, values in ways.items():
                result = row(f"data: {name}, {stored} px files", values, theirs, "ImageFolder", size=64, batch=batch)
                result["images_per_second"] = 1 / result["ours"]
                result["note"] = f"{result['images_per_second']:,.0f} images a second"
                rows.append(result)
    torch.set_num_threads(threads)
    os.environ.pop("INFOSCC_CACHE") if old is None else os.environ.update(INFOSCC_CACHE=old)
    return rows
