"""files.py: images of every kind, damaged and hostile ones, folders with litter and links, zips, IDX files."""

import gzip
import io
import itertools
import os
import shutil
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import click
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image, PngImagePlugin
from sources import class_folders, error_of, paint, places  # noqa: F401

import files
import metrics
from dataset import open_dataset

ROOT = Path(files.__file__).parent


def decoded(tmp_path, image: Image.Image, name: str, **options) -> np.ndarray:
    image.save(tmp_path / name, **options)
    x = np.asarray(files.read_image(tmp_path / name))
    assert np.array_equal(x, files.read_image(io.BytesIO((tmp_path / name).read_bytes())))
    return x


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


def reason(file, **options) -> str:
    """Why read_image refuses a file: one line, whatever is wrong."""
    with pytest.raises(ValueError) as caught:
        files.read_image(file, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_float_grey_of_other_ranges(tmp_path):
    ramp = np.linspace(0, 1, 32, dtype=np.float32)[None].repeat(32, 0)
    want = np.rint(ramp * 255)
    for peak in (255, 65535):
        x = decoded(tmp_path, Image.fromarray(ramp * peak), f"{peak}.tif")
        assert np.abs(x[..., 0] - want).max() <= 1
    for white in (1, 255):  # resizing and sharpening overshoot
        x = decoded(tmp_path, Image.fromarray(ramp * (1.2 * white)), "over.tif")
        assert np.abs(x[..., 0] - (ramp * 1.2 * 255).clip(0, 255)).max() <= 1
    ramp[0, :2] = np.nan, np.inf  # inf makes the range unknown, NaN does not
    assert decoded(tmp_path, Image.fromarray(ramp), "nan.tif")[0, 0, 0] == 0
    ramp[0, 1] = 0
    assert np.array_equal(decoded(tmp_path, Image.fromarray(ramp), "a.tif")[1:, :, 0], want[1:])


def test_damaged_exif_leaves_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    for i, block in enumerate((b"garbage" + exif.tobytes()[7:], exif.tobytes()[:9], b"Exif\0\0II*\0\xff\xff\xff\xff")):
        assert np.array_equal(decoded(tmp_path, image, f"{i}.png", exif=block), np.asarray(image))


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    assert reason(tmp_path / "text.png") == "it is no image"
    assert reason(io.BytesIO(b"")) == "it is no image"
    # A PostScript file would start Ghostscript, whatever its name.
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    assert reason(tmp_path / "script.png") == "it is no image" and "EPS" not in files.FORMATS
    for name, target in (("device.png", "/dev/zero"), ("folder.png", tmp_path)):
        (tmp_path / name).symlink_to(target)
        assert reason(tmp_path / name) == "it is not a regular file"
    assert reason(tmp_path / "nothing.png") == "No such file or directory"
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(noise, "png")
    assert "truncated" in reason(io.BytesIO(noise.getvalue()[:3000]))


def test_pictures_of_too_many_pixels(tmp_path, monkeypatch):
    image = Image.new("RGB", (200, 100), (9, 90, 200))
    for name in ("a.png", "a.jpg"):
        image.save(tmp_path / name, quality=95)
    assert reason(tmp_path / "a.png", max_pixels=19_999) == "200 x 100 pixels are more than --max-pixels 19999"
    assert files.read_image(tmp_path / "a.png", max_pixels=20_000).size == (200, 100)
    half = files.read_image(tmp_path / "a.jpg", max_pixels=19_999)  # JPEG can be decoded at a fraction of its size
    assert half.size == (100, 50) and np.abs(np.asarray(half, int) - (9, 90, 200)).max() <= 3
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)  # what Pillow refuses while it opens a file
    assert "(20000 pixels) exceeds" in reason(tmp_path / "a.jpg", max_pixels=4_000)
    assert "--max-pixels" in reason(tmp_path / "a.png", max_pixels=4_000)
    assert files.read_image(tmp_path / "a.png", max_pixels=30_000).size == (200, 100)


