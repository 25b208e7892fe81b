"""What the tests share: an own cache, small real image folders, and a way to run the commands."""

import os
import tempfile

os.environ["INFOSCC_CACHE"] = tempfile.mkdtemp(prefix="infoscc-test-")  # before anything packs

import shutil
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import training

# "--": or torchrun takes an option like --num for an abbreviation of its own.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
OTHER_PRECISION = "fp32" if training.cpu_has_amx() else "bf16"  # than --precision auto takes on this CPU


def pytest_sessionfinish():
    shutil.rmtree(os.environ["INFOSCC_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def fresh():
    """Every test starts from one seed, with denormal numbers: training, run in this process, flushes them to zero."""
    torch.manual_seed(0)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory) -> Path:
    """Class folders of 32 px PNGs: 3 classes of 24 images, told apart by a bright bar; noise elsewhere."""
    folder = tmp_path_factory.mktemp("data") / "bars"
    draw = np.random.default_rng(0)
    for c, name in enumerate(("high", "low", "middle")):
        (folder / name).mkdir(parents=True)
        for i in range(24):
            image = draw.integers(0, 90, (32, 32, 3), dtype=np.uint8)
            image[(4, 24, 14)[c] :][:5] += 150
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def attribute_folder(tmp_path_factory) -> Path:
    """A flat folder with labels.csv: 60 images of 32 px with three independent binary attributes."""
    folder = tmp_path_factory.mktemp("data") / "marks"
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
    return folder


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


def copy_run(source: Path, target: Path) -> Path:
    """Copy a run folder; checkpoints (135 MB each) are linked: commands replace them and never write into them."""

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".pt") else shutil.copy)(source, target)

    return shutil.copytree(source, target, copy_function=copy)


def _two_stages(command, data: Path, outdir: Path) -> Path:
    command("encoder", "--data", data, "--outdir", outdir, "--smoke")
    command("classifier", "--data", data, "--outdir", outdir, "--smoke")
    return outdir


@pytest.fixture(scope="session")
def class_run(command, class_folder, tmp_path_factory) -> Path:
    """A run folder with encoder.pt and classifier.pt for `class_folder`: `copy_run` it before writing into it."""
    return _two_stages(command, class_folder, tmp_path_factory.mktemp("run") / "bars")


@pytest.fixture(scope="session")
def attribute_run(command, attribute_folder, tmp_path_factory) -> Path:
    """The same for `attribute_folder`."""
    return _two_stages(command, attribute_folder, tmp_path_factory.mktemp("run") / "marks")
