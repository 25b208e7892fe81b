"""layouts.py on files made here: every layout, every kind of image, and what is wrong with each."""

import csv
import json
import os
import shutil
import types
import unicodedata
import warnings
import zipfile
from pathlib import Path

import click
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources import (  # noqa: F401
    celeba,
    class_folders,
    counts,
    error_of,
    fashion,
    paint,
    places,
    stylegan_zip,
    write_csv,
    write_idx,
)

import critters
import layouts
from dataset import open_dataset

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
    class_folders(tmp_path / "c" / "wrapped", {"x": 4, "y": 4})
    (tmp_path / "c" / "mylabels.csv").write_text("x")
    assert scan(tmp_path / "c").classes == ["x", "y"]


def test_folders_that_are_no_classes_are_said(tmp_path):
    class_folders(tmp_path / "animals", {"cat": 3, "birds/owl": 3, "birds/hen": 3})
    note = "the images of class birds lie in folders below it, which do not count as classes"
    assert notes_of(tmp_path / "animals") == [note]
    class_folders(tmp_path / "flowers", {"daisy": 3, "rose": 3, "flowers/daisy": 3, "flowers/rose": 3})
    assert "flowers/flowers has a folder daisy, which is a class beside it" in error_of(str(tmp_path / "flowers"))
    class_folders(tmp_path / "zips", {"cat/cat": 3, "dog/dog": 3})
    assert scan(tmp_path / "zips").classes == ["cat", "dog"]
    class_folders(tmp_path / "places", {"train_station/day": 3, "test_track/day": 3, "car/day": 3})
    assert scan(tmp_path / "places").classes == ["car", "test_track", "train_station"]
    class_folders(tmp_path / "ffhq", {"00000": 3, "00001": 3})
    note = "classes called 00000 look like the shards of StyleGAN's layout, without its dataset.json"
    assert notes_of(tmp_path / "ffhq") == [note]
    class_folders(tmp_path / "saved", {"a": 3, "b": 3})
    for name in ("a/1.jpg_large", "b/2.dcm", "b/notes.txt"):
        (tmp_path / "saved" / name).touch()
    note = "2 files are not read, like a/1.jpg_large: images end in .png, .jpg or the like"
    assert notes_of(tmp_path / "saved") == [note]


def test_tables_as_other_programs_write_them(tmp_path):
    root = class_folders(tmp_path / "x", {"images": 4})
    lines = [f"{i:03}.png,{'ab'[i % 2]}" for i in range(4)]
    for text in (
        ["file,label,,", *(line + ",," for line in lines)],  # a spreadsheet with two empty columns
        ["sep=,", "file,label", *lines],  # for Excel
        ["sep=;", "file;label", *(line.replace(",", ";") for line in lines)],
    ):
        (root / "labels.csv").write_text("\n".join(text))
        assert scan(root).classes == ["a", "b"] and scan(root).class_of == [0, 1, 0, 1]
    (root / "labels.csv").write_text("\n".join([",file,label", *(f"{i},{line}" for i, line in enumerate(lines))]))
    assert "labels.csv line 1: the first column numbers the rows" in error_of(str(root))
    (root / "labels.csv").write_text("\n".join(["file,label", *lines[:3], "003.png,a,b"]))
    assert "line 5: 2 values, but there are 1 names" in error_of(str(root))
    celeba(tmp_path / "c", 30, form="csv")
    table = next((tmp_path / "c").rglob("list_attr_celeba.csv"))
    head, *rows = table.read_text().splitlines()
    table.write_text("\n".join([f",{head}", *(f"{i},{row}" for i, row in enumerate(rows))]))
    assert "none of its 30 rows names an image that is there; the last one names 29" in error_of(str(tmp_path / "c"))


def test_folders_that_may_be_splits(tmp_path):
    for name, folders, words in (
        ("kaggle", ("training_set", "test_set"), "looks like a split, not like a class: call it t"),
        ("inside", ("cat", "dog"), "put the splits above the classes"),
    ):
        for folder in folders:
            class_folders(
                tmp_path / name / folder, {"train": 3, "val": 2} if name == "inside" else {"cats": 3, "dogs": 3}
            )
        assert words in error_of(str(tmp_path / name))
    for split in ("val", "test"):
        for i in range(3):
            paint(tmp_path / "flat" / split / f"{i}.png")
    assert "is in no class folder" in error_of(str(tmp_path / "flat"))
    for c in ("cats", "dogs"):
        class_folders(tmp_path / "places" / c, {"indoors": 3, "outdoors": 3})
    assert scan(tmp_path / "places").classes == ["cats", "dogs"]
    assert notes_of(tmp_path / "places") == [
        "several classes have a folder called indoors: folders within classes do not count"
    ]
    for split in ("seg_train", "seg_test"):  # as Kaggle has them, with a third that has no classes
        class_folders(tmp_path / "intel" / split / split, {"forest": 3, "sea": 3})
    paint(tmp_path / "intel" / "seg_pred" / "seg_pred" / "0.png")
    message = error_of(str(tmp_path / "intel"))
    assert "seg_test looks like a split, not like a class: call it test, and move seg_pred away" in message
    # A table that names no splits leaves them to the folders.
    rows = [["file", "label"]]
    for split, count in (("train", 8), ("val", 4)):
        for i in range(count):
            paint(tmp_path / "table" / split / f"{i}{split}.png")
            rows.append([f"{split}/{i}{split}.png", "ab"[i % 2]])
    write_csv(tmp_path / "table" / "labels.csv", rows)
    assert scan(tmp_path / "table").splits == ["train"] * 8 + ["val"] * 4


