"""What the tests share: an own cache, small real image folders, and a way to run the commands."""

import multiprocessing
import os
import tempfile

if multiprocessing.parent_process() is None:  # before anything packs; run_script's processes have it from here
    os.environ["INFOSCC_CACHE"] = tempfile.mkdtemp(prefix="infoscc-test-")

import fcntl
import resource
import runpy
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import checkpoints
import training

# "--": or torchrun takes an option like --num for an abbreviation of its own.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
# Processes that begin with the large packages imported, which takes longer than most tests. They are forked from one
# that has done nothing else, so they are as good as new.
OPS = ROOT / "ops"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch", "torch._dynamo", "torchvision", "torch.utils.tensorboard", "sklearn.linear_model", "matplotlib.figure"]
)
# Several commands in one process, whose start takes longer than their work.
COMMANDS = """
import json, os, runpy, sys
sys.path.insert(0, sys.argv[1])
for arguments in json.loads(sys.argv[2]):
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""
OTHER_PRECISION = "fp32" if training.cpu_has_amx() else "bf16"  # than --precision auto takes on this CPU


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_sessionfinish():
    shutil.rmtree(os.environ["INFOSCC_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def fresh():
    """Every test starts from one seed, with denormal numbers: training, run in this process, flushes them to zero."""
    torch.manual_seed(0)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """shared(name, make): a folder that `make(folder)` fills, once for all processes of pytest. Never write in it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder(name: str, make) -> Path:
        with open(root / f"{name}.made", "a+") as made:
            fcntl.flock(made, fcntl.LOCK_EX)
            if not made.seek(0, os.SEEK_END):
                make(root / name)
                made.write("yes")
        return root / name

    return folder


@pytest.fixture(scope="session")
def class_folder(shared) -> Path:
    """Class folders of 32 px PNGs: 3 classes of 24 images, told apart by a bright bar; noise elsewhere."""
    return shared("bars", _draw_bars)


