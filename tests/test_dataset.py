"""dataset.py on files made here: every layout, every image mode, labels, the cache, batches, downloads, errors."""

import csv
import fcntl
import gzip
import hashlib
import http.server
import io
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
import types
import zipfile
import zlib
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import critters
import dataset
from dataset import open_dataset, prepare, to_float

ROOT = Path(dataset.__file__).parent


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


def make_old(*roots: Path) -> None:
    """Files changed in the last two seconds are hashed again: wait for them to be older, as users' files are."""
    newest = max(f.stat().st_ctime for root in roots for f in [root, *root.rglob("*")])
    time.sleep(max(0, newest + 2.1 - time.time()))


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


# ---------------------------------------------------------------------------------------------------------------------
# Layouts.


def test_class_folders_hold_out_a_tenth_of_each_class(tmp_path):
    root = class_folders(tmp_path / "pets", {"dog": 30, "cat": 12, "ape": 2, "one": 1})
    paint(root / "cat" / "deep" / "er.PNG", 99)
    train, val = open_dataset(str(root)), open_dataset(str(root), split="val")
    assert train.label_names == val.label_names == ["ape", "cat", "dog", "one"]
    assert train.label_kind == "one-hot" and train.attributes == "class" and train.name == "pets" and train.size == 32
    assert counts(train) == [1, 12, 27, 1] and counts(val) == [1, 1, 3, 0]
    assert train.images.shape == (41, 32, 32, 3) and train.images.dtype == np.uint8
    assert train.labels.dtype == np.float32 and np.all(train.labels.sum(1) == 1)
    assert train.info()["splits"] == {"train": 41, "val": 5} and json.dumps(train.info())
    # every image is there once, with its own class
    red = np.concatenate([train.images[:, 16, 16, 0], val.images[:, 16, 16, 0]]).astype(int)
    label = np.concatenate([train.labels.argmax(1), val.labels.argmax(1)])
    made = [(i, 2) for i in range(30)] + [(60 + i, 1) for i in range(12)] + [(120, 0), (121, 0), (180, 3), (99, 1)]
    assert sorted(zip(red, label, strict=True)) == sorted(made)
    # the held-out images depend on names alone
    again = class_folders(tmp_path / "elsewhere" / "pets", {"dog": 30, "cat": 12, "ape": 2, "one": 1})
    paint(again / "cat" / "deep" / "er.PNG", 99)
    assert np.array_equal(open_dataset(str(again), split="val").images, val.images)


@pytest.mark.parametrize("wrap", ["", "stargan-v2/afhq/"])
def test_official_splits(tmp_path, wrap):
    class_folders(tmp_path / "x" / wrap / "train", {"b": 5, "a": 4})
    class_folders(tmp_path / "x" / wrap / "valid", {"a": 1, "b": 2})
    class_folders(tmp_path / "x" / wrap / "Test", {"a": 3, "b": 1})
    parts = {s: open_dataset(str(tmp_path / "x"), split=s) for s in ("train", "val", "test")}
    assert {s: counts(p) for s, p in parts.items()} == {"train": [4, 5], "val": [1, 2], "test": [3, 1]}
    assert len({p.fingerprint for p in parts.values()}) == 1
    with pytest.raises(click.ClickException, match="no split 'dev'"):
        open_dataset(str(tmp_path / "x"), split="dev")


def test_afhq_preset_in_the_layouts_of_both_versions(tmp_path):
    v1, v2 = tmp_path / "data" / "afhq", tmp_path / "two" / "afhq"
    for s, n in (("train", 3), ("val", 1)):
        class_folders(v1 / "afhq" / s, {"cat": n, "dog": n, "wild": n})
    for s, n in (("train", 3), ("test", 1)):
        class_folders(v2 / s, {"cat": n, "dog": n, "wild": n})
    ds = open_dataset("afhq", split="val")
    assert ds.name == "afhq" and ds.size == 256 and ds.label_names == ["cat", "dog", "wild"] and counts(ds) == [1, 1, 1]
    os.environ["INFOSCC_DATA"] = str(tmp_path / "two")
    assert open_dataset("afhq", 64, split="val").info()["splits"] == {"train": 9, "val": 3}
    class_folders(v2 / "train", {"fish": 2})
    with pytest.raises(click.ClickException, match="fish"):
        open_dataset("afhq")


def test_single_split_folder_and_classes_called_like_splits(tmp_path):
    class_folders(tmp_path / "a" / "train", {"x": 4, "y": 4})
    assert open_dataset(str(tmp_path / "a")).label_names == ["x", "y"]
    class_folders(tmp_path / "b", {"train": 4, "plane": 4})
    assert open_dataset(str(tmp_path / "b")).label_names == ["plane", "train"]


