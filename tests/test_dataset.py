"""dataset.py on files made here: sizes, labels, the cache, batches, downloads, the command."""

import fcntl
import itertools
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
import zlib
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from sources import celeba, class_folders, error_of, fashion, paint, places  # noqa: F401

import critters
import dataset
import files
import layouts
from dataset import open_dataset, prepare

ROOT = Path(dataset.__file__).parent


def run_main(*arguments):
    return CliRunner().invoke(dataset.main, [str(a) for a in arguments])


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


def test_center_crop_and_antialiased_resize():
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = (np.indices((64, 64)).sum(0) % 2 * 255)[..., None]  # finer than 32 px can show
    wide[:, :32], wide[:, 96:] = (255, 0, 0), (0, 0, 255)

    def squared(image: Image.Image, size: int) -> np.ndarray:
        return dataset.square(image, size).astype(int)

    x = squared(Image.fromarray(wide), 32)
    assert np.abs(x[2:-2, 2:-2] - 127.5).max() < 8  # aliased: 0 or 255; uncropped: red and blue
    tall = squared(Image.fromarray(wide.transpose(1, 0, 2)), 32)
    assert np.abs(tall[2:-2, 2:-2] - 127.5).max() < 8
    x = squared(Image.new("RGB", (3, 5), (9, 8, 7)), 64)  # smaller than asked for
    assert np.all(x == (9, 8, 7))


def test_usual_size(tmp_path, capsys):
    for name, side, want in (("a", 70, 64), ("b", 300, 256), ("c", 20, 32), ("d", 128, 128), ("e", 700, 256)):
        class_folders(tmp_path / name, {"x": 2, "y": 2}, size=(side, side + 9))
        assert open_dataset(str(tmp_path / name)).size == want
    assert open_dataset(str(tmp_path / "a"), 16).size == 16
    assert open_dataset(str(tmp_path / "a")).size == 64  # an asked-for size does not become the usual one
    assert "keeps them larger" not in capsys.readouterr().err
    most = dataset.most_by_default(torch.device("cpu"))
    assert open_dataset(str(tmp_path / "b"), most=most).size == most == 32
    assert "--size 256 keeps them larger" in capsys.readouterr().err
    assert open_dataset(str(tmp_path / "b"), 128, most=most).size == 128
    for size in (8, 48, 2048):
        with pytest.raises(click.ClickException, match=f"--size {size} is not a power of two"):
            open_dataset(str(tmp_path / "a"), size)


def test_the_usual_size_is_that_of_images_within_max_pixels(tmp_path, monkeypatch):
    root = class_folders(tmp_path / "x", {"a": 2, "b": 2}, size=(70, 70))
    assert dataset.usual_size(root, ["a/000.png"], 100) == 32 and dataset.usual_size(root, ["a/000.png"]) == 64
    usual, asked = dataset.usual_size, []
    monkeypatch.setattr(dataset, "usual_size", lambda *how: asked.append(how) or usual(*how))
    open_dataset(str(root), max_pixels=5000)
    assert asked[0][2] == 5000


def test_critters_have_a_largest_size():
    assert "between 16 and 512" in error_of("critters", 1024)


def test_unreadable_image_stops_packing_unless_skipped(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 50, "b": 50})
    whole = (root / "a" / "007.png").read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "a" / "007.png")
    truncated = (root / "a" / "007.png").read_bytes()[:2000]
    (root / "a" / "007.png").write_bytes(truncated)
    (root / "b" / "030.png").write_bytes(b"")
    message = error_of(str(root))
    assert "2 of 100 images cannot be read" in message and f"--data {root} --size 32 --skip-broken" in message
    assert "b/030.png (it is empty)" in message and "a/007.png (image file is truncated" in message
    run = CliRunner().invoke(dataset.main, ["--data", str(root)])
    assert run.exit_code == 1 and message in run.output and "Traceback" not in run.output
    with pytest.raises(click.ClickException, match=f"--data {root} --size 32 --squash --train-on-all --skip-broken$"):
        open_dataset(str(root), squash=True, train_on_all=True)
    with pytest.raises(click.ClickException, match=r"--skip-broken \(--max-pixels N packs larger ones\)$"):
        open_dataset(str(root), max_pixels=1500)
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