@pytest.mark.parametrize(("first", "second"), [("training", "testing"), ("train", "eval"), ("Train", "dev")])
def test_names_of_splits(tmp_path, first, second):
    class_folders(tmp_path / "x" / first, {"a": 3, "b": 3})
    class_folders(tmp_path / "x" / second, {"a": 2, "b": 2})
    ds = open_dataset(str(tmp_path / "x"))
    assert ds.label_names == ["a", "b"] and ds.splits == {"train": 6, "val": 4}


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


@pytest.mark.parametrize("below", ["", "images/", "data/images/"])
def test_folders_of_splits_under_a_table(tmp_path, below):
    """They keep their splits, also below folders that hold them all; some images beside them are refused."""
    root, rows = tmp_path / "x", [["file", "label"]]
    for i in range(12):
        paint(root / below / ("train" if i < 8 else "val") / f"{i}.png", 10 * i)
        rows.append([f"{below}{'train' if i < 8 else 'val'}/{i}.png", "ab"[i % 2]])
    write_csv(root / "labels.csv", rows)
    assert [len(open_dataset(str(root), split=s)) for s in ("train", "val")] == [8, 4]
    assert open_dataset(str(root), split="val").names == [row[0] for row in rows[9:]]
    paint(root / below / "extra.png", 200)
    write_csv(root / "labels.csv", [*rows, [f"{below}extra.png", "a"]])
    with pytest.raises(click.ClickException, match=f"{below}extra.png lies in no folder of a split"):
        open_dataset(str(root))
    # One folder of that name is none: here they are kinds of vehicles.
    vehicles = [["file", "label"]]
    for i, kind in enumerate(("train", "car") * 6):
        paint(tmp_path / "v" / below / kind / f"{i}.png", 10 * i)
        vehicles.append([f"{below}{kind}/{i}.png", kind])
    write_csv(tmp_path / "v" / "labels.csv", vehicles)
    assert len(open_dataset(str(tmp_path / "v"), split="val")) == 2


def test_all_images_in_val_is_said(tmp_path):
    rows = [["file", "label", "split"]]
    for i in range(4):
        paint(tmp_path / "x" / f"{i}.png", 10 * i)
        rows.append([f"{i}.png", "ab"[i % 2], "val"])
    write_csv(tmp_path / "x" / "labels.csv", rows)
    assert "no images are left for train:" in error_of(str(tmp_path / "x"))


@pytest.mark.parametrize(("form", "nested"), [("txt", False), ("csv", True)])
def test_celeba(tmp_path, form, nested):
    values = celeba(tmp_path / "data" / "celeba", form=form, nested=nested)
    ds = open_dataset("celeba")
    assert ds.size == 128 and ds.label_kind == "multi-label" and ds.attributes == layouts.CELEBA["celeba5"]
    assert ds.info()["splits"] == {"train": 14, "val": 4, "test": 2}
    assert np.array_equal(ds.labels, values[:14, [0, 1, 3, 4, 5]])
    assert np.abs(ds.images[:, 64, 64, 0].astype(int) - 10 * np.arange(14)).max() <= 3
    whole = open_dataset(str(tmp_path / "data" / "celeba"), 128, split="val", preset="none")
    assert whole.label_names == ["Bald", "Eyeglasses", "Male", "Mustache", "Wearing_Hat", "Wearing_Necktie"]
    assert np.array_equal(whole.labels, values[14:18])


def test_celeba_images_of_one_name(tmp_path):
    celeba(tmp_path / "c", 30)
    paint(tmp_path / "c" / "img_align_celeba" / "more" / "000001.jpg")
    message = error_of(str(tmp_path / "c"))
    assert "may be img_align_celeba/000001.jpg or img_align_celeba/more/000001.jpg" in message


def test_celeba_without_partition(tmp_path):
    celeba(tmp_path / "c", 30, partition=False)
    assert open_dataset(str(tmp_path / "c")).info()["splits"] == {"train": 27, "val": 3}


def test_celeba_with_two_tables(tmp_path):
    celeba(tmp_path / "c", 30)
    for table in ("list_attr_celeba", "list_eval_partition"):
        shutil.copyfile(tmp_path / "c" / f"{table}.txt", tmp_path / "c" / f"{table}.csv")
        assert f"has {table}.csv and {table}.txt" in error_of(str(tmp_path / "c"))
        (tmp_path / "c" / f"{table}.csv").unlink()


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
    assert notes_of(tmp_path / "b.zip") == ["no image is of the class none of these"]
    stylegan_zip(tmp_path / "d.zip", labels, label_names=["cat", "dog", "wild", *map(str, range(9))])
    assert notes_of(tmp_path / "d.zip") == ["no image is of the class 0 (nor of 8 others)"]
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


@pytest.mark.parametrize(("below", "suffix"), [("", ".gz"), ("raw", ""), ("FashionMNIST/raw", "")])
def test_fashion_mnist(tmp_path, below, suffix):
    fashion(tmp_path / "data" / "fashion-mnist" / below, suffix=suffix)
    ds = open_dataset("fashion-mnist")
    assert ds.size == 32 and ds.label_names == layouts.FASHION and ds.info()["splits"] == {"train": 30, "val": 10}
    assert np.array_equal(ds.images[:, 16, 16], np.repeat(np.arange(30)[:, None] * 5, 3, 1))
    assert np.array_equal(ds.labels.argmax(1), np.arange(30) % 10)