def write_csv(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_labels_csv_with_classes(tmp_path):
    root = tmp_path / "shoes"
    names = [f"{i}.png" for i in range(12)]
    for i, name in enumerate(names):
        paint(root / name, i)
    write_csv(root / "labels.csv", [["file", "size"], *([n, [10, 9, 38][i % 3]] for i, n in enumerate(names))])
    ds = open_dataset(str(root))
    assert ds.label_names == ["9", "10", "38"] and ds.label_kind == "one-hot"  # numbers in their order
    assert ds.info()["splits"] == {"train": 9, "val": 3}
    for image, label in zip(ds.images, ds.labels, strict=True):
        assert ds.label_names[label.argmax()] == str([10, 9, 38][int(image[0, 0, 0]) % 3])


def test_labels_csv_with_attributes_and_splits(tmp_path):
    root = tmp_path / "faces"
    rows = [["image", "Hat", "split", "Tie", "Never"]]
    for i in range(8):
        paint(root / "sub" / f"{i}.jpg", 20 * i)
        rows.append([f"sub/{i}.jpg", [-1, 1][i % 2], ["train", "valid"][i > 5], int(i > 3), 0])
    write_csv(root / "labels.csv", rows)
    ds, val = open_dataset(str(root)), open_dataset(str(root), split="val", attributes="Tie")
    assert (
        ds.label_kind == "multi-label"
        and ds.label_names == ["Hat", "Tie", "Never"]
        and ds.attributes == "Hat,Tie,Never"
    )
    assert ds.labels.tolist() == [[i % 2, i > 3, 0] for i in range(6)]
    assert val.label_names == ["Tie"] and val.label_kind == "multi-label" and val.labels.tolist() == [[1], [1]]


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


@pytest.mark.parametrize(("form", "nested"), [("txt", False), ("csv", True)])
def test_celeba(tmp_path, form, nested):
    values = celeba(tmp_path / "data" / "celeba", form=form, nested=nested)
    ds = open_dataset("celeba")
    assert ds.size == 128 and ds.label_kind == "multi-label" and ds.attributes == dataset.CELEBA["celeba5"]
    assert ds.info()["splits"] == {"train": 14, "val": 4, "test": 2}
    assert np.array_equal(ds.labels, values[:14, [0, 1, 3, 4, 5]])
    assert np.abs(ds.images[:, 64, 64, 0].astype(int) - 10 * np.arange(14)).max() <= 3
    whole = open_dataset(str(tmp_path / "data" / "celeba"), 128, split="val")
    assert whole.label_names == ["Bald", "Eyeglasses", "Male", "Mustache", "Wearing_Hat", "Wearing_Necktie"]
    assert np.array_equal(whole.labels, values[14:18])


def test_celeba_images_of_one_name(tmp_path):
    celeba(tmp_path / "c", 30)
    paint(tmp_path / "c" / "img_align_celeba" / "more" / "000001.jpg")
    assert "have one name" in error_of(str(tmp_path / "c"))


def test_celeba_without_partition(tmp_path):
    celeba(tmp_path / "c", 30, partition=False)
    assert open_dataset(str(tmp_path / "c")).info()["splits"] == {"train": 27, "val": 3}


def stylegan_zip(path: Path, labels: list, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for i, (name, _) in enumerate(labels):
            memory = io.BytesIO()
            Image.new("RGB", (64, 64), (i, 0, 0)).save(memory, "png")
            archive.writestr(name, memory.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": labels, **more}))


def test_stylegan_zip(tmp_path):
    labels = [[f"{i // 10:05}/img{i:08}.png", i % 3] for i in range(30)]
    stylegan_zip(tmp_path / "gap.zip", [[n, 2 * i] for n, i in labels])
    assert "class 1 has no training images" in error_of(str(tmp_path / "gap.zip"))
    stylegan_zip(tmp_path / "a.zip", labels)
    ds = open_dataset(str(tmp_path / "a.zip"))
    assert ds.name == "a" and ds.size == 64 and ds.label_names == ["0", "1", "2"] and counts(ds) == [9, 9, 9]
    assert np.array_equal(ds.labels.argmax(1), ds.images[:, 0, 0, 0] % 3)
    stylegan_zip(tmp_path / "b.zip", labels, label_names=["cat", "dog", "wild", "none of these"])
    assert open_dataset(str(tmp_path / "b.zip")).label_names == ["cat", "dog", "wild", "none of these"]
    stylegan_zip(tmp_path / "c.zip", [[n, [i % 2, 1]] for n, i in labels], label_names=["Hat", "Tie"])
    ds = open_dataset(str(tmp_path / "c.zip"))
    assert ds.label_kind == "multi-label" and np.array_equal(ds.labels[:, 0], ds.images[:, 0, 0, 0] % 3 % 2)


def test_zip_of_class_folders_equals_the_folder(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 11, "b": 5})
    shutil.make_archive(str(tmp_path / "y"), "zip", root)
    shutil.make_archive(str(tmp_path / "only" / "z"), "zip", tmp_path, "x")  # wrapped, in a folder
    folder, archive = open_dataset(str(root)), open_dataset(str(tmp_path / "y.zip"))
    assert archive.fingerprint == folder.fingerprint and archive.pack == folder.pack
    only = open_dataset(str(tmp_path / "only"))
    assert only.label_names == ["a", "b"] and len(only) == len(folder)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)


def fashion(folder: Path, n: int = 30, suffix: str = "") -> None:
    for part, count in (("train", n), ("t10k", n // 3)):
        images = np.broadcast_to((np.arange(count, dtype=np.uint8) * 5)[:, None, None], (count, 28, 28))
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", (np.arange(count) % 10).astype(np.uint8))


@pytest.mark.parametrize(("below", "suffix"), [("", ".gz"), ("raw", ""), ("FashionMNIST/raw", "")])
def test_fashion_mnist(tmp_path, below, suffix):
    fashion(tmp_path / "data" / "fashion-mnist" / below, suffix=suffix)
    ds = open_dataset("fashion-mnist")
    assert ds.size == 32 and ds.label_names == dataset.FASHION and ds.info()["splits"] == {"train": 30, "val": 10}
    assert np.array_equal(ds.images[:, 16, 16], np.repeat(np.arange(30)[:, None] * 5, 3, 1))
    assert np.array_equal(ds.labels.argmax(1), np.arange(30) % 10)


def test_critters(monkeypatch):
    monkeypatch.setattr(critters, "SPLITS", {"train": 30, "val": 9})
    ds, val = open_dataset("critters"), open_dataset("critters", 64, "val", attributes=",".join(critters.ATTRIBUTES))
    assert ds.size == 32 and ds.label_names == critters.SPECIES and ds.label_kind == "one-hot" and val.size == 64
    for i in (0, 7, 29):
        image, species, _, kind = critters.render(0, "train", i, 32)
        assert (
            np.array_equal(ds.images[i], image) and ds.labels[i].argmax() == species and ds.hidden["kind"][0][i] == kind
        )
    assert val.labels.tolist() == [critters.render(0, "val", i, 16)[2].tolist() for i in range(9)]
    assert ds.hidden["kind"][1] == critters.KINDS and val.fingerprint == ds.fingerprint


# ---------------------------------------------------------------------------------------------------------------------
# Images.


def decoded(tmp_path, image: Image.Image, name: str, size: int = 32, **options) -> np.ndarray:
    image.save(tmp_path / name, **options)
    return dataset.load_image(tmp_path, name, size)


def test_every_mode_becomes_right_rgb(tmp_path):
    red = Image.new("RGB", (32, 32), (200, 40, 20))
    modes = {"a.png": "RGB", "b.png": "P", "c.gif": "P", "d.webp": "RGBA", "e.tif": "CMYK", "f.bmp": "RGB"}
    for name, mode in modes.items():
        options = {"lossless": True} if name == "d.webp" else {}
        x = decoded(tmp_path, red.quantize(4) if mode == "P" else red.convert(mode), name, **options)
        assert x.shape == (32, 32, 3) and x.dtype == np.uint8
        assert np.abs(x.astype(int) - (200, 40, 20)).max() <= 1, name
    for mode in ("RGB", "CMYK", "YCbCr", "L"):
        x = decoded(tmp_path, red.convert(mode), f"{mode}.jpg", quality=98)
        want = [int(np.asarray(red.convert("L"))[0, 0])] * 3 if mode == "L" else (200, 40, 20)
        assert np.abs(x.astype(int) - want).max() <= 4, mode


def test_transparency_is_composited_on_white(tmp_path):
    assert np.all(decoded(tmp_path, Image.new("RGBA", (32, 32), (10, 20, 30, 0)), "a.png") == 255)
    half = decoded(tmp_path, Image.new("RGBA", (32, 32), (0, 100, 200, 128)), "b.png")
    assert np.abs(half[0, 0].astype(int) - (127, 177, 227)).max() <= 1
    assert np.abs(decoded(tmp_path, Image.new("LA", (32, 32), (0, 51)), "c.png").astype(int) - 204).max() <= 1
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert np.all(decoded(tmp_path, palette, "d.png", transparency=1) == 255)
    assert np.all(decoded(tmp_path, palette, "e.png", transparency=0)[0, 0] == (255, 0, 0))
    assert np.all(decoded(tmp_path, Image.new("L", (32, 32), 7), "f.png", transparency=7) == 255)
    assert np.all(decoded(tmp_path, Image.new("RGB", (32, 32), (7, 8, 9)), "g.png", transparency=(7, 8, 9)) == 255)


def test_16_bit_and_float_grey_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 32).astype(np.uint16)[None].repeat(32, 0)
    for name in ("a.png", "a.tif", "a.pgm"):
        x = decoded(tmp_path, Image.fromarray(ramp), name)
        assert np.array_equal(x[:, :, 0], np.rint(ramp / 257)) and np.all(x[..., 0] == x[..., 2]), name
    x = decoded(tmp_path, Image.fromarray(ramp.astype(np.int32)), "i.tif")
    assert np.array_equal(x[:, :, 1], np.rint(ramp / 257))
    x = decoded(tmp_path, Image.fromarray((ramp / 65535).astype(np.float32)), "f.tif")
    assert np.array_equal(x[:, :, 1], np.rint(ramp / 257))
    assert np.all(decoded(tmp_path, Image.new("1", (32, 32), 1), "1.png") == 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :, 0], upright[:, :16, 2] = 255, 255  # red above, blue left
    back = {1: [], 2: [1], 3: [0, 1], 4: [0], 5: "T", 6: "T0", 7: "T01", 8: "T1"}[orientation]
    stored = upright
    if back and back[0] == "T":
        stored = {"T": lambda a: a.transpose(1, 0, 2), "T0": lambda a: np.rot90(a, 1), "T1": lambda a: np.rot90(a, -1),
                  "T01": lambda a: a[::-1, ::-1].transpose(1, 0, 2)}[back](upright)  # fmt: skip
    else:
        stored = np.flip(upright, back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    x = decoded(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), "a.png", exif=exif)
    assert np.array_equal(x, upright)


def test_first_frame_of_animations(tmp_path):
    frames = [Image.new("RGB", (32, 32), c) for c in ((255, 0, 0), (0, 255, 0))]
    for name in ("a.gif", "a.png", "a.webp"):
        x = decoded(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], duration=50)
        assert np.abs(x[0, 0].astype(int) - (255, 0, 0)).max() <= 2, name


def test_center_crop_and_antialiased_resize(tmp_path):
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = (np.indices((64, 64)).sum(0) % 2 * 255)[..., None]  # finer than 32 px can show
    wide[:, :32], wide[:, 96:] = (255, 0, 0), (0, 0, 255)
    x = decoded(tmp_path, Image.fromarray(wide), "a.png").astype(int)
    assert np.abs(x[2:-2, 2:-2] - 127.5).max() < 8  # aliased: 0 or 255; uncropped: red and blue
    tall = decoded(tmp_path, Image.fromarray(wide.transpose(1, 0, 2)), "b.png").astype(int)
    assert np.abs(tall[2:-2, 2:-2] - 127.5).max() < 8
    x = decoded(tmp_path, Image.new("RGB", (3, 5), (9, 8, 7)), "c.png", 64)  # smaller than asked for
    assert np.all(x == (9, 8, 7))


def test_usual_size(tmp_path):
    for name, side, want in (("a", 70, 64), ("b", 300, 256), ("c", 20, 32), ("d", 128, 128), ("e", 700, 256)):
        class_folders(tmp_path / name, {"x": 2, "y": 2}, size=(side, side + 9))
        assert open_dataset(str(tmp_path / name)).size == want
    assert open_dataset(str(tmp_path / "a"), 16).size == 16
    assert open_dataset(str(tmp_path / "a")).size == 64  # an asked-for size does not become the usual one
    for size in (8, 48, 2048):
        with pytest.raises(click.ClickException, match=f"--size {size} is not a power of two"):
            open_dataset(str(tmp_path / "a"), size)


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with the input.


def test_unreadable_image_stops_packing_unless_skipped(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 50, "b": 50})
    whole = (root / "a" / "007.png").read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "a" / "007.png")
    truncated = (root / "a" / "007.png").read_bytes()[:2000]
    (root / "a" / "007.png").write_bytes(truncated)
    (root / "b" / "030.png").write_bytes(b"")
    message = error_of(str(root))
    assert re.search(r"(a/007|b/030).png cannot be read \((image file is truncated|it is no image)", message)
    assert f"--data {root} --size 32 --skip-broken" in message
    run = CliRunner().invoke(dataset.main, ["--data", str(root)])
    assert run.exit_code == 1 and message in run.output and "Traceback" not in run.output
    ds = open_dataset(str(root), skip_broken=True)
    assert ds.skipped == 2 and sum(ds.splits.values()) == 98
    assert len(open_dataset(str(root))) == len(ds)  # the other stages then use that pack
    got = {s: open_dataset(str(root), split=s) for s in ("train", "val")}
    for p in got.values():
        value = p.images[:, 20, 20, 0].astype(int)
        assert np.array_equal(p.labels.argmax(1), value >= 60) and not {7, 90} & set(value)
    (root / "a" / "007.png").write_bytes(whole)  # repaired: packed anew
    (root / "b" / "030.png").write_bytes(whole)
    assert open_dataset(str(root)).skipped == 0