def test_where_packs_cannot_lie(tmp_path, monkeypatch):
    root = class_folders(tmp_path / ("猫" * 80), {"a": 3, "b": 3})  # of 240 bytes; a pack's name has more to say
    pack = open_dataset(str(root)).pack
    assert pack.name.startswith("猫" * 21 + "-32-")
    monkeypatch.setenv("INFOSCC_CACHE", str(root / "packs"))
    assert "lies within the data: set INFOSCC_CACHE" in error_of(str(root))
    monkeypatch.setenv("INFOSCC_CACHE", str(root / ".packs"))  # hidden, so it is not looked at
    assert len(open_dataset(str(root))) > 0


def test_labels_that_would_fill_the_memory(tmp_path, monkeypatch):
    root = str(class_folders(tmp_path / "x", {"a": 3, "b": 3}))
    assert len(open_dataset(root)) == 4
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 63, "SC_PAGE_SIZE": 1}[name])
    with pytest.raises(click.ClickException, match=r"2 labels of 4 images take 0\.0 GB, more than half of the memory"):
        open_dataset(root)


def test_the_sheet_has_a_bounded_size(tmp_path, monkeypatch):
    ds = open_dataset(str(class_folders(tmp_path / "x", {"a": 3, "b": 3})))
    assert dataset.sheet(ds).shape == (2 * 32, 8 * 32, 3)
    monkeypatch.setattr(dataset, "MAX_PIXELS", 2 * 8 * 16 * 16)
    assert dataset.sheet(ds).shape == (2 * 16, 8 * 16, 3)


def test_skip_broken_lists_what_it_skips(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 5, "b": 5})
    (root / "b" / "002.png").write_text("not an image")
    run = CliRunner().invoke(dataset.main, ["--data", str(root), "--skip-broken"])
    assert run.exit_code == 0 and "b/002.png" in run.output and "1 unreadable" in run.output
    run = CliRunner().invoke(dataset.main, ["--data", str(root)])
    assert "1 unreadable images were left out when it was packed" in run.output


def test_skip_broken_skips_what_cannot_be_read(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 5, "b": 5})
    (root / "a" / "device.png").symlink_to("/dev/zero")  # endless
    (root / "a" / "gone.png").symlink_to("nowhere.png")
    (root / "a" / "self.png").symlink_to("self.png")
    (root / "b" / "memory.png").symlink_to("/proc/self/mem")  # reading it gives an I/O error
    os.mkfifo(root / "b" / "pipe.png")  # nobody writes to it
    message = error_of(str(root))
    assert "5 of 15 images" in message and "--skip-broken" in message
    for name, why in (("device", "not a regular file"), ("gone", "No such file"), ("self", "Too many levels")):
        assert f"a/{name}.png ({why}" in message or f"a/{name}.png (it is {why}" in message, message
    assert "b/memory.png (" in message and "b/pipe.png (it is not a regular file)" in message
    assert open_dataset(str(root), skip_broken=True).skipped == 5


def test_decompression_bomb(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 3, "b": 3})
    header = struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (root / "a" / "bomb.png").write_bytes(bomb)
    assert "bomb.png" in error_of(str(root))