def test_other_idx_sets_keep_their_names(tmp_path, capsys):
    fashion(tmp_path / "MNIST" / "raw")
    shutil.copytree(tmp_path / "MNIST" / "raw", tmp_path / "clothes")
    assert open_dataset(str(tmp_path / "MNIST")).label_names == [str(i) for i in range(10)]
    assert open_dataset(str(tmp_path / "clothes")).label_names == layouts.FASHION
    capsys.readouterr()
    open_dataset(str(tmp_path / "clothes"))
    assert "taken for Fashion-MNIST" in capsys.readouterr().err
    fashion(tmp_path / "fashion-lab" / "data" / "digits")  # far above, a name says nothing
    assert "taken for Fashion-MNIST" in notes_of(tmp_path / "fashion-lab" / "data" / "digits")[0]
    for path in (tmp_path / "fashion-lab" / "data" / "digits").iterdir():  # as 7-Zip calls them
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert scan(tmp_path / "fashion-lab" / "data" / "digits").classes == layouts.FASHION
    for folders in ("mnist-from-torchvision", "fashion/MNIST/raw", "Fashion-MNIST/digits/kmnist.old"):
        shutil.copytree(tmp_path / "clothes", tmp_path / folders)
        assert (
            open_dataset(str(tmp_path / folders)).label_names[0] == "0" and "taken for" not in capsys.readouterr().err
        )
    assert layouts.recognise(tmp_path / "fashion" / "MNIST") == ""
    shutil.copytree(tmp_path / "clothes", tmp_path / "mnist" / "FashionMNIST")
    assert layouts.recognise(tmp_path / "mnist" / "FashionMNIST") == "fashion-mnist"
    (tmp_path / "mnist" / "FashionMNIST").rename(tmp_path / "mnist" / "fmnist")
    assert layouts.recognise(tmp_path / "mnist" / "fmnist") == "fashion-mnist"


# ---------------------------------------------------------------------------------------------------------------------
# Wrong sources.


def test_wrong_sources(tmp_path):
    assert f"no folder or zip {tmp_path / 'nothing'};" in error_of(str(tmp_path / "nothing"))
    assert "critters, afhq, celeba, fashion-mnist" in error_of("criters")
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


def test_name_that_is_not_utf8(tmp_path):
    folder = os.fsencode(tmp_path / "x") + b"/caf\xe9"
    os.makedirs(folder)
    paint(tmp_path / "a.png")
    (tmp_path / "a.png").rename(os.fsdecode(folder) + "/a.png")
    assert "not UTF-8" in error_of(str(tmp_path / "x"))


def test_quotes_in_labels_csv(tmp_path):
    for i in range(6):
        paint(tmp_path / "c" / f"{i}.png", i)
    table = tmp_path / "c" / "labels.csv"
    rows = [f'{i}.png, "{"xy"[i % 2]}, z"' for i in range(5)]
    table.write_text('file,class\n"0.png,x\n' + "\n".join(rows) + "\n")
    assert "labels.csv line 3 cannot be read" in error_of(str(tmp_path / "c"))
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
        ("list_attr_celeba.txt", 7, lambda s: ["999" + s[3:]], ["has no line", "000005.jpg"]),
        ("list_attr_celeba.txt", 7, lambda s: ["000001.jpg" + s[10:]], ["line 7", "000001.jpg is there twice"]),
        ("list_eval_partition.txt", 4, lambda s: [s[:-1] + "5"], ["list_eval_partition.txt line 4", "'5'"]),
        ("list_eval_partition.txt", 4, lambda s: [], ["000004.jpg", "list_eval_partition.txt"]),
        ("list_eval_partition.txt", 4, lambda s: [s, s], ["line 5", "000004.jpg is there twice"]),
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
    assert "no images in img_align_celeba/" in error_of(str(tmp_path / "c"))


def test_empty_partition_and_csv_of_bytes(tmp_path):
    celeba(tmp_path / "c")
    (tmp_path / "c" / "list_eval_partition.txt").write_text("")
    assert "list_eval_partition.txt cannot be read: it is empty" in error_of(str(tmp_path / "c"))
    (tmp_path / "c" / "list_eval_partition.txt").write_text("\n")
    missing = "list_eval_partition.txt has no line for the image img_align_celeba/000001.jpg"
    assert missing in error_of(str(tmp_path / "c"))
    (tmp_path / "c" / "list_eval_partition.txt").write_bytes(b"a 0\n\xff\xfe\x00")
    assert "list_eval_partition.txt line 2 is not UTF-8" in error_of(str(tmp_path / "c"))


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
        ([], ["labels.csv cannot be read: it is empty"]),
        ([["", ""]], ["line 1", "header"]),
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
        ([[n, 0.5] for n in names], "0.5 is no label"),
        ([[n, []] for n in names], "entry 0: 0 values"),
    ):
        stylegan_zip(tmp_path / "a.zip", labels)
        assert words in error_of(str(tmp_path / "a.zip")), labels
    for labels in ([[n, 1, 2] for n in names], [[1, 1] for _ in names], [names], {"a": 1}, 7, []):
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
    for twice in (("a/0.png", "a/0.png"), ("a/0.png", "./a/0.png")):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in twice:
                archive.writestr(name, b"x")
        assert "is there twice" in error_of(str(tmp_path / "a.zip"))
    (tmp_path / "beside").mkdir()
    (tmp_path / "a.zip").rename(tmp_path / "beside" / "A.ZIP")
    assert "is there twice" in error_of(str(tmp_path / "beside"))
    (tmp_path / "beside" / "README.md").touch()
    assert "A.ZIP is not unpacked: give it as --data" in error_of(str(tmp_path / "beside"))
    assert "--data is empty" in error_of("")


