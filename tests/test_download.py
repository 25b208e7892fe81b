"""download.py against a server of our own: resuming, checking, failing."""

import gzip
import hashlib
import http.server
import io
import itertools
import os
import re
import shutil
import sys
import threading
import types
import zipfile

import click
import gdown
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sources import celeba, fashion, places  # noqa: F401

import dataset
import download


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` with ranges; breaks off after `cut` bytes as long as `cuts` lasts."""

    content, cut, cuts, ranges, status = b"", 0, 0, True, 200

    def do_GET(self):
        self.server.seen.append(self.headers["Range"])
        if self.status != 200:
            return self.send_error(self.status)
        asked = self.headers["Range"] if self.ranges else None
        first = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if first >= len(self.content):
            return self.send_error(416)
        body = self.content[first:]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{len(self.content) - 1}/{len(self.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if type(self).cuts > 0:
            type(self).cuts -= 1
            body = body[: self.cut]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    handler = type("Handler", (Server,), {})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.seen, httpd.handler = [], handler
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/f"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr("random.uniform", lambda low, high: 0)  # gdown's pauses between tries
    monkeypatch.setattr(sys.modules[gdown.download.__module__], "CHUNK_SIZE", 1000)  # it keeps whole chunks only
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def afhq_zip() -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for split, c, i in itertools.product(("train", "val"), ("cat", "dog", "wild"), range(4)):
            image = io.BytesIO()
            noise = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(image, "jpeg")
            archive.writestr(f"afhq/{split}/{c}/{i}.jpg", image.getvalue())
    return memory.getvalue()


def run_main(*arguments):
    return CliRunner().invoke(dataset.main, [str(a) for a in arguments])


def test_version_goes_with_download():
    run = run_main("--data", "afhq", "--version", "v2")
    assert run.exit_code == 2 and "--version goes with --download" in run.output
    run = run_main("--data", "celeba", "--version", "v2", "--download")
    assert run.exit_code == 2 and "--version is AFHQ's" in run.output


def test_download_resumes_and_packs(tmp_path, server, monkeypatch):
    server.handler.content, server.handler.cut, server.handler.cuts = afhq_zip(), 10_000, 2
    monkeypatch.setitem(download.AFHQ, "v1", (server.url, "afhq.zip", 24))
    run = run_main("--data", "afhq", "--download", "--size", 32)
    assert run.exit_code == 0, run.output
    assert server.seen == [None, "bytes=10000-", "bytes=20000-"]
    assert (tmp_path / "data" / "afhq" / "afhq.zip").read_bytes() == server.handler.content
    assert os.listdir(tmp_path / "data" / "afhq") == ["afhq.zip"]
    assert re.search(r"images +12 +12", run.output) and re.search(r"wild +4 +4", run.output)
    assert run_main("--data", "afhq", "--download", "--size", 32).exit_code == 0
    assert len(server.seen) == 3  # it was there
    run = run_main("--data", "afhq", "--download", "--version", "v2")
    assert run.exit_code == 1 and "already holds afhq.zip" in run.output
    (tmp_path / "data" / "afhq" / "afhq.zip").rename(tmp_path / "moved.zip")
    monkeypatch.setitem(download.AFHQ, "v2", (server.url, "afhq_v2.zip", 24))
    run = run_main("--data", "afhq", "--download", "--version", "v2", "--size", 32)
    assert run.exit_code == 0 and os.listdir(tmp_path / "data" / "afhq") == ["afhq_v2.zip"] and len(server.seen) == 4


def test_a_file_beside_is_not_the_data(tmp_path, monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr(download, "fetch", lambda path, *how, **more: fetched.append(path.name))
    (tmp_path / "data" / "afhq").mkdir(parents=True)
    (tmp_path / "data" / "afhq" / "notes.txt").touch()
    download.download("afhq")
    (tmp_path / "data" / "afhq" / "train").mkdir()
    download.download("afhq")
    assert fetched == ["afhq.zip"] and not capsys.readouterr().err
    download.download("afhq", "v2")
    assert fetched == ["afhq.zip"] and "nothing is fetched, whatever their version" in capsys.readouterr().err
    (tmp_path / "data" / "celeba.zip").touch()  # which stands for the folder
    download.download("celeba")
    assert fetched == ["afhq.zip"] and not (tmp_path / "data" / "celeba").exists()


def test_download_goes_on_in_a_later_run(tmp_path, server):
    server.handler.content, server.handler.cut, server.handler.cuts = os.urandom(50_000), 5_000, 4
    path = tmp_path / "x" / "f"
    with pytest.raises(click.ClickException, match="run again") as caught:
        download.fetch(path, lambda file: None, page="https://example.org", url=server.url)
    assert "https://example.org" in caught.value.message and str(path) in caught.value.message and not path.exists()
    assert [p.stat().st_size for p in path.parent.iterdir()] == [20_000]  # four tries
    seen = len(server.seen)
    download.fetch(path, lambda file: None, page="https://example.org", url=server.url)
    assert path.read_bytes() == server.handler.content and "bytes=20000-" in server.seen[seen:]
    assert list(path.parent.iterdir()) == [path]


def test_download_of_the_wrong_file(tmp_path, server):
    def fetch(images: int) -> str:
        with pytest.raises(click.ClickException) as caught:
            download.fetch(tmp_path / "x" / "g", lambda file: download.check_zip(file, images), "page", url=server.url)
        assert list((tmp_path / "x").iterdir()) == []
        return caught.value.message

    server.handler.content = b"abc" * 100
    assert "not a whole zip" in fetch(3)
    server.handler.content = afhq_zip()
    assert "24 images, not 3" in fetch(3)
    whole = bytearray(server.handler.content)
    whole[1000] ^= 255
    server.handler.content = bytes(whole)
    assert "is damaged" in fetch(24)


def test_failing_network(tmp_path, server, monkeypatch):
    server.handler.status = 404
    monkeypatch.setitem(download.AFHQ, "v1", (server.url, "afhq.zip", 24))
    run = run_main("--data", "afhq", "--download")
    assert run.exit_code == 1 and "404" in run.output and server.url in run.output and "afhq/afhq.zip" in run.output
    monkeypatch.setitem(download.AFHQ, "v1", ("http://127.0.0.1:9/f", "afhq.zip", 24))
    run = run_main("--data", "afhq", "--download")
    assert run.exit_code == 1 and "http://127.0.0.1:9/f" in run.output and "Traceback" not in run.output
    assert run_main("--data", "critters", "--download").exit_code == 2


def test_download_of_fashion_mnist_checks_md5(tmp_path, server, monkeypatch):
    from torchvision.datasets import FashionMNIST

    fashion(tmp_path / "official", suffix=".gz")
    files = {n: (tmp_path / "official" / n).read_bytes() for n, _ in FashionMNIST.resources}

    def serve(handler):
        handler.content = files[handler.path.lstrip("/")]
        Server.do_GET(handler)

    monkeypatch.setattr(server.handler, "do_GET", serve)
    monkeypatch.setattr(FashionMNIST, "mirrors", [server.url[:-1]])
    run = run_main("--data", "fashion-mnist", "--download")
    assert run.exit_code == 1 and "wrong checksum" in run.output  # ours are not the official ones
    monkeypatch.setattr(FashionMNIST, "resources", [(n, hashlib.md5(c).hexdigest()) for n, c in files.items()])
    run = run_main("--data", "fashion-mnist", "--download")
    assert run.exit_code == 0 and re.search(r"images +30 +10", run.output), run.output
    for name in files:  # unpacked by hand, they are there too
        packed = tmp_path / "data" / "fashion-mnist" / name
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    files.clear()
    assert run_main("--data", "fashion-mnist", "--download").exit_code == 0


def test_download_of_celeba(tmp_path, monkeypatch):
    from torchvision.datasets import CelebA

    official = tmp_path / "official"
    celeba(official)
    shutil.make_archive(str(official / "img_align_celeba"), "zip", official, "img_align_celeba")
    names = ["img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt"]
    md5 = {n: hashlib.md5((official / n).read_bytes()).hexdigest() for n in names}
    found = [(f"id-{n}", md5[n], n) for n in names]
    monkeypatch.setattr(CelebA, "file_list", [*found, ("id", "0", "identity_CelebA.txt")])
    asked = []

    def drive(output, id, **options):
        asked.append(id)
        assert options["resume"]
        if len(asked) == 2:
            raise RuntimeError("Too many users have viewed or downloaded this file recently.\nMore text")
        shutil.copy(official / id.removeprefix("id-"), output)

    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=drive))
    run = run_main("--data", "celeba", "--download", "--size", 32)
    assert run.exit_code == 1 and "Too many users" in run.output and "list_attr_celeba.txt" in run.output
    run = run_main("--data", "celeba", "--download", "--size", 32)
    assert run.exit_code == 0 and re.search(r"images +14 +4 +2", run.output), run.output
    assert asked == [f"id-{n}" for n in (names[0], names[1], names[1], names[2])]  # what was there is not fetched again
    monkeypatch.setitem(sys.modules, "gdown", None)
    folder = tmp_path / "data" / "celeba"
    (folder / names[0]).unlink()
    assert run_main("--data", "celeba", "--download", "--size", 32).exit_code == 0  # the unpacked folder is there
    (folder / names[2]).unlink()
    run = run_main("--data", "celeba", "--download")
    assert run.exit_code == 1 and "pip install 'gdown" in run.output