def test_files_that_only_claim_to_be_small_or_hold_a_picture(tmp_path):
    """A sparse file of gigabytes, an empty one, a TIFF whose one tile is larger than the picture; and a long text."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "r+b") as file:
        file.truncate(2**33)
    assert reason(tmp_path / "a.png") == "its 8192 MB are too many for --max-pixels 67108864"
    with pytest.raises(ValueError, match="larger than 4 GB"):
        files.open_file(tmp_path, "a.png")
    (tmp_path / "none.png").touch()
    assert reason(tmp_path / "none.png") == "it is empty"
    with pytest.raises(ValueError, match="it is empty"):
        files.open_file(tmp_path, "none.png")
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 322: 30000, 323: 30000, 324: 200, 325: 20}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    (tmp_path / "t.tif").write_bytes(struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(200))
    assert reason(tmp_path / "t.tif") == "30000 x 30000 pixels are more than --max-pixels 67108864"
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 2**21, zip=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "text.png", pnginfo=text)
    assert files.read_image(tmp_path / "text.png").size == (40, 30)


def test_damaged_tiffs_print_nothing(tmp_path, capfd):
    Image.effect_noise((64, 64), 60).save(tmp_path / "a.tif", compression="tiff_lzw")
    damaged = bytearray((tmp_path / "a.tif").read_bytes())
    damaged[500:540] = bytes(range(100, 140))
    (tmp_path / "a.tif").write_bytes(damaged)
    assert reason(tmp_path / "a.tif") and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("module", [files, metrics])
def test_large_images_are_decoded_one_at_a_time(module, tmp_path, monkeypatch):
    alone, decode = [], module.to_rgb
    monkeypatch.setattr(module, "to_rgb", lambda image: alone.append(module.LARGE.locked()) or decode(image))
    monkeypatch.setattr(module, "MAX_PIXELS", 30_000)
    monkeypatch.setattr(module, "LARGE", threading.Lock())  # packing may have put one for several processes there
    for i, size in enumerate(((200, 100), (100, 100))):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
        module.read_image(tmp_path / f"{i}.png")
    assert alone == [True, False] and not module.LARGE.locked()


def peak_memory(code: str) -> int:
    """MB that a new Python process needs to import files.py and run `code`."""
    # Of that process alone: getrusage has the peak of the one that it was forked from, if that was larger.
    report = "print(int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]) // 1024)"
    run = [sys.executable, "-c", f"import files\nfrom pathlib import Path\n{code}\n{report}"]
    return int(subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def test_bombs_take_little_memory(tmp_path):
    Image.new("1", (12000, 12000)).save(tmp_path / "large.png", optimize=True)
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("zeros.png", bytes(300 * 2**20))
    (tmp_path / "idx.gz").write_bytes(gzip.compress(struct.pack(">BBBB", 0, 0, 8, 3) + bytes(300 * 2**20), 1))
    plain = peak_memory("")
    attempt = "try: {}\nexcept {} as error: pass\nelse: raise SystemExit(1)"
    for code in (
        f"files.read_image({str(tmp_path / 'large.png')!r})",
        f"files.read(Path({str(tmp_path / 'z.zip')!r}), 'zeros.png', 2**20)",
        f"files.read_image(files.open_file(Path({str(tmp_path / 'z.zip')!r}), 'zeros.png'))",
        f"files.read_idx(Path({str(tmp_path)!r}), 'idx.gz')",
    ):
        assert peak_memory(attempt.format(code, "Exception")) < plain + 60, code


@pytest.fixture(scope="module")
def small_images() -> list[bytes]:
    """One small image in each format that this Pillow can write."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8))
    result = []
    for name in files.FORMATS:
        memory = io.BytesIO()
        image.save(memory, name)
        result.append(memory.getvalue())
    return result


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_images_raise_nothing_but_valueerror(small_images, data):
    raw = bytearray(data.draw(st.sampled_from(small_images)))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), max_size=20)):
        raw[min(at, len(raw) - 1)] = value
    raw = bytes(raw[: data.draw(st.integers(0, 2 * len(raw)))])
    try:
        image = files.read_image(io.BytesIO(raw), max_pixels=10**6)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert image.mode == "RGB" and 0 < image.width * image.height <= 10**6


# ---------------------------------------------------------------------------------------------------------------------
# Folders.


def test_hidden_files_are_left_out(tmp_path):
    for name in ("cat/1.png", "cat/deep/2.JPG", "top.webp"):
        paint(tmp_path / "x" / name, format="png")
    for name in (
        "cat/._1.png",
        ".hidden.png",
        "cat/.ipynb_checkpoints/1-checkpoint.png",
        "__MACOSX/cat/1.png",
        "cat/@eaDir/1.png/SYNOFILE_THUMB_M.png",
        "lost+found/1.png",
    ):
        paint(tmp_path / "x" / name, format="png")
    (tmp_path / "x" / "cat" / "notes.txt").write_text("x")
    root = tmp_path / "x"
    assert files.list_images(root) == [root / "cat/1.png", root / "cat/deep/2.JPG", root / "top.webp"]
    names = ["cat/1.png", "cat/deep/2.JPG", "cat/notes.txt", "top.webp"]
    assert files.walk(root) == (names, ["cat", "cat/deep"], [])
    shutil.make_archive(str(tmp_path / "x"), "zip", root)
    assert files.list_files(tmp_path / "x.zip")[1:] == files.walk(root)[:2]


def test_every_folder_is_entered_once(tmp_path):
    root, outside = tmp_path / "x", tmp_path / "outside"
    paint(root / "cat" / "1.png")
    paint(root / "dog" / "2.png")
    paint(outside / "3.png")
    (root / "cat" / "again").symlink_to("..")  # a loop
    (root / "cat" / "itself").symlink_to(".")
    (root / "a").symlink_to("dog")  # comes before the folder it leads to
    (root / "far").symlink_to(outside)
    (root / "further").symlink_to(outside)
    names = ["cat/1.png", "dog/2.png", "far/3.png"]
    assert files.walk(root) == (names, ["cat", "dog", "far"], ["a", "further"])
    assert "x/a is a link to a folder that is there under another name" in error_of(str(root))
    for i, j in itertools.product(range(9), range(9)):  # millions of paths
        (root / str(i)).mkdir(exist_ok=True)
        (root / str(i) / f"to{j}").symlink_to(root / str(j))
    assert len(files.walk(root)[1]) == 12