def test_more_labels_lists_and_images_than_anybody_has(tmp_path, monkeypatch):
    """Each takes memory out of proportion to its bytes in the file."""
    for name in ("MAX_LABELS", "MAX_LISTS", "MAX_IMAGES"):
        monkeypatch.setattr(layouts, name, 5)
    names = [f"{i}.png" for i in range(6)]
    stylegan_zip(tmp_path / "a.zip", [[n, i] for i, n in enumerate(names)])
    assert "it has more than 5 lists" in error_of(str(tmp_path / "a.zip"))
    class_folders(tmp_path / "many", dict.fromkeys("abcdef", 2))
    assert "6 label names are more than 5" in error_of(str(tmp_path / "many"))
    fashion(tmp_path / "idx", 6)
    assert "6 images are more than 5" in error_of(str(tmp_path / "idx"))


def test_two_idx_sets_in_one_folder(tmp_path):
    fashion(tmp_path / "x" / "FashionMNIST" / "raw")
    assert scan(tmp_path / "x").classes[0] == "T-shirt/top"
    fashion(tmp_path / "x" / "MNIST" / "raw", suffix=".gz")
    assert "in FashionMNIST/raw and in MNIST/raw: give one of these folders" in error_of(str(tmp_path / "x"))
    for path in (tmp_path / "x").rglob("*-ubyte*"):  # as some programs spell them
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert "in FashionMNIST/raw and in MNIST/raw: give one of these folders" in error_of(str(tmp_path / "x"))


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


# ---------------------------------------------------------------------------------------------------------------------
# Presets.


def afhq(root: Path) -> Path:
    for split, n in (("train", 3), ("val", 1)):
        class_folders(root / split, {"cat": n, "dog": n, "wild": n})
    return root


def test_recognise(tmp_path):
    recognise = layouts.recognise
    assert recognise(None) == "critters"
    assert recognise(afhq(tmp_path / "animals")) == "afhq"
    shutil.make_archive(str(tmp_path / "wrapped"), "zip", tmp_path, "animals")
    assert recognise(tmp_path / "wrapped.zip") == "afhq"
    assert recognise(class_folders(tmp_path / "flat", {"cat": 2, "dog": 2, "wild": 2})) == ""
    assert recognise(class_folders(tmp_path / "one" / "train", {"cat": 2, "dog": 2, "wild": 2}).parent) == ""
    class_folders(tmp_path / "animals" / "train", {"fish": 2})
    assert recognise(tmp_path / "animals") == ""
    celeba(tmp_path / "faces" / "Img")
    assert recognise(tmp_path / "faces") == "celeba"
    celeba(tmp_path / "kaggle", form="csv", nested=True)
    assert recognise(tmp_path / "kaggle") == "celeba"
    table = tmp_path / "kaggle" / "list_attr_celeba.csv"
    table.write_text(table.read_text().replace("Bald", "Round"))  # other data in this layout
    assert recognise(tmp_path / "kaggle") == ""
    fashion(tmp_path / "clothes" / "raw")
    assert recognise(tmp_path / "clothes") == "fashion-mnist"
    shutil.copytree(tmp_path / "clothes", tmp_path / "MNIST")
    assert recognise(tmp_path / "MNIST") == ""


def test_presets_are_taken_by_name_by_layout_or_on_request(tmp_path):
    root = afhq(tmp_path / "data" / "afhq")
    assert (
        layouts.preset_of("afhq") == layouts.preset_of(str(root)) == "afhq"
        and layouts.preset_of("critters") == "critters"
    )
    assert layouts.preset_of("afhq", "none") == "" and layouts.preset_of(str(root), "celeba") == "celeba"
    with pytest.raises(click.ClickException, match="--preset imagenet"):
        layouts.preset_of("afhq", "imagenet")
    ds = open_dataset(str(root))
    assert ds.preset == ds.part("val").preset == ds.info()["preset"] == "afhq" and ds.size == 256
    ds = open_dataset(str(root), preset="none")
    assert ds.preset == "" and ds.size == 32
    assert open_dataset(str(root), preset="celeba").size == 128 and open_dataset(str(root), 64).size == 64
    values = celeba(tmp_path / "faces")
    ds = open_dataset(str(tmp_path / "faces"))
    assert ds.preset == "celeba" and ds.attributes == layouts.CELEBA["celeba5"] and ds.size == 128
    assert np.array_equal(ds.labels, values[:14, [0, 1, 3, 4, 5]])
    assert len(open_dataset(str(tmp_path / "faces"), preset="none").label_names) == 6


def test_where_data_is_looked_for(tmp_path, monkeypatch):
    assert layouts.data_folder("afhq") == tmp_path / "data" / "afhq"
    for name, what in (("afhq", "images"), ("celeba", "images"), ("fashion-mnist", "four ...-ubyte.gz files")):
        message = error_of(name)
        assert f"{tmp_path / 'data' / name} does not exist" in message and what in message and "INFOSCC_DATA" in message
    monkeypatch.delenv("INFOSCC_DATA")
    assert layouts.data_folder("afhq") == Path("data/afhq")
    monkeypatch.chdir(tmp_path)
    assert f"no folder or zip {tmp_path / 'photos'};" in error_of("photos")
    for data in ("~nosuchuser", "x" * 5000, "a\0b", "a/" * 3000):
        assert "there is no folder or zip" in error_of(data)
    assert "Not a directory" in error_of("/dev/null")


# ---------------------------------------------------------------------------------------------------------------------
# What is understood, and what is said about the rest.


def notes_of(path: Path) -> list[str]:
    return scan(path).notes


def scan(path: Path) -> layouts.Source:
    return layouts.scan(*layouts.list_files(path))