def test_squash_is_bilinear_without_antialiasing(tmp_path):
    def resized(x: np.ndarray, size: int) -> np.ndarray:  # what torchvision's Resize does to a tensor
        pixels = torch.from_numpy(x).permute(2, 0, 1)[None].float()
        options = dict(mode="bilinear", align_corners=False, antialias=False)
        return torch.nn.functional.interpolate(pixels, (size, size), **options)[0].permute(1, 2, 0).numpy()

    draw = np.random.default_rng(0)
    for (height, width), size in (((218, 178), 128), ((40, 50), 64), ((128, 128), 128), ((300, 64), 32)):
        x = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        got = dataset.squashed(Image.fromarray(x), size)
        assert got.shape == (size, size, 3) and got.dtype == np.uint8
        assert np.abs(got - resized(x, size)).max() < 0.51
        assert (got != np.rint(resized(x, size))).mean() < 0.001

    noise = draw.integers(0, 256, (20, 218, 178, 3), dtype=np.uint8)
    celeba(tmp_path / "c")
    for i, x in enumerate(noise):
        Image.fromarray(x).save(tmp_path / "c" / "img_align_celeba" / f"{i + 1:06}.jpg", quality=98)
    squashed, cropped = open_dataset(str(tmp_path / "c"), squash=True), open_dataset(str(tmp_path / "c"))
    decoded = np.asarray(Image.open(tmp_path / "c" / "img_align_celeba" / "000001.jpg"))
    assert np.abs(squashed.images[0] - resized(decoded, 128)).max() < 0.51
    # The two have packs and fingerprints of their own, so no stage takes one for the other.
    assert squashed.info()["squash"] and not cropped.info()["squash"] and squashed.fingerprint != cropped.fingerprint
    assert open_dataset(str(tmp_path / "c"), squash=True).pack == squashed.pack != cropped.pack
    assert squashed.part("val").squash and np.array_equal(squashed.labels, cropped.labels)


def test_train_on_all(tmp_path):
    values = celeba(tmp_path / "c")
    ds = open_dataset(str(tmp_path / "c"), 32, train_on_all=True, preset="none")
    assert ds.splits == {"train": 20, "val": 4, "test": 2} and ds.info()["train_on_all"]
    assert np.array_equal(ds.labels, values) and np.array_equal(ds.images[14:18], ds.part("val").images)
    assert (
        ds.names == [f"img_align_celeba/{i + 1:06}.jpg" for i in range(20)] and ds.part("test").names == ds.names[18:]
    )
    plain = open_dataset(str(tmp_path / "c"), 32)
    assert plain.fingerprint != ds.fingerprint and len(plain) == 14 and plain.names == ds.names[:14]


def test_names_of_images(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 12, "b": 2})
    (root / "a" / "005.png").write_text("no image")
    ds = open_dataset(str(root), skip_broken=True)
    assert sorted(ds.names + ds.part("val").names) == [
        f"{c}/{i:03}.png" for c, n in (("a", 12), ("b", 2)) for i in range(n) if i != 5
    ]
    for part in (ds, ds.part("val")):
        red = [60 * (name[0] == "b") + int(name[2:5]) for name in part.names]
        assert red == part.images[:, 0, 0, 0].tolist()
    fashion(tmp_path / "f")
    assert open_dataset(str(tmp_path / "f"), split="val").names == [f"val/{i}" for i in range(10)]


def test_data_is_found_from_other_folders(tmp_path, monkeypatch):
    class_folders(tmp_path / "x" / "pets", {"a": 4, "b": 4})
    monkeypatch.chdir(tmp_path / "x")
    info = open_dataset("pets").info()
    monkeypatch.chdir(tmp_path)
    assert info["data"] == str(tmp_path / "x" / "pets") and info["name"] == "pets"
    assert open_dataset(info["data"]).fingerprint == info["fingerprint"]


def test_class_that_cannot_be_read(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 6, "b": 6})
    for file in (root / "b").iterdir():
        file.write_text("no image")
    assert "6 of 12 images cannot be read" in error_of(str(root))
    assert "no training image of the class b can be read" in error_of(str(root), skip_broken=True)
    shutil.rmtree(root / "b")
    assert open_dataset(str(root)).label_names == ["a"]  # one class is allowed


