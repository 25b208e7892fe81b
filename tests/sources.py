"""Small sources for the tests of layouts.py and dataset.py, one function a layout."""

import csv
import gzip
import io
import json
import os
import struct
import zipfile
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from dataset import open_dataset


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("INFOSCC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("INFOSCC_DATA", str(tmp_path / "data"))


def paint(path, value: int = 0, size: tuple[int, int] = (40, 40), mode: str = "RGB", **options) -> None:
    """An image of one colour, made from `value`, so that what is read back can be told apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 255 - value, 100)).convert(mode).save(path, **options)


def class_folders(root: Path, counts: dict[str, int], **options) -> Path:
    for c, (name, count) in enumerate(counts.items()):
        for i in range(count):
            paint(root / name / f"{i:03}.png", 60 * c + i, **options)
    return root


def write_csv(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def celeba(root: Path, n: int = 20, form: str = "txt", partition: bool = True, nested: bool = False) -> np.ndarray:
    names = ["Bald", "Eyeglasses", "Male", "Mustache", "Wearing_Hat", "Wearing_Necktie"]
    values = np.random.default_rng(0).integers(0, 2, (n, len(names)))
    files = [f"{i + 1:06}.jpg" for i in range(n)]
    for i, f in enumerate(files):
        paint(root / ("img_align_celeba/" * (1 + nested)) / f, 10 * i, (178, 218))
    parts = [0 if i < n - 6 else 1 if i < n - 2 else 2 for i in range(n)]
    if form == "txt":
        lines = [str(n), " ".join(names) + " "]
        lines += [f"{f} " + " ".join(f"{2 * v - 1:2d}" for v in row) for f, row in zip(files, values, strict=True)]
        (root / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
        if partition:
            (root / "list_eval_partition.txt").write_text(
                "".join(f"{f} {p}\n" for f, p in zip(files, parts, strict=True))
            )
    else:
        write_csv(
            root / "list_attr_celeba.csv",
            [["image_id", *names], *([f, *(2 * v - 1)] for f, v in zip(files, values, strict=True))],
        )
        if partition:
            write_csv(root / "list_eval_partition.csv", [["image_id", "partition"], *zip(files, parts, strict=True)])
    return values


def stylegan_zip(path: Path, labels: list, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for i, (name, _) in enumerate(labels):
            memory = io.BytesIO()
            Image.new("RGB", (64, 64), (i, 0, 0)).save(memory, "png")
            archive.writestr(name, memory.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": labels, **more}))


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)


def fashion(folder: Path, n: int = 30, suffix: str = "") -> None:
    for part, count in (("train", n), ("t10k", n // 3)):
        images = np.broadcast_to((np.arange(count, dtype=np.uint8) * 5)[:, None, None], (count, 28, 28))
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", (np.arange(count) % 10).astype(np.uint8))


def error_of(*args, **options) -> str:
    """The one line that open_dataset fails with; nothing may be left in the cache."""
    with pytest.raises(click.ClickException) as caught:
        open_dataset(*args, **options)
    assert "\n" not in caught.value.message
    cache = Path(os.environ["INFOSCC_CACHE"])
    assert [p for p in cache.glob("*") if p.is_dir() and p.name != "seen"] == []
    return caught.value.message


def counts(ds) -> list[int]:
    return ds.labels.sum(0).astype(int).tolist()
