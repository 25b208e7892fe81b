"""Images per second that a training loop is fed: dataset.py's batches against torchvision's ImageFolder.

python tests/bench_data.py [--quick]
"""

import os
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).parent.parent))
from dataset import open_dataset, to_float


def image_folder(root: Path, count: int, side: int) -> None:
    """Class folders of JPEGs, smoothed noise, about as detailed as photographs."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / "train" / "abc"[i % 3] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
        noise.resize((side, side), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1)).save(path, quality=90)
    (root / "val").mkdir()
    for c in "abc":
        (root / "val" / c).mkdir()
        noise.resize((side, side)).save(root / "val" / c / "v.jpg")


def rates(batches, batch: int, count: int, repeats: int) -> list[float]:
    """Images per second over `repeats` runs of `count` batches from one iterator, after one batch to warm up."""
    batches = iter(batches)
    next(batches)
    result = []
    for _ in range(repeats):
        start = time.perf_counter()
        for x, _ in islice(batches, count):
            assert x.shape[0] == batch
        result.append(batch * count / (time.perf_counter() - start))
    return result


def usual_batches(root: Path, batch: int, size: int):
    """Shuffled float32 batches in [-1, 1] with their labels, without end: ImageFolder, decoded by two workers."""
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    folder = ImageFolder(str(root), transforms.Compose([*steps, transforms.Normalize([0.5] * 3, [0.5] * 3)]))
    loader = DataLoader(folder, batch, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True)
    while True:
        yield from loader


def data_rows(quick: bool = False) -> list[dict]:
    """One row a way of loading: images per second, median of several runs, their spread, ratio to ImageFolder.

    Both give shuffled float32 batches of 32 in [-1, 1] at 64 px from the same JPEGs, stored at 64 px, which need no
    resizing, or at 256 px. ImageFolder decodes with two worker processes; ours reads the pack, made before, with one
    thread, and converts in the caller's one (`uint8`: does not convert).
    """
    rows, batch, repeats, threads = [], 32, 3 if quick else 7, torch.get_num_threads()
    torch.set_num_threads(1)
    old = os.environ.get("INFOSCC_CACHE")
    for stored in (64,) if quick else (64, 256):
        with tempfile.TemporaryDirectory() as temporary:
            os.environ["INFOSCC_CACHE"] = f"{temporary}/cache"
            root = Path(temporary) / "images"
            image_folder(root, 640 if quick else 1920, stored)
            theirs = rates(usual_batches(root / "train", batch, 64), batch, 20 if quick else 60, repeats)
            ds = open_dataset(str(root), 64)
            ours = rates(
                ((to_float(x), y) for x, y in ds.batches(batch, "cpu")), batch, 200 if quick else 2000, repeats
            )
            bytes_only = rates(ds.batches(batch, "cpu"), batch, 200 if quick else 2000, repeats)
            named = {"ImageFolder, 2 workers": theirs, "packed": ours, "packed, uint8": bytes_only}
            for name, values in named.items():
                median, rival = statistics.median(values), statistics.median(theirs)
                row = {"what": f"data: {name}, {stored} px files", "ratio": median / rival}
                row |= {"spread": [min(values) / rival, max(values) / rival], "note": f"{median:,.0f} images a second"}
                row |= {"size": 64, "batch": batch, "images_per_second": median, "runs": repeats}
                rows.append(row | {"low": min(values), "high": max(values)})
    torch.set_num_threads(threads)
    os.environ.pop("INFOSCC_CACHE") if old is None else os.environ.update(INFOSCC_CACHE=old)
    return rows


if __name__ == "__main__":
    for row in data_rows("--quick" in sys.argv):
        print(f"{row['what']:46} {row['images_per_second']:>12,.0f} img/s  ({row['low']:,.0f} - {row['high']:,.0f})"
              f"  {row['ratio']:6.1f} x")  # fmt: skip
    print(f"torch {torch.__version__}, {os.cpu_count()} processors")