def test_skip_broken_lists_what_it_skips(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 5, "b": 5})
    (root / "b" / "002.png").write_text("not an image")
    run = CliRunner().invoke(dataset.main, ["--data", str(root), "--skip-broken"])
    assert run.exit_code == 0 and "b/002.png" in run.output and "1 unreadable" in run.output


def test_decompression_bomb(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 3, "b": 3})
    header = struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (root / "a" / "bomb.png").write_bytes(bomb)
    assert "bomb.png" in error_of(str(root))


def test_wrong_sources(tmp_path):
    assert "no such folder" in error_of(str(tmp_path / "nothing"))
    assert "did you mean critters" in error_of("criters")
    assert "--download" in error_of("afhq") and str(tmp_path / "data" / "afhq") in error_of("afhq")
    (tmp_path / "file.txt").write_text("x")
    assert "not a zip" in error_of(str(tmp_path / "file.txt"))
    (tmp_path / "empty").mkdir()
    assert "no images" in error_of(str(tmp_path / "empty"))
    paint(tmp_path / "flat" / "a.png")
    message = error_of(str(tmp_path / "flat"))
    assert "labels.csv" in message and "class folders" in message and "dataset.json" in message
    root = class_folders(tmp_path / "gap", {"a": 3, "b": 3})
    (root / "c").mkdir()
    (root / "c" / "notes.txt").write_text("x")
    assert "gap/c has no images" in error_of(str(root))
    root = class_folders(tmp_path / "stray", {"a": 3, "b": 3})
    paint(root / "z.png")
    assert "stray/z.png" in error_of(str(root))
    class_folders(tmp_path / "gap2" / "train", {"a": 3, "b": 3})
    class_folders(tmp_path / "gap2" / "val", {"a": 3, "c": 3})
    assert "class c" in error_of(str(tmp_path / "gap2"))
    class_folders(tmp_path / "gap3" / "train", {"a": 3})
    class_folders(tmp_path / "gap3" / "val", {"a": 3})
    class_folders(tmp_path / "gap3" / "extra", {"a": 3})
    assert "extra is neither" in error_of(str(tmp_path / "gap3"))
    class_folders(tmp_path / "gap4" / "train", {"a": 3, "b": 3})
    class_folders(tmp_path / "gap4" / "other", {"a": 3, "b": 3})  # else two classes, train and other
    assert "other is neither" in error_of(str(tmp_path / "gap4"))
    class_folders(tmp_path / "gap5" / "test", {"a": 3, "b": 3})
    assert "no folder in train/" in error_of(str(tmp_path / "gap5"))
    class_folders(tmp_path / "ones", {"a": 1, "b": 1})
    assert "at least two" in error_of(str(tmp_path / "ones"))
    (tmp_path / "dangling" / "a").mkdir(parents=True)
    (tmp_path / "dangling" / "a" / "x.png").symlink_to("nowhere.png")
    assert "a/x.png" in error_of(str(tmp_path / "dangling"))