@pytest.mark.parametrize("wrap", ["", "CelebAMask-HQ"])
def test_celeba_hq(tmp_path, wrap):
    root = tmp_path / "x" / wrap
    for i in range(12):
        paint(root / "CelebA-HQ-img" / f"{i}.jpg", 10 * i)
        paint(root / "CelebAMask-HQ-mask-anno" / "0" / f"{i:05}_skin.png")
    lines = ["12", "Smiling Eyeglasses", *(f"{i}.jpg  {1 - 2 * (i % 2)} {1 - 2 * (i // 2 % 2)}" for i in range(12))]
    (root / "CelebAMask-HQ-attribute-anno.txt").write_text("\n".join(lines) + "\n")
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text("idx orig_idx orig_file\n")
    (root / "CelebAMask-HQ-pose-anno.txt").write_text("12\n")
    ds = open_dataset(str(tmp_path / "x"))
    assert (
        ds.label_names == ["Smiling", "Eyeglasses"] and sum(ds.splits.values()) == 12 and notes_of(tmp_path / "x") == []
    )
    number = np.rint(ds.images[:, 16, 16, 0] / 10)
    assert np.array_equal(ds.labels, np.stack([number % 2 == 0, number // 2 % 2 == 0], 1))
    assert ds.preset == ""  # the paper's settings are for the aligned photos


def test_part_of_celeba(tmp_path):
    values = celeba(tmp_path / "c")
    for i in (2, 7, 19):
        (tmp_path / "c" / "img_align_celeba" / f"{i + 1:06}.jpg").unlink()
    source = scan(tmp_path / "c")
    kept = [i for i in range(20) if i not in (2, 7, 19)]
    assert np.array_equal(source.values, values[kept]) and source.splits.count("test") == 1
    note = "3 of 20 rows in list_attr_celeba.txt have no image in img_align_celeba/ (--strict refuses that)"
    assert source.absent == 3 and source.notes == [note]
    assert note in error_of(str(tmp_path / "c"), strict=True)
    assert len(open_dataset(str(tmp_path / "c"))) == 12
    with pytest.raises(click.ClickException, match="3 of 20 rows"):
        open_dataset(str(tmp_path / "c"), strict=True)  # packed by now
    celeba(tmp_path / "whole")
    assert len(open_dataset(str(tmp_path / "whole"), strict=True)) == 14 and notes_of(tmp_path / "whole") == []


def test_exclusive_columns_are_classes(tmp_path):
    labels = [[f"{i}.png", [float(i % 3 == c) for c in range(3)]] for i in range(12)]
    stylegan_zip(tmp_path / "a.zip", labels, label_names=["x", "y", "z"])
    ds = open_dataset(str(tmp_path / "a.zip"))
    assert ds.label_kind == "one-hot" and ds.label_names == ["x", "y", "z"]
    assert "in dataset.json every row has exactly one 1" in notes_of(tmp_path / "a.zip")[0]
    assert np.array_equal(ds.labels.argmax(1), ds.images[:, 0, 0, 0] % 3)
    two = open_dataset(str(tmp_path / "a.zip"), attributes="z,x")
    assert two.label_kind == "multi-label" and np.array_equal(two.labels, ds.labels[:, [2, 0]])
    for i in range(4):
        paint(tmp_path / "c" / f"{i}.png")
    rows = [[f"{i}.png", i % 2, 1 - i % 2] for i in range(4)]
    write_csv(tmp_path / "c" / "labels.csv", [["file", "a", "b"], *rows])
    assert scan(tmp_path / "c").class_of == [1, 0, 1, 0]
    write_csv(tmp_path / "c" / "labels.csv", [["file", "a", "b"], *rows[:3], ["3.png", 1, 1]])
    assert scan(tmp_path / "c").classes == [] and scan(tmp_path / "c").notes == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"labels": [["0.png", 0], ["1.png", 1],]}', ["line 1 column 40", "not JSON"]),
        ('{"labels": [\n["0.png", 0],\n["1.png" 1]]}', ["line 3 column 10", "not JSON"]),
        ('{"labels": [["0.png", 1], ["1.png", 2]]}', ["counted from 1 to 2", "subtract 1"]),
        ('{"labels": [["0.png", 1], ["1.png", 2]], "label_names": ["a", "b"]}', ["counted from 1 to 2"]),
        ('{"labels": [["0.png", 0], ["1.png", 2]], "label_names": ["a", "b"]}', ["entry 1", "from 0 to 1"]),
        ('{"labels": [["0.png", 0]], "label_names": "ab"}', ["label_names"]),
        ('{"labels": [["0.png", 0], ["1.png", 1]], "labels": []}', ["the key 'labels' is there twice"]),
        ('{"labels": [["0.png", NaN]]}', ["entry 0", "nan is no label"]),
        ('{"labels": [["0.png", ' + "9" * 5000 + "]]}", ["dataset.json cannot be read"]),
        ("[" * 10**5, ["dataset.json cannot be read"]),
        ("[]", ["no labels in StyleGAN's form"]),
    ],
)
def test_wrong_json(tmp_path, content, words):
    for i in range(2):
        paint(tmp_path / "c" / f"{i}.png")
    (tmp_path / "c" / "dataset.json").write_text(content)
    message = error_of(str(tmp_path / "c"))
    assert all(w in message for w in words), message