def _draw_bars(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for c, name in enumerate(("high", "low", "middle")):
        (folder / name).mkdir(parents=True)
        for i in range(24):
            image = draw.integers(0, 90, (32, 32, 3), dtype=np.uint8)
            image[(4, 24, 14)[c] :][:5] += 150
            Image.fromarray(image).save(folder / name / f"{i}.png")


@pytest.fixture(scope="session")
def attribute_folder(shared) -> Path:
    """A flat folder with labels.csv: 60 images of 32 px with three independent binary attributes."""
    return shared("marks", _draw_marks)


def _draw_marks(folder: Path) -> None:
    folder.mkdir()
    draw = np.random.default_rng(0)
    lines = ["file,Left,Right,Top"]
    for i in range(60):
        marks = draw.integers(0, 2, 3)
        image = draw.integers(0, 90, (32, 32, 3), dtype=np.uint8)
        for on, where in zip(marks, (np.s_[:, :6], np.s_[:, -6:], np.s_[:6]), strict=True):
            image[where] += np.uint8(60 * on)
        Image.fromarray(image).save(folder / f"{i:03}.png")
        lines.append(f"{i:03}.png," + ",".join(map(str, marks)))
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def command():
    """Run one of the scripts' commands in this process: command('gan', '--smoke', ...) -> click's result.

    On the CPU, unless --device is given: the tests compare runs bit for bit, which cuDNN does not promise.
    """

    def run(stage: str, *arguments, code: int = 0):
        main, arguments = __import__(stage).main, [str(a) for a in arguments]
        group = isinstance(main, click.Group)
        chosen = main.commands.get(arguments[0]) if group and arguments else main
        if chosen and any("--device" in parameter.opts for parameter in chosen.params):
            arguments[group:group] = ["--device", "cpu"]  # of two, click takes the last
        result = CliRunner().invoke(main, arguments)
        unexpected = result.exception and not isinstance(result.exception, SystemExit)
        assert not unexpected, (result.exception, result.output)
        assert result.exit_code == code, result.output
        return result

    return run


def _run_script(script: str, arguments: list, cwd: str, environment: dict, out: str, err: str, most: int | None):
    os.chdir(cwd)
    os.environ |= environment
    if most is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY), number)
    sys.stdout, sys.stderr = (open(number, "w", 1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = [script, *arguments]
    for name in [n for n, m in sys.modules.items() if Path(getattr(m, "__file__", None) or "/").parent in (ROOT, OPS)]:
        del sys.modules[name]  # this file needs some of the project; the script shall find its own
    sys.path[:] = [str(Path(script).parent), *(folder for folder in sys.path if folder not in ("", str(ROOT)))]
    runpy.run_path(script, run_name="__main__")


def run_script(
    script: Path, *arguments, processes: int = 1, cwd: Path = ROOT, most: int | None = None
) -> subprocess.CompletedProcess:
    """Run a script in one process, or in several as torchrun does. most: bytes that it may write to one file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        several = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    pipes = [os.pipe() for _ in range(2)]
    streams = [f"/proc/{os.getpid()}/fd/{write}" for _, write in pipes]
    running = []
    for rank in range(processes):
        variables = {"OMP_NUM_THREADS": 1} | ({"RANK": rank, "LOCAL_RANK": rank} | several if processes > 1 else {})
        variables = {name: str(value) for name, value in variables.items()}
        given = (str(script), [str(a) for a in arguments], str(cwd), variables, *streams, most)
        running.append(FORKS.Process(target=_run_script, args=given))
        running[-1].start()
    with ThreadPoolExecutor() as readers:
        texts = [readers.submit(Path(f"/proc/self/fd/{read}").read_text) for read, _ in pipes]
        for process in running:
            process.join(300)
            process.kill()
        for _, write in pipes:  # those were the last writers: the readers end
            os.close(write)
        texts = [text.result() for text in texts]
        for read, _ in pipes:
            os.close(read)
    codes = [process.exitcode for process in running]
    return subprocess.CompletedProcess(arguments, next((c for c in codes if c != 0), 0), *texts)


WRITTEN: dict[str, int] = {}  # when each checkpoint was written that copy_run linked


def copy_run(source: Path, target: Path) -> Path:
    """Copy a run folder; checkpoints (45 MB each) are linked: commands replace them and never write into them."""

    def copy(source: str, target: str) -> None:
        if not source.endswith(".pt"):
            shutil.copy(source, target)
        else:
            written = os.stat(source).st_mtime_ns
            assert WRITTEN.setdefault(source, written) == written, f"an earlier test wrote into {source}"
            os.link(source, target)

    return shutil.copytree(source, target, copy_function=copy)


def _two_stages(command, data: Path, outdir: Path) -> None:
    command("encoder", "--data", data, "--outdir", outdir, "--smoke")
    command("classifier", "--data", data, "--outdir", outdir, "--smoke")
    state = checkpoints.load(outdir / "encoder.pt", "encoder")  # without what only further training needs, two thirds
    checkpoints.save(outdir / "encoder.pt", state, keep_previous=False)
    (outdir / "encoder.previous.pt").unlink()


@pytest.fixture(scope="session")
def class_run(command, class_folder, shared) -> Path:
    """A run folder with encoder.pt and classifier.pt for `class_folder`: `copy_run` it before writing into it."""
    return shared("class-run", lambda folder: _two_stages(command, class_folder, folder))


@pytest.fixture(scope="session")
def gan_run(command, class_folder, class_run, shared) -> Path:
    """The same with a gan.pt of two iterations."""

    def train(folder: Path) -> None:
        copy_run(class_run, folder)
        command("gan", "--data", class_folder, "--outdir", folder, "--smoke", "--kimg", 0.016)

    return shared("gan-run", train)


@pytest.fixture(scope="session")
def attribute_run(command, attribute_folder, shared) -> Path:
    """A run folder with encoder.pt and classifier.pt for `attribute_folder`."""
    return shared("attribute-run", lambda folder: _two_stages(command, attribute_folder, folder))