@pytest.mark.parametrize(("first", "second"), [("training", "testing"), ("train", "eval"), ("Train", "dev")])
def test_names_of_splits(tmp_path, first, second):
    class_folders(tmp_path / "x" / first, {"a": 3, "b": 3})
    class_folders(tmp_path / "x" / second, {"a": 2, "b": 2})
    ds = open_dataset(str(tmp_path / "x"))
    assert ds.label_names == ["a", "b"] and ds.splits == {"train": 6, "val": 4}


def test_critters_have_a_largest_size():
    assert "between 16 and 512" in error_of("critters", 1024)


def test_name_that_is_not_utf8(tmp_path):
    folder = os.fsencode(tmp_path / "x") + b"/caf\xe9"
    os.makedirs(folder)
    paint(tmp_path / "a.png")
    (tmp_path / "a.png").rename(os.fsdecode(folder) + "/a.png")
    assert "not UTF-8" in error_of(str(tmp_path / "x"))


def test_skip_broken_skips_what_cannot_be_read(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 5, "b": 5})
    (root / "b" / "zz.png").symlink_to("/proc/self/mem")  # reading it gives an I/O error
    assert "b/zz.png" in error_of(str(root)) and "--skip-broken" in error_of(str(root))
    assert open_dataset(str(root), skip_broken=True).skipped == 1


def test_streams_end_with_all_images(tmp_path):
    ds = open_dataset(str(class_folders(tmp_path / "x", {"a": 8, "b": 8})))
    for workers in (0, 1, 3):
        parts = [x for x, _ in ds.sequential(4, "cpu", workers)]
        assert torch.equal(torch.cat(parts), torch.from_numpy(np.array(ds.images))) and len(parts) == -(-len(ds) // 4)


def test_quotes_in_labels_csv(tmp_path):
    for i in range(6):
        paint(tmp_path / "c" / f"{i}.png", i)
    table = tmp_path / "c" / "labels.csv"
    rows = [f'{i}.png, "{"xy"[i % 2]}, z"' for i in range(5)]
    table.write_text('file,class\n"0.png,x\n' + "\n".join(rows) + "\n")
    assert "labels.csv cannot be read" in error_of(str(tmp_path / "c"))
    table.write_text("file, class\n" + "\n".join(rows) + '\n5.png,"y, z"\n')
    assert open_dataset(str(tmp_path / "c")).label_names == ["x, z", "y, z"]


def edit_line(path: Path, line: int, change) -> None:
    lines = path.read_text().splitlines()
    lines[line - 1 : line] = change(lines[line - 1])
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("table", "line", "change", "words"),
    [
        ("list_attr_celeba.txt", 1, lambda s: ["21"], ["list_attr_celeba.txt line 1", "21 images", "20 lines"]),
        ("list_attr_celeba.txt", 9, lambda s: [], ["line 1", "20 images", "19 lines"]),
        ("list_attr_celeba.txt", 7, lambda s: [s.replace("1", "3")[:-2] + " 3"], ["line 7"]),
        ("list_attr_celeba.txt", 7, lambda s: [s[:-2] + " 3"], ["line 7", "'3'"]),
        ("list_attr_celeba.txt", 7, lambda s: [s + " 1"], ["line 7", "7 values", "6 names"]),
        ("list_attr_celeba.txt", 7, lambda s: ["999" + s[3:]], ["line 7", "999005.jpg"]),
        ("list_attr_celeba.txt", 7, lambda s: ["000001.jpg" + s[10:]], ["line 7", "000001.jpg is there twice"]),
        ("list_eval_partition.txt", 4, lambda s: [s[:-1] + "5"], ["list_eval_partition.txt line 4", "'5'"]),
        ("list_eval_partition.txt", 4, lambda s: [], ["000004.jpg", "list_eval_partition.txt"]),
        ("list_eval_partition.txt", 4, lambda s: [s, "777777.jpg 0"], ["line 5", "777777.jpg"]),
    ],
)
def test_wrong_celeba(tmp_path, table, line, change, words):
    celeba(tmp_path / "c")
    edit_line(tmp_path / "c" / table, line, change)
    message = error_of(str(tmp_path / "c"))
    assert all(w in message for w in words), message


