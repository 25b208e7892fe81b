"""Shells, terminals and users that differ from a workstation's: notebooks, ASCII, no home, a home that is read-only."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile

import click
import pytest
from conftest import COMMANDS, ROOT
from sources import class_folders

import dataset
import metrics
import training
from ops import build


def run(*commands: tuple, before: str = "", **environment) -> str:
    """What scripts print, run with these variables; None unsets one. They must succeed, without a traceback."""
    variables = {k: v for k, v in (os.environ | environment).items() if v is not None}
    arguments = [[str(ROOT / script), *map(str, more)] for script, *more in commands]
    command = [sys.executable, "-c", f"{before}\n{COMMANDS}", str(ROOT), json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, env=variables, cwd=ROOT, timeout=300)
    text = (done.stdout + done.stderr).decode()
    assert done.returncode == 0 and "Traceback" not in text, text[-3000:]
    return text


# Without the package of notebooks, and without a passwd entry, as `docker run --user 12345` makes a user.
BEFORE = """
import pwd, sys
sys.modules["matplotlib_inline"] = None
def unknown(*arguments):
    raise KeyError("getpwuid(): uid not found")
pwd.getpwuid = pwd.getpwnam = unknown
"""

# Where else a home, a cache or a user could be named.
NAMES = ("INFOSCC_CACHE", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "TORCH_HOME", "USER", "LOGNAME", "USERNAME")


@pytest.mark.long
def test_an_odd_shell_ends_no_stage(tmp_path):
    """All at once: an ASCII terminal for names beyond it, the backend of notebooks without its package, no home.

    Packs, the compiled ops and torch's caches go to the system's temporary folder, and a line says so.
    """
    data, folder, temporary = (
        class_folders(tmp_path / "été", {"Füchse": 60, "猫": 60}),
        tmp_path / "läufe",
        tmp_path / "t",
    )
    (ops := temporary / f"infoscc_ops_{os.getuid()}").mkdir(parents=True, mode=0o700)
    shutil.copy(build.library()._name, ops)  # compiling takes half a minute: tests/test_ops.py does it there
    shell = dict(LC_ALL="C", PYTHONIOENCODING="ascii", MPLBACKEND="module://matplotlib_inline.backend_inline")
    shell |= dict.fromkeys((*NAMES, "HOME"))
    common = ("--data", data, "--outdir", folder, "--smoke", "--device", "cpu")
    output = run(
        ("dataset.py", "--data", data),
        ("encoder.py", *common),
        ("classifier.py", *common, "--attributes", "clusters:auto"),
        ("classifier.py", *common, "--no-resume"),
        ("gan.py", *common, "--kimg", 0.016),
        ("explore.py", "embedding", "--network", folder / "encoder.pt"),
        ("explore.py", "sample", "--network", folder),
        ("explore.py", "traverse", "--network", folder),
        ("metrics.py", "--network", folder / "gan.pt", "--smoke", "--device", "cpu"),
        before=BEFORE,
        TMPDIR=str(temporary),
        **shell,
    )
    assert "\\u732b" in output and f"packs go to {temporary}/infoscc-gan-" in output
    assert f"using {temporary}/infoscc_ops_" in output and "fall back" not in output
    assert (folder / "clusters" / "k.png").exists() and (folder / "embedding.png").exists()
    assert (folder / "traverse.png").exists() and not (ROOT / "~").exists()


@pytest.mark.parametrize("module", [training, metrics])
def test_streams_that_are_closed_or_whose_reader_has_gone(module, monkeypatch):
    with pytest.raises(BrokenPipeError), module.one_line():  # which click ends without a word
        raise BrokenPipeError
    command = {training: training.OneLine("x"), metrics: metrics.main}[module]
    monkeypatch.setattr(sys, "stderr", None)  # as `2>&-` leaves it
    with pytest.raises(click.ClickException) if module is metrics else contextlib.nullcontext():
        command.main([], standalone_mode=False)
    assert sys.stderr.write("into the void")


def test_a_cache_that_somebody_else_has_made(monkeypatch, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"infoscc-gan-{os.getuid()}").symlink_to(tmp_path / "theirs")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("INFOSCC_CACHE")
    monkeypatch.setenv("HOME", "/proc/nowhere")
    with pytest.raises(click.ClickException, match="is not a folder of yours: set INFOSCC_CACHE"):
        dataset.cache_folder()


def test_a_home_that_cannot_be_written(class_folder, tmp_path):
    """Packs go to the system's temporary folder; test_ops.py looks at the ops."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    where = dict(HOME="/proc/nowhere", TMPDIR=str(temporary)) | dict.fromkeys(NAMES)
    output = run(("dataset.py", "--data", class_folder, "--size", 16), before=BEFORE, **where)
    assert f"packs go to {temporary}/infoscc-gan-" in output and any(temporary.glob("infoscc-gan-*"))