def test_composed_and_decomposed_names_match(tmp_path):
    def form(kind: str, i: int) -> str:
        return unicodedata.normalize(kind, f"été_{i}.png")

    for i in range(12):
        paint(tmp_path / "c" / form("NFD" if i % 3 else "NFC", i), i)
    rows = [[form("NFC" if i % 2 else "NFD", i), "aé"[i % 2]] for i in range(12)]
    write_csv(tmp_path / "c" / "labels.csv", [["file", "class"], *rows])
    ds = open_dataset(str(tmp_path / "c"))
    assert np.array_equal(ds.labels.argmax(1), ds.images[:, 0, 0, 0] % 2)
    for kind, split in (("NFC", "train"), ("NFD", "val")):  # one class, as written by two systems
        class_folders(tmp_path / "f" / split, {unicodedata.normalize(kind, "été"): 2, "b": 2})
    assert scan(tmp_path / "f").classes == ["b", "été"]
    assert open_dataset(str(tmp_path / "f")).splits == {"train": 4, "val": 4}


def test_names_in_tables_may_lack_folders(tmp_path):
    root = tmp_path / "c"
    for i in range(6):
        paint(root / "images" / "ab"[i % 2] / f"{i}.png", i)
    for name in (
        lambda i: f"{i}.png",
        lambda i: f"{'ab'[i % 2]}\\{i}.png",
        lambda i: f"./images/{'ab'[i % 2]}/{i}.png",
    ):
        write_csv(root / "labels.csv", [["file", "class"], *([name(i), "xyz"[i % 3]] for i in range(6))])
        source = scan(root)
        assert dict(zip(source.keys, source.class_of, strict=True)) == {
            f"images/{'ab'[i % 2]}/{i}.png": i % 3 for i in range(6)
        }
    paint(root / "images" / "b" / "0.png")
    write_csv(root / "labels.csv", [["file", "class"], *([f"{i}.png", "x"] for i in range(6))])
    assert "line 2: 0.png may be images/a/0.png or images/b/0.png" in error_of(str(root))
    write_csv(root / "labels.csv", [["file", "class"], ["zero", "x"]])
    assert "there is no image zero (the first one there is images/a/0.png)" in error_of(str(root))


@pytest.mark.parametrize("end", [";", "\t", ","])
def test_tables_may_have_semicolons_or_tabs(tmp_path, end):
    for i in range(4):
        paint(tmp_path / "c" / f"{i}.png")
    rows = ["file", "big one"], *([f"{i}.png", f'"{end}{i % 2}"'] for i in range(4))
    (tmp_path / "c" / "labels.csv").write_text("\ufeff" + "\r\n".join(end.join(row) for row in rows))
    assert scan(tmp_path / "c").classes == [f"{end}0".strip(), f"{end}1".strip()]


def test_unused_tables_are_said(tmp_path):
    root = class_folders(tmp_path / "x" / "images", {"a": 3}).parent
    shutil.move(root / "images" / "a", root / "b")
    (root / "images").rmdir()
    (root / "b").rename(root / "images")
    (root / "train.csv").write_text("id,label\n000.png,a\n")
    (root / "README.txt").write_text("x")
    assert notes_of(root)[0].startswith("train.csv is not used: a table of labels is called labels.csv or dataset.json")
    assert notes_of(root)[1] == "images is the only class, so the labels tell nothing"
    root = class_folders(tmp_path / "y" / "train", {"a": 3, "b": 3}).parent
    (root / "train" / "labels.csv").write_text("x")
    (root / "attributes.txt").write_text("x")
    assert "attributes.txt and 1 more tables are not used" in notes_of(root)[0] and len(notes_of(root)) == 1
    paint(tmp_path / "flat" / "a.png")
    (tmp_path / "flat" / "train.csv").write_text("id,label\n")
    assert "a.png is in no class folder" in error_of(str(tmp_path / "flat")) and "train.csv is not" in error_of(
        str(tmp_path / "flat")
    )
    for i in range(2):
        paint(tmp_path / "both" / f"{i}.png")
    (tmp_path / "both" / "labels.csv").write_text("x")
    (tmp_path / "both" / "dataset.json").write_text('{"labels": [["0.png", 0], ["1.png", 0]]}')
    assert "labels.csv is not used" in notes_of(tmp_path / "both")[0]
    celeba(tmp_path / "celeba")
    for name in ("list_bbox_celeba.txt", "identity_CelebA.txt", "list_landmarks_align_celeba.csv"):
        (tmp_path / "celeba" / name).write_text("x")
    assert notes_of(tmp_path / "celeba") == []


def test_pictures_that_are_not_read_are_said(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 3, "b": 3})
    (root / "a" / "1.HEIC").write_bytes(b"")
    (root / "b" / "2.cr2").write_bytes(b"")
    assert notes_of(root) == [".cr2, .heic files are not read: convert them to PNG or JPEG"]
    for file in (root / "a").glob("*.png"):
        file.unlink()
    assert "class folder" in error_of(str(root)) and ".heic files are not read" in error_of(str(root))
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "1.heic").write_bytes(b"")
    assert "holds no images" in error_of(str(tmp_path / "all")) and ".heic files" in error_of(str(tmp_path / "all"))
    root = class_folders(tmp_path / "bare", {"a": 3, "b": 3})
    (root / "a" / "0f3c").write_bytes(b"")
    (root / "README").touch()
    assert notes_of(root) == ["1 files are not read, like a/0f3c: images end in .png, .jpg or the like"]