def test_celeba_image_without_line_and_lines_without_images(tmp_path):
    celeba(tmp_path / "c")
    paint(tmp_path / "c" / "img_align_celeba" / "888888.jpg")
    assert "888888.jpg" in error_of(str(tmp_path / "c")) and "list_attr_celeba.txt" in error_of(str(tmp_path / "c"))
    shutil.rmtree(tmp_path / "c" / "img_align_celeba")
    assert "img_align_celeba.zip" in error_of(str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([["f", "A", "B"], ["0.png", 1, 0], ["1.png", 1, 2]], ["line 3", "'2'"]),
        ([["f", "A", "B"], ["0.png", 1, 0], ["1.png", 1]], ["line 3", "1 values", "2 names"]),
        ([["f", "A", "B"], ["0.png", 1, 0], ["9.png", 1, 0]], ["line 3", "9.png"]),
        ([["f", "A", "B"], ["0.png", 1, 0]], ["1.png"]),
        ([["f", "A", "B"], ["0.png", 1, 0], ["0.png", 1, 0]], ["line 3", "twice"]),
        ([["f", "A", "A"], ["0.png", 1, 0], ["1.png", 1, 0]], ["'A'", "twice"]),
        ([["0.png", "cat"], ["1.png", "dog"]], ["line 1", "header"]),
        ([["f", "class"], ["0.png", ""], ["1.png", "x"]], ["line 2", "missing"]),
        ([["f", "class", "split"], ["0.png", "x", "odd"], ["1.png", "x", "val"]], ["line 2", "'odd'"]),
        ([["f", "split"], ["0.png", "val"], ["1.png", "val"]], ["line 1", "header"]),
        ([["f", "class", "split"], ["0.png", "x", "train"], ["1.png", "y", "val"]], ["class y", "no training images"]),
        ([["f", "class"], ["../0.png", "x"], ["1.png", "x"]], ["line 2", "../0.png"]),
        ([["f", "class"]], ["labels.csv", "0.png"]),
        ([], ["line 1", "header"]),
    ],
)
def test_wrong_labels_csv(tmp_path, rows, words):
    for i in range(2):
        paint(tmp_path / "c" / f"{i}.png")
    write_csv(tmp_path / "c" / "labels.csv", rows)
    message = error_of(str(tmp_path / "c"))
    assert all(w in message for w in words), message


def test_wrong_zips(tmp_path):
    names = [f"{i}.png" for i in range(3)]
    for labels, words in (
        ([[n, -1] for n in names], "-1"),
        ([[names[0], 0], [names[1], 1], [names[2], [1]]], "entry 2"),
        ([[names[0], 0], [names[1], 1], [names[2], True]], "entry 2"),
        ([[names[0], [0, 1]], [names[1], [1]], [names[2], [1, 1]]], "entry 1"),
        ([[names[0], [0, 1]], [names[1], [1, 0.5]], [names[2], [1, 1]]], "0.5"),
        ([[n, "cat"] for n in names], "'cat' is no label"),
    ):
        stylegan_zip(tmp_path / "a.zip", labels)
        assert words in error_of(str(tmp_path / "a.zip")), labels
    for labels in ([[n, []] for n in names], [[n, 0.5] for n in names], [[n, 1, 2] for n in names], {"a": 1}, 7, []):
        stylegan_zip(tmp_path / "a.zip", [])
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
        assert "no labels in StyleGAN's form" in error_of(str(tmp_path / "a.zip")), labels
    stylegan_zip(tmp_path / "a.zip", [[n, 10**15] for n in names])  # is not taken for so many classes
    assert "entry 0" in error_of(str(tmp_path / "a.zip"))
    stylegan_zip(tmp_path / "a.zip", [[n, 2] for n in names], label_names=["x", "y"])
    assert "entry 0" in error_of(str(tmp_path / "a.zip"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("dataset.json", '{"labels": null}')
    assert "no labels" in error_of(str(tmp_path / "a.zip"))
    for name in ("../evil.png", "/etc/evil.png", "a/../../evil.png", "C:/evil.png"):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr(name, b"x")
        assert "evil.png" in error_of(str(tmp_path / "a.zip")) and "refused" in error_of(str(tmp_path / "a.zip"))
    assert not (tmp_path / "evil.png").exists()


def test_zips_of_other_programs(tmp_path):
    png = io.BytesIO()
    Image.new("RGB", (40, 40)).save(png, "png")
    images = {f"./{c}/{i}.png": png.getvalue() + bytes([i]) for c in "ab" for i in range(3)}
    with zipfile.ZipFile(tmp_path / "dots.zip", "w") as archive:
        for name, content in images.items():
            archive.writestr(name, content)
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        for name, content in images.items():
            archive.writestr(name[2:], content)
        place = archive.infolist()[2].header_offset + 60
    damaged = bytearray((tmp_path / "lzma.zip").read_bytes())
    damaged[place : place + 12] = bytes(12)
    (tmp_path / "lzma.zip").write_bytes(damaged)
    assert "a/2.png cannot be read" in error_of(str(tmp_path / "lzma.zip"))
    with zipfile.ZipFile(tmp_path / "back.zip", "w") as archive:
        archive.writestr("a/x.png", b"")
        archive.infolist()[0].filename = "a\\x.png"
    assert "has backslashes" in error_of(str(tmp_path / "back.zip"))
    whole = (tmp_path / "dots.zip").read_bytes().replace(b"PK\x01\x02\x14\x03\x14", b"PK\x01\x02\x14\x03\x63")
    (tmp_path / "later.zip").write_bytes(whole)  # says that it needs version 9.9
    assert "cannot be read as a zip" in error_of(str(tmp_path / "later.zip"))
    ds = open_dataset(str(tmp_path / "dots.zip"))
    assert ds.label_names == ["a", "b"] and sum(ds.splits.values()) == 6


def test_empty_partition_and_csv_of_bytes(tmp_path):
    celeba(tmp_path / "c")
    (tmp_path / "c" / "list_eval_partition.txt").write_text("")
    assert "there is no image" in error_of(str(tmp_path / "c"))
    (tmp_path / "c" / "list_eval_partition.txt").write_bytes(b"\xff\xfe\x00")
    assert "list_eval_partition.txt cannot be read" in error_of(str(tmp_path / "c"))


def test_other_idx_sets_keep_their_names(tmp_path):
    fashion(tmp_path / "MNIST" / "raw")
    shutil.copytree(tmp_path / "MNIST" / "raw", tmp_path / "clothes")
    assert open_dataset(str(tmp_path / "MNIST")).label_names == [str(i) for i in range(10)]
    assert open_dataset(str(tmp_path / "clothes")).label_names == dataset.FASHION


def test_damaged_idx(tmp_path):
    folder = tmp_path / "f"
    fashion(folder)
    raw = (folder / "train-images-idx3-ubyte").read_bytes()
    (folder / "train-images-idx3-ubyte").write_bytes(raw[:-5])
    assert "train-images-idx3-ubyte is damaged" in error_of(str(folder))
    (folder / "train-images-idx3-ubyte").write_bytes(raw)
    write_idx(folder / "train-labels-idx1-ubyte", np.arange(29, dtype=np.uint8) % 10)
    assert "29 labels" in error_of(str(folder)) and "30 images" in error_of(str(folder))
    write_idx(folder / "train-labels-idx1-ubyte", np.arange(30, dtype=np.uint8) % 11)
    assert "label 10" in error_of(str(folder))
    (folder / "t10k-labels-idx1-ubyte").unlink()
    write_idx(folder / "train-labels-idx1-ubyte", np.arange(30, dtype=np.uint8) % 10)
    assert "t10k-labels-idx1-ubyte is missing" in error_of(str(folder))


def test_attribute_that_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(critters, "SPLITS", {"train": 4, "val": 4})
    for spec, words in (
        ("Eyeglases", ["'Eyeglases'", "did you mean Eyeglasses", "Hat", "class"]),
        ("Hat,Hat", ["twice"]),
        ("celeba5", ["Bald"]),
    ):
        with pytest.raises(click.ClickException) as caught:
            open_dataset("critters", attributes=spec)
        assert all(w in caught.value.message for w in words)
    assert open_dataset("critters", attributes="Hat, Necktie").attributes == "Hat,Necktie"
    for n in (5, 10, 15):
        names = dataset.CELEBA[f"celeba{n}"].split(",")
        assert len(set(names)) == n and dataset.select(f"celeba{n}", "x", [], sorted(names)) == (",".join(names), names)
    celeba(tmp_path / "c")
    with pytest.raises(click.ClickException, match="'class'"):
        open_dataset(str(tmp_path / "c"), attributes="class")


# ---------------------------------------------------------------------------------------------------------------------
# The cache.


def test_packed_once_by_content(tmp_path, monkeypatch):
    root = class_folders(tmp_path / "x", {"a": 5, "b": 5})
    make_old(root)
    first = open_dataset(str(root))
    monkeypatch.setattr(dataset, "load_image", None)  # whoever decodes from here on fails
    monkeypatch.setattr(dataset, "scan", None)
    assert open_dataset(str(root), split="val").pack == first.pack  # nothing was even read
    monkeypatch.undo()
    os.environ["INFOSCC_CACHE"] = str(tmp_path / "cache")
    shutil.copytree(root, tmp_path / "y")
    monkeypatch.setattr(dataset, "load_image", None)
    copy = open_dataset(str(tmp_path / "y"))
    assert copy.pack == first.pack and copy.name == "y"
    monkeypatch.undo()
    os.environ["INFOSCC_CACHE"] = str(tmp_path / "cache")
    # the same size and time, other content: noticed by the inode's own time
    file = root / "a" / "000.png"
    before = file.stat()
    paint(file, 7)
    if file.stat().st_size == before.st_size:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = open_dataset(str(root))
    assert changed.fingerprint != first.fingerprint and changed.pack != first.pack
    assert 7 in np.concatenate([changed.images[:, 0, 0, 0], open_dataset(str(root), split="val").images[:, 0, 0, 0]])
    assert open_dataset(str(root), 64).fingerprint == changed.fingerprint
    (root / "b" / "000.png").rename(root / "a" / "moved.png")
    assert open_dataset(str(root)).fingerprint != changed.fingerprint


def test_sources_are_only_read(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 5, "b": 5})
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in root.rglob("*")}
    subprocess.run(["chmod", "-R", "a-w", root], check=True)
    open_dataset(str(root))
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in root.rglob("*")} == before
    with pytest.raises(ValueError):
        open_dataset(str(root)).images[0] = 0


