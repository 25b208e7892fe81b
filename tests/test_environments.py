"""Shells, terminals and users that differ from a workstation's: notebooks, ASCII, no home, a home that is read-only."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from sources import class_folders


def run(script: str, *arguments, before: str | None = None, **environment) -> str:
    """What a script prints, run with these variables; None unsets one. It must succeed, without a traceback."""
    variables = {k: v for k, v in (os.environ | environment).items() if v is not None}
    command = [sys.executable, *(["-c", before] if before else []), str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env=variables, cwd=ROOT, timeout=300)
    text = (done.stdout + done.stderr).decode()
    assert done.returncode == 0 and "Traceback" not in text, text[-3000:]
    return text


def test_an_ascii_terminal_ends_no_stage(tmp_path):
    """Names of classes, of the data and of the output folder are beyond ASCII."""
    root = class_folders(tmp_path / "été", {"Füchse": 12, "猫": 12})
    common = ("--data", root, "--smoke", "--outdir", tmp_path / "läufe", "--device", "cpu")
    ascii_only = dict(LC_ALL="C", PYTHONIOENCODING="ascii")
    run("dataset.py", "--data", root, **ascii_only)
    run("encoder.py", *common, **ascii_only)
    assert "\\u732b" in run("classifier.py", *common, **ascii_only)
    run("gan.py", *common, "--kimg", 0.016, **ascii_only)
    run("explore.py", "sample", "--network", tmp_path / "läufe", **ascii_only)


WITHOUT_INLINE = """
import os, runpy, sys
sys.modules["matplotlib_inline"] = None
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_backends_of_notebooks_are_not_needed(tmp_path):
    """As in every shell of Jupyter and Colab, here without the package that the variable names."""
    root, folder = class_folders(tmp_path / "data", {"a": 60, "b": 60}), tmp_path / "run"
    how = dict(before=WITHOUT_INLINE, MPLBACKEND="module://matplotlib_inline.backend_inline")
    common = ("--data", root, "--outdir", folder, "--smoke", "--device", "cpu")
    run("encoder.py", *common, **how)
    run("classifier.py", *common, "--attributes", "clusters:auto", **how)
    run("explore.py", "embedding", "--network", folder / "encoder.pt", **how)
    assert (folder / "clusters" / "k.png").exists() and (folder / "embedding.png").exists()


# A user without a passwd entry, as `docker run --user 12345` makes one.
NO_ENTRY = """
import os, pwd, runpy, sys
def unknown(*arguments):
    raise KeyError("getpwuid(): uid not found")
pwd.getpwuid = pwd.getpwnam = unknown
sys.path.insert(0, os.path.dirname(sys.argv[1]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("home", [None, "/proc/nowhere"], ids=["no home", "a home that cannot be written"])
def test_users_without_a_home(class_folder, tmp_path, home):
    """Packs, the compiled ops and torch's caches go to the system's temporary folder, and a line says so."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    names = ("INFOSCC_CACHE", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "TORCH_HOME", "USER", "LOGNAME", "USERNAME")
    how = dict(before=NO_ENTRY, HOME=home, TMPDIR=str(temporary), **dict.fromkeys(names))
    common = ("--data", class_folder, "--outdir", tmp_path / "run", "--smoke", "--device", "cpu")
    output = run("encoder.py", *common, **how)
    assert f"packs go to {temporary}/infoscc-gan-" in output
    run("classifier.py", *common, **how)
    output = run("gan.py", *common, "--kimg", 0.016, **how)
    assert f"using {temporary}/infoscc_ops_" in output and "fall back" not in output
    run("explore.py", "traverse", "--network", tmp_path / "run", **how)
    run("metrics.py", "--network", tmp_path / "run" / "gan.pt", "--smoke", "--device", "cpu", **how)
    assert {p.name.partition("-")[0].partition("_")[0] for p in temporary.iterdir()} >= {"infoscc"}