def test_tables_are_regular_files_of_a_bounded_size(tmp_path, monkeypatch):
    root = class_folders(tmp_path / "x", {"a": 3, "b": 3})
    os.mkfifo(root / "labels.csv")
    assert "labels.csv cannot be read: it is not a regular file" in error_of(str(root))
    (root / "labels.csv").unlink()
    (root / "dataset.json").symlink_to("/dev/zero")
    assert "dataset.json cannot be read: it is not a regular file" in error_of(str(root))
    (root / "dataset.json").unlink()
    (root / "labels.csv").write_text("file,class\n" + "a" * 2**20 + "b")
    assert "has a line of more than 1,048,576 characters" in error_of(str(root))
    monkeypatch.setattr(layouts, "MAX_TABLE", 1000)
    assert "labels.csv cannot be read: it is larger than" in error_of(str(root))


def test_names_with_line_breaks(tmp_path):
    root = class_folders(tmp_path / "x", {"a": 3, "b": 3})
    (root / "a" / "1\n\x1b[31m.png").write_bytes(b"")
    assert "a/1\\n\\x1b[31m.png (it is empty)" in error_of(str(root))


# ---------------------------------------------------------------------------------------------------------------------
# Clusters.


@pytest.fixture
def split_folders(tmp_path):
    for split, n in (("train", 5), ("val", 2)):
        for c in "ab":
            for i in range(n):
                paint(tmp_path / "x" / split / c / f"{split}_{i}.png", 10 * i)
    return open_dataset(str(tmp_path / "x"))


def cluster_table(path: Path, rows: list) -> str:
    write_csv(path, [["img", "cluster"], *rows])
    return str(path)


def test_clusters_of_two_tables_or_one(tmp_path, split_folders):
    rows = {s: [[f"{c}/{s}_{i}.png", 2 + i % 3] for c in "ba" for i in range(n)] for s, n in (("train", 5), ("val", 2))}
    pair = ",".join(cluster_table(tmp_path / f"{s}.csv", rows[s]) for s in ("train", "val"))
    clusters, names = layouts.read_clusters(pair, split_folders)
    assert names == ["cluster2", "cluster3", "cluster4"]
    assert clusters["train"].tolist() == [0, 1, 2, 0, 1] * 2 and clusters["val"].tolist() == [0, 1] * 2
    assert clusters["train"].dtype == np.int64
    one = cluster_table(tmp_path / "all.csv", [*rows["val"], *rows["train"], ["other.png", 1]])
    whole = cluster_table(tmp_path / "paths.csv", [[f"{s}/{n}", k] for s in rows for n, k in rows[s]])
    indexed = str(tmp_path / "indexed.csv")  # as pandas writes them
    write_csv(
        Path(indexed), [["", "img", "cluster"], *([i, *row] for i, row in enumerate(rows["train"] + rows["val"]))]
    )
    for tables in (one, whole, indexed):
        again, names = layouts.read_clusters(tables, split_folders.part("val"))
        assert all(np.array_equal(again[s], clusters[s]) for s in rows) and len(names) == 3
    everything = open_dataset(str(tmp_path / "x"), train_on_all=True)
    clusters, _ = layouts.read_clusters(pair, everything)
    assert len(clusters["train"]) == 14 and clusters["val"].tolist() == [0, 1] * 2


def test_clusters_by_file_name(tmp_path, monkeypatch):
    monkeypatch.setattr(critters, "SPLITS", {"train": 4, "val": 3})
    ds = open_dataset("critters")
    assert ds.names == [f"train/{i}" for i in range(4)] and ds.part("val").names[-1] == "val/2"
    table = cluster_table(
        tmp_path / "a.csv", [[n, i % 2] for s in ("train", "val") for i, n in enumerate(ds.part(s).names)]
    )
    assert layouts.read_clusters(table, ds)[0]["train"].tolist() == [0, 1, 0, 1]
    celeba(tmp_path / "c")
    faces = open_dataset(str(tmp_path / "c"), 32)
    table = cluster_table(tmp_path / "b.csv", [[f"{i + 1:06}.jpg", i % 2] for i in range(20)])
    assert layouts.read_clusters(table, faces)[0]["train"].tolist() == [0, 1] * 7


def test_wrong_clusters(tmp_path, split_folders):
    rows = [[f"{s}/{c}/{s}_{i}.png", i % 3] for s, n in (("train", 5), ("val", 2)) for c in "ab" for i in range(n)]

    def refusal(rows: list, header: tuple = ("img", "cluster")) -> str:
        write_csv(tmp_path / "t.csv", [header, *rows])
        with pytest.raises(click.ClickException) as caught:
            layouts.read_clusters(str(tmp_path / "t.csv"), split_folders)
        assert "\n" not in caught.value.message
        return caught.value.message

    assert "has no line for the image val/b/val_1.png" in refusal(rows[:-1])
    assert "line 3" in refusal([rows[0], *rows]) and "twice" in refusal([rows[0], *rows])
    for wrong in ("-1", "1.5", "", "x", "9" * 5000, "²"):
        assert "line 15" in refusal([*rows[:-1], [rows[-1][0], wrong]])
    assert "no training image has the cluster 7" in refusal([*rows[:-1], [rows[-1][0], 7]])
    assert "line 1: expected a header with the columns img and cluster" in refusal(rows, ("file", "k"))
    assert "line 2: 3 values, but there are 2 columns" in refusal([[*rows[0], 1], *rows[1:]])
    assert "may be train/a/train_0.png or train/b/train_0.png" in refusal([["train_0.png", 0]])
    for tables in ("nothing.csv", "a.csv,b.csv,c.csv", str(tmp_path), "x.txt"):
        with pytest.raises(click.ClickException):
            layouts.read_clusters(tables, split_folders)


# ---------------------------------------------------------------------------------------------------------------------
# Any table at all: a consistent Source comes out, or one line.