def test_many_unreadable_images_are_counted(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 30, "b": 3})
    for i in range(25):
        (root / "a" / f"{i:03}.png").write_text("no image")
    message = error_of(str(root))
    assert "25 of 33 images" in message and message.count("it is no image") == 10 and "and 15 more" in message


def test_max_pixels(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 4, "b": 4})
    paint(root / "a" / "large.png", size=(60, 50))
    message = error_of(str(root), max_pixels=2999)
    assert "a/large.png (60 x 50 pixels are more than --max-pixels 2999)" in message
    run = run_main("--data", root, "--max-pixels", 2999, "--skip-broken")
    assert run.exit_code == 0 and "skipped" in run.output and "large.png" in run.output
    run = run_main("--data", root, "--max-pixels", layouts.MAX_TABLE * 2)  # more than the default
    assert run.exit_code == 1 and "was packed without 1 unreadable images" in run.output
    shutil.rmtree(tmp_path / "cache")
    assert "a/large.png" in (
        open_dataset(str(root), max_pixels=3000).names + open_dataset(str(root), split="val").names
    )


def test_cache_without_a_home(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    fallback = tmp_path / "tmp" / f"infoscc-gan-{os.getuid()}"
    monkeypatch.setenv("INFOSCC_CACHE", "~/packs")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dataset.cache_folder() == tmp_path / "packs"
    monkeypatch.delenv("INFOSCC_CACHE")
    assert dataset.cache_folder() == tmp_path / ".cache" / "infoscc-gan" and capsys.readouterr().err == ""
    monkeypatch.setenv("HOME", "/proc/nowhere")  # cannot be made, as in a container of another user
    assert dataset.cache_folder() == fallback and f"packs go to {fallback}" in capsys.readouterr().err
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # no entry of the user
    assert dataset.cache_folder() == fallback
    assert len(open_dataset(str(class_folders(tmp_path / "x", {"a": 4, "b": 4})))) == 6 and fallback.is_dir()


def test_notes_are_printed_by_one_process(tmp_path, monkeypatch, capsys):
    root = class_folders(tmp_path / "x", {"a": 4})
    (root / "more.csv").write_text("x")
    notes = layouts.scan(*files.list_files(root)).notes
    for _ in range(2):  # packed or not
        ds = open_dataset(str(root))
        err = capsys.readouterr().err
        assert len(notes) == 2 and all(err.count(f"Note on {root}: {note}\n") == 1 for note in notes)
    ds.part("val")
    assert capsys.readouterr().err == ""
    (root / "more.csv").unlink()
    open_dataset(str(root))  # the same pack, but no table beside it any more
    assert capsys.readouterr().err == f"Note on {root}: {notes[1]}\n"
    monkeypatch.setenv("RANK", "1")
    open_dataset(str(root))
    assert "Note" not in capsys.readouterr().err


def test_attribute_that_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(critters, "SPLITS", {"train": 4, "val": 4})
    for spec, words in (
        ("Eyeglases", ["'Eyeglases'", "Eyeglasses, Hat", "class"]),
        ("Hat,Hat", ["twice"]),
        ("celeba5", ["Bald"]),
    ):
        with pytest.raises(click.ClickException) as caught:
            open_dataset("critters", attributes=spec)
        assert all(w in caught.value.message for w in words)
    assert open_dataset("critters", attributes="Hat, Necktie").attributes == "Hat,Necktie"
    for n in (5, 10, 15):
        names = layouts.CELEBA[f"celeba{n}"].split(",")
        assert len(set(names)) == n and dataset.select(f"celeba{n}", "x", "", [], sorted(names)) == (
            ",".join(names),
            names,
        )
    celeba(tmp_path / "c")
    with pytest.raises(click.ClickException, match="'class'"):
        open_dataset(str(tmp_path / "c"), attributes="class")


# ---------------------------------------------------------------------------------------------------------------------
# The cache.


def test_packed_once_by_content(tmp_path, monkeypatch):
    root = class_folders(tmp_path / "x", {"a": 5, "b": 5})
    first = open_dataset(str(root))
    monkeypatch.setattr(dataset, "load_image", None)  # whoever decodes from here on fails
    monkeypatch.setattr(layouts, "scan", None)
    assert open_dataset(str(root), split="val").pack == first.pack  # nothing was even read
    monkeypatch.undo()
    os.environ["INFOSCC_CACHE"] = str(tmp_path / "cache")
    shutil.copytree(root, tmp_path / "y")
    monkeypatch.setattr(dataset, "load_image", None)
    copy = open_dataset(str(tmp_path / "y"))
    assert copy.pack == first.pack and copy.name == "y"
    monkeypatch.undo()
    os.environ["INFOSCC_CACHE"] = str(tmp_path / "cache")
    paint(root / "a" / "000.png", 7)  # of the same size: noticed by its time
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
    assert sorted(p.name for p in (tmp_path / "cache").rglob("*")) == [".lock", "seen"]


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
    for damage in ("", "[]", "{}", "\0"):
        (pack / "info.json").write_text(damage)
        with pytest.raises(click.ClickException, match=f"{pack.name} is damaged"):
            open_dataset(str(root))
    shutil.rmtree(pack)
    for memo, damage in zip([*(tmp_path / "cache" / "seen").iterdir()] * 4, ("", "[]", "{}", "\0"), strict=True):
        memo.write_text(damage)
        assert len(open_dataset(str(root))) == 6  # a damaged memo is written anew


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


def test_streams_end_with_all_images(tmp_path):
    ds = open_dataset(str(class_folders(tmp_path / "x", {"a": 8, "b": 8})))
    for workers in (0, 1, 3):
        parts = [x for x, _ in ds.sequential(4, "cpu", workers)]
        assert torch.equal(torch.cat(parts), torch.from_numpy(np.array(ds.images))) and len(parts) == -(-len(ds) // 4)


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


def test_command_on_an_ascii_terminal(tmp_path):
    root = class_folders(tmp_path / "x", {"été": 4, "b": 4})
    ascii = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run([sys.executable, ROOT / "dataset.py", "--data", root], env=ascii, capture_output=True)
    assert run.returncode == 0 and b"Traceback" not in run.stderr, run.stderr
    assert "été".encode() in run.stdout


def test_options_of_the_command(tmp_path):
    values = celeba(tmp_path / "c")
    (tmp_path / "c" / "img_align_celeba" / "000020.jpg").unlink()
    run = run_main("--data", tmp_path / "c", "--size", 32, "--strict")
    assert run.exit_code == 1 and "--strict refuses" in run.output
    run = run_main("--data", tmp_path / "c", "--size", 32, "--train-on-all", "--squash")
    assert (
        run.exit_code == 0 and re.search(r"images +19 +4 +1\n", run.output) and re.search("preset +celeba", run.output)
    )
    assert f"Note on {tmp_path / 'c'}: 1 of 20 rows" in run.output and re.search(
        rf"source +{tmp_path / 'c'}\n", run.output
    )
    assert re.search(rf"Bald +{values[:19, 0].sum()} ", run.output) and "5, multi-label" in run.output
    run = run_main("--data", tmp_path / "c", "--preset", "none")
    assert "6, multi-label" in run.output and re.search("preset +none", run.output) and "128 px" in run.output
    run = run_main("--data", tmp_path / "c", "--preset", "other")
    assert run.exit_code == 1 and "no such preset" in run.output


def test_another_folder_is_not_taken_for_afhq(tmp_path):
    folder = class_folders(tmp_path / "data" / "afhq", {"cat": 12, "dog": 12, "horse": 12})
    assert "is not AFHQ" in error_of("afhq", 32)
    pack = Path(open_dataset(str(folder), 32, preset="afhq").pack)
    with pytest.raises(click.ClickException, match="is not AFHQ: its classes are cat, dog, horse"):
        open_dataset("afhq", 32)  # though its pack is there
    assert pack.exists()