def test_what_is_no_regular_file_is_listed_for_the_reader_to_refuse(tmp_path):
    paint(tmp_path / "x" / "1.png")
    (tmp_path / "x" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "x" / "self.png").symlink_to("self.png")
    (tmp_path / "x" / "zero.png").symlink_to("/dev/zero")
    assert [p.name for p in files.list_images(tmp_path / "x")] == ["1.png", "gone.png", "self.png", "zero.png"]


def test_folders_that_cannot_be_listed(tmp_path):
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(50):
            os.mkdir("x" * 100)
            os.chdir("x" * 100)
    finally:
        os.chdir(here)
    with pytest.raises(OSError) as caught:
        files.walk(tmp_path)
    assert caught.value.filename
    message = error_of(str(tmp_path))
    assert "File name too long" in message and len(message) < 2000


def test_a_folder_of_one_zip_stands_for_it(tmp_path):
    class_folders(tmp_path / "x", {"a": 1})
    shutil.make_archive(str(tmp_path / "only" / "z"), "zip", tmp_path / "x")
    (tmp_path / "only" / "later.zip.part").write_bytes(b"")
    assert files.list_files(tmp_path / "only") == (tmp_path / "only" / "z.zip", ["a/000.png"], ["a"])


# ---------------------------------------------------------------------------------------------------------------------
# Zips, IDX files, messages.


def test_members_outside_of_a_zip_are_refused(tmp_path):
    for name in ("../evil.png", "/etc/evil.png", "a/../../evil.png", "C:/evil.png"):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr(name, b"x")
        with pytest.raises(click.ClickException, match=r"evil.png.*refused"):
            files.list_files(tmp_path / "a.zip")
    assert not list(tmp_path.rglob("evil.png"))


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
    assert "a/0.png (zip it again by deflate)" in error_of(str(tmp_path / "lzma.zip"))
    with zipfile.ZipFile(tmp_path / "deep.zip", "w") as archive:
        archive.writestr("a/" * 101 + "x.png", b"")
    assert "has a longer path than any file" in error_of(str(tmp_path / "deep.zip"))
    with zipfile.ZipFile(tmp_path / "slashes.zip", "w") as archive:
        for name, content in images.items():
            archive.writestr(name[2:].replace("a/0", "a//0"), content)
    assert "a/0.png (its name in the zip is not a plain path)" in error_of(str(tmp_path / "slashes.zip"))
    with zipfile.ZipFile(tmp_path / "back.zip", "w") as archive:
        archive.writestr("a/x.png", b"")
        archive.infolist()[0].filename = "a\\x.png"
    assert "unpack it, and give the folder" in error_of(str(tmp_path / "back.zip"))
    whole = (tmp_path / "dots.zip").read_bytes().replace(b"PK\x01\x02\x14\x03\x14", b"PK\x01\x02\x14\x03\x63")
    (tmp_path / "later.zip").write_bytes(whole)  # says that it needs version 9.9
    assert "cannot be read as a zip" in error_of(str(tmp_path / "later.zip"))
    ds = open_dataset(str(tmp_path / "dots.zip"))
    assert ds.label_names == ["a", "b"] and sum(ds.splits.values()) == 6


def test_encrypted_members_and_links_in_zips(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(3):
            archive.writestr(f"a/{i}.png", b"x")
        link = zipfile.ZipInfo("a/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    raw = (tmp_path / "a.zip").read_bytes().replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0")
    (tmp_path / "a.zip").write_bytes(raw)
    message = error_of(str(tmp_path / "a.zip"))
    assert "4 of 4 images" in message and "password" in message


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=arrays(np.uint8, array_shapes(min_dims=1, max_dims=3, max_side=5)),
    zipped=st.booleans(),
    cut=st.integers(-9, 9),
)
def test_idx_files_are_whole_or_refused(tmp_path, array, zipped, cut):
    raw = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    raw = raw + bytes(cut) if cut > 0 else raw[: len(raw) + cut]
    name = "x.gz" if zipped else "x"
    (tmp_path / name).write_bytes(gzip.compress(raw) if zipped else raw)
    files.read_idx.cache_clear()
    if cut:
        with pytest.raises(click.ClickException, match="is damaged"):
            files.read_idx(tmp_path, name)
    else:
        assert np.array_equal(files.read_idx(tmp_path, name), array)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=40))
def test_any_bytes_as_idx_file(tmp_path, raw):
    (tmp_path / "x").write_bytes(raw)
    files.read_idx.cache_clear()
    try:
        assert files.read_idx(tmp_path, "x").dtype == np.uint8
    except click.ClickException as error:
        assert "is damaged" in error.message


@given(name=st.text())
def test_messages_are_one_printable_line(name):
    with pytest.raises(click.ClickException) as caught:
        files.fail(f"cannot read {name}")
    assert caught.value.message.isprintable() and caught.value.message.encode()