IMAGES = [f"{c}/{i}.png" for c in "ab" for i in range(3)]
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def listed(tmp_path):
    """A folder of images, which are empty, as nothing decodes them."""
    for name in IMAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def check(root: Path) -> layouts.Source | None:
    try:
        source = scan(root)
    except click.ClickException as error:
        assert error.message.isprintable()
        return None
    n = len(source.keys)
    assert set(source.keys) <= set(IMAGES) and len(set(source.keys)) == n == len(source.splits)
    assert {"train", "val"} <= set(source.splits) <= {"train", "val", "test"}
    assert len(source.class_of) == (n if source.classes else 0)
    assert all(0 <= c < len(source.classes) for c in source.class_of)
    assert not source.attributes or np.array(source.values).shape == (n, len(source.attributes))
    assert set(np.unique(source.values)) <= {0, 1}
    return source


@quick
@given(text=st.text(), header=st.sampled_from(["", "file,x\n", "file;x;split\n", "file,a,b\n"]))
def test_any_text_as_labels_csv(listed, text, header):
    (listed / "labels.csv").write_text(header + text, errors="surrogatepass")
    check(listed)


@quick
@given(raw=st.binary())
def test_any_bytes_as_labels_csv(listed, raw):
    (listed / "labels.csv").write_bytes(raw)
    check(listed)


label = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=5).map(layouts.nfc)


@quick
@given(labels=st.lists(label, min_size=6, max_size=6), end=st.sampled_from(",;\t"))
def test_labels_csv_comes_back(listed, labels, end):
    with open(listed / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=end).writerows([["file", "x"], *zip(IMAGES, labels, strict=True)])
    source = check(listed)
    if source:
        got = [source.classes[c] for c in source.class_of]
        assert dict(zip(source.keys, got, strict=True)) == dict(zip(IMAGES, labels, strict=True))
    else:  # no class has two images, of which one could be held out
        assert len(set(labels)) == 6


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(IMAGES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@quick
@given(labels=json_value, names=json_value)
def test_any_json_as_dataset_json(listed, labels, names):
    (listed / "dataset.json").write_text(json.dumps({"labels": labels, "label_names": names}))
    check(listed)


@quick
@given(
    labels=st.lists(
        st.integers(-1, 3) | st.lists(st.sampled_from([0, 1, 1.0, -1, 2]), max_size=3), min_size=6, max_size=6
    ),
    names=st.none() | st.lists(label, max_size=4),
)
def test_likely_json_as_dataset_json(listed, labels, names):
    pairs = list(zip(IMAGES, labels, strict=True))
    (listed / "dataset.json").write_text(json.dumps({"labels": pairs, "label_names": names}))
    source = check(listed)
    if source and not source.attributes:
        assert source.class_of == [dict(pairs)[name] for name in source.keys]


FACES = [f"{i}.jpg" for i in range(4)]
cells = st.sampled_from(["1", "-1", "0", "2", "x", ""])


@quick
@given(
    head=st.sampled_from(["{}\nA B\n", "5\nA B\n", "A B\n", ""]),
    rows=st.lists(st.tuples(st.sampled_from([*FACES, "9.jpg"]), cells, cells), max_size=8),
    parts=st.none() | st.lists(st.tuples(st.sampled_from(FACES), st.sampled_from("0123")), max_size=8),
    complete=st.booleans(),
)
def test_any_rows_as_celeba(tmp_path, head, rows, parts, complete):
    (tmp_path / "img_align_celeba").mkdir(exist_ok=True)
    for name in FACES:
        (tmp_path / "img_align_celeba" / name).write_bytes(b"")
    rows = [(name, "1", "-1") for name in FACES] + [row for row in rows if row[0] == "9.jpg"] if complete else rows
    table, partition = tmp_path / "list_attr_celeba.txt", tmp_path / "list_eval_partition.txt"
    table.write_text(head.format(len(rows)) + "".join(" ".join(row) + "\n" for row in rows))
    partition.unlink(missing_ok=True)
    if parts is not None:
        partition.write_text("".join(" ".join(row) + "\n" for row in parts))
    try:
        source = scan(tmp_path)
    except click.ClickException as error:
        assert error.message.isprintable()
        assert not (
            complete and head.startswith("{") and parts is None and all(set(r[1:]) <= {"1", "-1"} for r in rows)
        )
        return
    assert sorted(source.keys) == [f"img_align_celeba/{name}" for name in FACES] and source.attributes == ["A", "B"]
    given_to = {f"img_align_celeba/{name}": [int(v == "1") for v in values] for name, *values in rows}
    assert source.values == [given_to[key] for key in source.keys]
    assert source.absent == sum(row[0] == "9.jpg" for row in rows)
    if parts is not None and "1" in dict(parts).values():
        want = {f"img_align_celeba/{name}": ("train", "val", "test")[int(p)] for name, p in parts}
        assert source.splits == [want[key] for key in source.keys]


@quick
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([*IMAGES, "0.png", "c"]), st.sampled_from(["0", "1", "-1", "x"])), max_size=9
    )
)
def test_any_rows_as_clusters(tmp_path, rows):
    write_csv(tmp_path / "t.csv", [["img", "cluster"], *rows])
    split = {"train": IMAGES[:4], "val": IMAGES[4:]}
    dataset = types.SimpleNamespace(part=lambda s: types.SimpleNamespace(names=split[s]))
    try:
        clusters, names = layouts.read_clusters(str(tmp_path / "t.csv"), dataset)
    except click.ClickException as error:
        assert error.message.isprintable()
        return
    given_to = dict(rows)
    for s in split:
        assert [names[k] for k in clusters[s]] == [f"cluster{given_to[name]}" for name in split[s]]