def in_process(function, *args) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def test_two_processes_at_once_and_a_killed_one(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 60, "b": 60}, size=(500, 500))
    killed = in_process(prepare, str(root))
    while not list((tmp_path / "cache").glob(".packing-*/train.npy")):
        assert killed.is_alive()
        time.sleep(0.01)
    killed.kill()  # it alone: its own processes must end too, and let go of the lock
    killed.join()
    assert list((tmp_path / "cache").glob(".packing-*")) and not list((tmp_path / "cache").glob("x-*"))
    both = [in_process(prepare, str(root)) for _ in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list((tmp_path / "cache").glob("x-256-*"))) == 1 and not list((tmp_path / "cache").glob(".packing-*"))
    parts = [open_dataset(str(root), split=s).images[:, 0, 0, 0] for s in ("train", "val")]
    assert sorted(np.concatenate(parts)) == sorted([*range(120)])


def test_without_locks_the_first_to_finish_wins(tmp_path, monkeypatch):
    root = class_folders(tmp_path / "x", {"a": 4, "b": 4})
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    write = dataset.write_pack

    def late(*args):  # while this one writes, another one finishes
        monkeypatch.setattr(dataset, "write_pack", write)
        open_dataset(str(root))
        write(*args)

    monkeypatch.setattr(dataset, "write_pack", late)
    assert len(open_dataset(str(root))) == 6 and not list((tmp_path / "cache").glob(".packing-*"))


def test_full_disk(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 20, "b": 20}, size=(64, 64))

    def pack_within_100_kb():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        run = CliRunner().invoke(dataset.main, ["--data", str(root)])
        (tmp_path / "said").write_text(f"{run.exit_code} {run.output}")

    in_process(pack_within_100_kb).join()
    said = (tmp_path / "said").read_text()
    assert said.startswith("1 ") and "cannot write the cache" in said and "INFOSCC_CACHE" in said
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_source_changing_while_packed(tmp_path, monkeypatch):
    root = class_folders(tmp_path / "x", {"a": 4, "b": 4})
    write = dataset.write_pack
    monkeypatch.setattr(dataset, "write_pack", lambda *a: (write(*a), paint(root / "a" / "000.png", 200)))
    assert "changed while" in error_of(str(root))


def test_damaged_pack_is_named(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 4, "b": 4})
    pack = prepare(str(root))
    (pack / "train.npy").write_bytes((pack / "train.npy").read_bytes()[:-10])
    with pytest.raises(click.ClickException, match=f"{pack.name} is damaged"):
        open_dataset(str(root))


# ---------------------------------------------------------------------------------------------------------------------
# Batches.


