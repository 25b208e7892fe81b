"""Downloads of the data sets with a name, from their official sources.

A file is checked before it gets its name, and a download that broke off goes on where it stopped when the command runs
again. `python dataset.py --data afhq --download` is the command.
"""

import functools
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import click
from tqdm import tqdm

from files import UNREADABLE, fail
from layouts import data_folder

AFHQ = {  # of StarGAN v2: address, number of images
    # v1 as published: 14,630 of its images are for training. dl=1: Dropbox sends the file and not a page about it.
    "v1": ("https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1", "afhq.zip", 16130),
    "v2": ("https://www.dropbox.com/s/vkzjokiwof5h8w6/afhq_v2.zip?dl=1", "afhq_v2.zip", 15803),
}


def fetch(path: Path, check: Callable[[Path], str | None], page: str, **source: str) -> None:
    """Download to `path` from source `url`, or the Google Drive `id`. check(file): what is wrong with it, or None.

    A download that breaks off goes on where it stopped when the same command runs again. page: where a person gets it.
    """
    try:
        import gdown  # needed for nothing else
    except ImportError:
        fail("--download needs gdown: pip install 'gdown>=6.5'")
    by_hand = f"or fetch it by hand from {page} and put it at {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrived = path.with_name(path.name + ".part")  # gdown writes to <this>.<8 letters>.part until it has all
    try:
        # retries: further tries within this call; timeout: seconds of silence after which a connection counts as lost.
        gdown.download(output=str(arrived), resume=True, retries=3, timeout=30, **source)
    except Exception as error:  # requests and gdown have many
        reason = (str(error) or type(error).__name__).splitlines()[0]
        fail(f"cannot fetch {path.name} ({reason}): run again to go on, {by_hand}")
    if wrong := check(arrived):
        arrived.unlink()  # else resume would take it for a whole download
        fail(f"what came is not {path.name} ({wrong}), so it was removed: run again, {by_hand}")
    arrived.replace(path)


def check_zip(path: Path, images: int) -> str | None:
    """What is wrong with a zip that should hold so many images, all of them whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            # v1 holds JPEGs, v2 PNGs; macOS adds a shadow of each file. testzip compares the CRC of each member.
            count = sum(name.endswith((".jpg", ".png")) and "__MACOSX" not in name for name in archive.namelist())
            damaged = archive.testzip()
    except UNREADABLE as error:
        return f"not a whole zip: {error}"
    return f"{count} images, not {images}" if count != images else damaged and f"{damaged} in it is damaged"


def check_md5(md5: str, path: Path) -> str | None:
    """What is wrong with a file of a known checksum."""
    from torchvision.datasets.utils import check_integrity  # slow to import

    return None if check_integrity(path, md5) else "wrong checksum"


def download(preset: str, version: str | None = None) -> None:
    """Fetch afhq (version v1, the default, or v2), celeba or fashion-mnist into its data folder: what is not there."""
    if version and preset != "afhq":
        raise click.UsageError("--version is AFHQ's: it goes with --data afhq")
    folder = data_folder(preset)
    if not folder.exists() and folder.with_name(folder.name + ".zip").is_file():
        return  # which `layouts.locate` takes in its place
    there = {n for n in (os.listdir(folder) if folder.is_dir() else []) if not n.startswith(".")}
    if preset == "afhq":
        if version and any((folder / n).is_dir() for n in there):
            click.echo(f"{folder} holds folders already, so nothing is fetched, whatever their version", err=True)
        version = version or "v1"
        url, name, images = AFHQ[version]
        other = AFHQ["v2" if version == "v1" else "v1"][1]
        # Of two zips in a folder neither would be read: only one that lies alone stands for the data.
        if other in there:
            fail(f"{folder} already holds {other}: move it away to fetch AFHQ {version} there")
        # A zip or a folder there is the data, unpacked or not; notes and broken-off downloads are not.
        if not any(n.endswith(".zip") or (folder / n).is_dir() for n in there):
            fetch(folder / name, lambda file: check_zip(file, images), page=url, url=url)
    elif preset == "fashion-mnist":
        from torchvision.datasets import FashionMNIST  # knows addresses and checksums; slow to import

        for name, md5 in FashionMNIST.resources:
            # Somebody may have unpacked them, which read_idx reads as well.
            if not {name, name.removesuffix(".gz")} & there:
                url = FashionMNIST.mirrors[0] + name
                fetch(folder / name, functools.partial(check_md5, md5), page=url, url=url)
    elif preset == "celeba":
        from torchvision.datasets import CelebA  # knows the files on Google Drive and their checksums; slow to import

        # CelebA's other tables (identities, boxes, landmarks) hold no attributes.
        needed = {"img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt"}
        page = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
        for drive_id, md5, name in CelebA.file_list:
            same = {name, name.replace(".txt", ".csv"), name.removesuffix(".zip")}  # tables of other sources; unpacked
            if name in needed and not same & there:
                fetch(folder / name, functools.partial(check_md5, md5), page, id=drive_id)
        # Unlike AFHQ's zip this one lies beside tables, so it cannot stand for the folder: it has to be unpacked.
        if "img_align_celeba" not in there:
            unpack_celeba(folder)
    else:
        raise click.UsageError(f"--download is for afhq, celeba and fashion-mnist, not {preset}")


def unpack_celeba(folder: Path) -> None:
    """Unpack img_align_celeba.zip beside itself."""
    # Renamed when it is whole: half of the images would pass for a part of CelebA that somebody kept.
    aside = folder / ".unpacking"
    try:
        with zipfile.ZipFile(folder / "img_align_celeba.zip") as archive:
            for member in tqdm(archive.namelist(), desc="unpacking", unit="file", dynamic_ncols=True):
                archive.extract(member, aside)  # never outside: it drops leading slashes and '..'
        (aside / "img_align_celeba").rename(folder / "img_align_celeba")
    except UNREADABLE as error:
        fail(f"cannot unpack {folder / 'img_align_celeba.zip'}: {error}")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