@pytest.fixture
def numbered(tmp_path):
    """50 images in two classes; the red value of each is its row (classes alternate in blocks of 25)."""
    root = tmp_path / "n"
    for i in range(50):
        paint(root / "train" / "ab"[i // 25] / f"{i:02}.png", i, (16, 16))
    paint(root / "val" / "a" / "v.png", 99, (16, 16))
    return open_dataset(str(root), 16)


def take(batches, count: int) -> list[int]:
    values = []
    for x, y in itertools.islice(batches, count):
        assert x.dtype == torch.uint8 and x.shape[1:] == (16, 16, 3) and y.dtype == torch.float32
        assert torch.equal(y.argmax(1), (x[:, 0, 0, 0] >= 25).long())
        values += x[:, 0, 0, 0].tolist()
    return values


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_permutations(numbered, workers):
    values = take(numbered.batches(8, "cpu", seed=3, workers=workers), 25)  # four epochs
    epochs = [values[i : i + 50] for i in range(0, 200, 50)]
    assert all(sorted(e) == list(range(50)) for e in epochs) and len({tuple(e) for e in epochs}) == 4
    assert values == take(numbered.batches(8, "cpu", seed=3), 25)
    assert values != take(numbered.batches(8, "cpu", seed=4), 25)
    assert take(numbered.batches(8, "cpu", seed=3, start=80, workers=workers), 15) == values[80:]  # a resumed run
    whole = take(numbered.batches(120, "cpu", seed=3, workers=workers), 1)  # larger than the data
    assert whole == values[:120]


def test_processes_share_one_stream(numbered):
    values = take(numbered.batches(8, "cpu", start=16), 4)
    parts = [take(numbered.batches(4, "cpu", start=16, rank=r, world=2), 4) for r in range(2)]
    together = [v for s in range(4) for r in range(2) for v in parts[r][4 * s : 4 * s + 4]]
    assert together == values


def test_sequential(numbered):
    batches = list(numbered.sequential(16, "cpu"))
    assert [len(x) for x, _ in batches] == [16, 16, 16, 2]
    assert torch.equal(torch.cat([x for x, _ in batches]), torch.from_numpy(np.array(numbered.images)))
    assert torch.equal(torch.cat([y for _, y in batches]), torch.from_numpy(numbered.labels))


def test_batches_are_the_callers_own(numbered):
    stream = numbered.batches(4, "cpu")
    first = next(stream)[0]
    kept = first.clone()
    for _ in range(20):
        next(stream)[0].fill_(0)
    assert torch.equal(first, kept) and numbered.images[1].any()


def test_errors_reach_the_caller_and_closing_stops_the_threads(numbered):
    def threads() -> list:
        return [t for t in threading.enumerate() if t.name.startswith("batches")]

    stream = numbered.batches(4, "cpu", workers=2)
    next(stream)
    assert threads()
    stream.close()
    assert not threads()
    stream = numbered.batches(4, "cpu", workers=1)
    numbered.labels = np.zeros((3, 9, 9))
    with pytest.raises((ValueError, TypeError, IndexError)):
        for _ in range(5):
            next(stream)
    assert not threads()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu(numbered):
    stream, plain = numbered.batches(4, "cuda"), numbered.batches(4, "cpu")
    for _ in range(50):
        (x, y), (a, b) = next(stream), next(plain)
        assert x.device.type == "cuda" and torch.equal(x.cpu(), a) and torch.equal(y.cpu(), b)


def test_to_float():
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    y = to_float(x)
    assert y.shape == (2, 3, 16, 16) and y.dtype == torch.float32 and y.min() == -1 and y.max() == 1
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y[0, 0].flatten().double(), torch.arange(256).double() / 127.5 - 1, atol=1e-7, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Downloads, from a server of our own.


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` with ranges; breaks off after `cut` bytes as long as `cuts` lasts."""

    content, cut, cuts, ranges, status = b"", 0, 0, True, 200

    def do_GET(self):
        self.server.seen.append(self.headers["Range"])
        if self.status != 200:
            return self.send_error(self.status)
        first = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.ranges else 0
        if first >= len(self.content):
            return self.send_error(416)
        body = self.content[first:]
        self.send_response(206 if self.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if type(self).cuts > 0:
            type(self).cuts -= 1
            body = body[: self.cut]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Server,), {})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.seen, httpd.handler = [], handler
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/f"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(dataset.time, "sleep", lambda s: None)


def afhq_zip() -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for split, c, i in itertools.product(("train", "val"), ("cat", "dog", "wild"), range(4)):
            image = io.BytesIO()
            noise = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(image, "jpeg")
            archive.writestr(f"afhq/{split}/{c}/{i}.jpg", image.getvalue())
    return memory.getvalue()


def test_version_goes_with_download():
    run = CliRunner().invoke(dataset.main, ["--data", "afhq", "--version", "v2"])
    assert run.exit_code == 2 and "--version goes with --download" in run.output


def test_download_resumes_and_packs(tmp_path, server, no_pauses, monkeypatch):
    server.handler.content, server.handler.cut, server.handler.cuts = afhq_zip(), 10_000, 2
    monkeypatch.setitem(dataset.AFHQ, "v1", (server.url, "afhq.zip", 24))
    run = CliRunner().invoke(dataset.main, ["--data", "afhq", "--download", "--size", "32"])
    assert run.exit_code == 0, run.output
    assert server.seen == ["bytes=0-", "bytes=10000-", "bytes=20000-"]
    assert (tmp_path / "data" / "afhq" / "afhq.zip").read_bytes() == server.handler.content
    assert re.search(r"images +12 +12", run.output) and re.search(r"wild +4 +4", run.output)
    assert CliRunner().invoke(dataset.main, ["--data", "afhq", "--download", "--size", "32"]).exit_code == 0
    assert len(server.seen) == 3  # it was there
    run = CliRunner().invoke(dataset.main, ["--data", "afhq", "--download", "--version", "v2"])
    assert run.exit_code == 1 and "already holds afhq.zip" in run.output
    (tmp_path / "data" / "afhq" / "afhq.zip").rename(tmp_path / "moved.zip")
    monkeypatch.setitem(dataset.AFHQ, "v2", (server.url, "afhq_v2.zip", 24))
    run = CliRunner().invoke(dataset.main, ["--data", "afhq", "--download", "--version", "v2", "--size", "32"])
    assert run.exit_code == 0 and os.listdir(tmp_path / "data" / "afhq") == ["afhq_v2.zip"] and len(server.seen) == 4


def test_download_goes_on_in_a_later_run(tmp_path, server, no_pauses):
    server.handler.content, server.handler.cut, server.handler.cuts = os.urandom(50_000), 5_000, 4
    path = tmp_path / "f"
    with pytest.raises(click.ClickException, match="run again") as caught:
        dataset.fetch(server.url, path, lambda part: None)
    assert server.url in caught.value.message and str(path) in caught.value.message and not path.exists()
    assert (tmp_path / "f.part").stat().st_size == 20_000
    dataset.fetch(server.url, path, lambda part: None)
    assert path.read_bytes() == server.handler.content and server.seen[-1] == "bytes=20000-"


def test_download_without_ranges_and_of_the_wrong_file(tmp_path, server, no_pauses):
    server.handler.content, server.handler.ranges = b"abc" * 100, False
    (tmp_path / "f.part").write_bytes(b"stale" * 10)
    dataset.fetch(server.url, tmp_path / "f", lambda part: None)
    assert (tmp_path / "f").read_bytes() == server.handler.content
    with pytest.raises(click.ClickException, match="not a whole zip"):
        dataset.fetch(server.url, tmp_path / "g", lambda part: dataset.check_zip(part, 3))
    assert not (tmp_path / "g").exists() and not (tmp_path / "g.part").exists()
    server.handler.content = afhq_zip()
    with pytest.raises(click.ClickException, match="24 images, not 3"):
        dataset.fetch(server.url, tmp_path / "g", lambda part: dataset.check_zip(part, 3))
    whole = bytearray(server.handler.content)
    whole[1000] ^= 255
    server.handler.content = bytes(whole)
    with pytest.raises(click.ClickException, match="damaged"):
        dataset.fetch(server.url, tmp_path / "g", lambda part: dataset.check_zip(part, 24))
    server.handler.ranges, server.handler.content = True, b"x" * 10  # all of it came before: 416, and the check decides
    (tmp_path / "h.part").write_bytes(b"x" * 10)
    dataset.fetch(server.url, tmp_path / "h", lambda part: None)
    assert (tmp_path / "h").read_bytes() == b"x" * 10


def test_failing_network(tmp_path, server, no_pauses, monkeypatch):
    server.handler.status = 404
    monkeypatch.setitem(dataset.AFHQ, "v1", (server.url, "afhq.zip", 24))
    run = CliRunner().invoke(dataset.main, ["--data", "afhq", "--download"])
    assert run.exit_code == 1 and "404" in run.output and server.url in run.output and "afhq/afhq.zip" in run.output
    monkeypatch.setitem(dataset.AFHQ, "v1", ("http://127.0.0.1:9/f", "afhq.zip", 24))
    run = CliRunner().invoke(dataset.main, ["--data", "afhq", "--download"])
    assert run.exit_code == 1 and "http://127.0.0.1:9/f" in run.output and run.output.count("\n") == 1
    run = CliRunner().invoke(dataset.main, ["--data", "critters", "--download"])
    assert run.exit_code == 2


def test_download_of_fashion_mnist_checks_md5(tmp_path, server, no_pauses, monkeypatch):
    from torchvision.datasets import FashionMNIST

    fashion(tmp_path / "official", suffix=".gz")
    files = {n: (tmp_path / "official" / n).read_bytes() for n, _ in FashionMNIST.resources}

    def serve(handler):
        handler.content = files[handler.path.lstrip("/")]
        Server.do_GET(handler)

    monkeypatch.setattr(server.handler, "do_GET", serve)
    monkeypatch.setattr(FashionMNIST, "mirrors", [server.url[:-1]])
    run = CliRunner().invoke(dataset.main, ["--data", "fashion-mnist", "--download"])
    assert run.exit_code == 1 and "wrong checksum" in run.output  # ours are not the official ones
    monkeypatch.setattr(FashionMNIST, "resources", [(n, hashlib.md5(c).hexdigest()) for n, c in files.items()])
    run = CliRunner().invoke(dataset.main, ["--data", "fashion-mnist", "--download"])
    assert run.exit_code == 0 and re.search(r"images +30 +10", run.output), run.output


def test_download_of_celeba(tmp_path, monkeypatch):
    from torchvision.datasets import CelebA

    celeba(tmp_path / "official")
    shutil.make_archive(
        str(tmp_path / "official" / "img_align_celeba"), "zip", tmp_path / "official", "img_align_celeba"
    )
    names = ["img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt"]
    md5 = {n: hashlib.md5((tmp_path / "official" / n).read_bytes()).hexdigest() for n in names}
    monkeypatch.setattr(
        CelebA, "file_list", [(f"id-{n}", md5[n], n) for n in names] + [("id", "0", "identity_CelebA.txt")]
    )
    asked = []

    def drive(id, output, resume):
        asked.append(id)
        if len(asked) == 2:
            raise RuntimeError("Too many users have viewed or downloaded this file recently.\nMore text")
        shutil.copy(tmp_path / "official" / id.removeprefix("id-"), output)

    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=drive))
    run = CliRunner().invoke(dataset.main, ["--data", "celeba", "--download", "--size", "32"])
    assert run.exit_code == 1 and "Too many users" in run.output and "list_attr_celeba.txt" in run.output
    run = CliRunner().invoke(dataset.main, ["--data", "celeba", "--download", "--size", "32"])
    assert run.exit_code == 0 and re.search(r"images +14 +4 +2", run.output), run.output
    assert asked == [
        f"id-{n}" for n in [names[0], names[1], names[1], names[2]]
    ]  # what was there is not asked for again
    monkeypatch.setitem(sys.modules, "gdown", None)
    run = CliRunner().invoke(dataset.main, ["--data", "celeba", "--download"])
    assert run.exit_code == 1 and "pip install gdown" in run.output


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def test_command(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 10, "bee": 20})
    (tmp_path / "y").mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, ROOT / "dataset.py", "--data", root, "--size", "16", "--sheet", tmp_path / "y" / "s.png"],
        env=env, capture_output=True, text=True, cwd=tmp_path / "y",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert re.search(r"images +27 +3\n", run.stdout) and re.search(r"a +9 +1\n", run.stdout)
    assert re.search(r"bee +18 +2\n", run.stdout) and "16 px" in run.stdout and "2, one-hot" in run.stdout
    assert os.listdir(tmp_path / "y") == ["s.png"]
    picture = np.asarray(Image.open(tmp_path / "y" / "s.png"))
    assert picture.shape == (32, 128, 3) and picture[0, 0, 0] < 60 <= picture[16, 0, 0]
    run = CliRunner().invoke(
        dataset.main, ["--data", str(root), "--size", "16", "--sheet", str(tmp_path / "no" / "s.png")]
    )
    assert run.exit_code == 1 and "cannot write" in run.output


def test_command_prints_positives_of_attributes(tmp_path):
    values = celeba(tmp_path / "c")
    run = CliRunner().invoke(dataset.main, ["--data", str(tmp_path / "c"), "--attributes", "Male,Bald", "--size", "32"])
    assert run.exit_code == 0 and re.search(rf"Male +{values[:14, 2].sum()} +{values[14:18, 2].sum()}", run.output)
    assert "2, multi-label" in run.output and "Mustache" not in run.output
