"""Shells, terminals and users that differ from a workstation's: notebooks, ASCII, no home, a home that is read-only."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from sources import class_folders

from ops import build

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


def run(*commands: tuple, before: str = "", **environment) -> str:
    """What scripts print, run with these variables; None unsets one. They must succeed, without a traceback."""
    variables = {k: v for k, v in (os.environ | environment).items() if v is not None}
    arguments = [[str(ROOT / script), *map(str, more)] for script, *more in commands]
    command = [sys.executable, "-c", f"{before}\n{COMMANDS}", str(ROOT), json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, env=variables, cwd=ROOT, timeout=300)
    text = (done.stdout + done.stderr).decode()
    assert done.returncode == 0 and "Traceback" not in text, text[-3000:]
    return text


def test_an_ascii_terminal_ends_no_stage(tmp_path):
    """Names of classes, of the data and of the output folder are beyond ASCII."""
    root = class_folders(tmp_path / "été", {"Füchse": 12, "猫": 12})
    common = ("--data", root, "--smoke", "--outdir", tmp_path / "läufe", "--device", "cpu")
    ascii_only = dict(LC_ALL="C", PYTHONIOENCODING="ascii")
    stages = [("encoder.py", *common), ("classifier.py", *common), ("gan.py", *common, "--kimg", 0.016)]
    pictures = ("explore.py", "sample", "--network", tmp_path / "läufe")
    assert "\\u732b" in run(("dataset.py", "--data", root), *stages, pictures, **ascii_only)


def test_backends_of_notebooks_are_not_needed(tmp_path):
    """As in every shell of Jupyter and Colab, here without the package that the variable names."""
    root, folder = class_folders(tmp_path / "data", {"a": 60, "b": 60}), tmp_path / "run"
    without = "import sys; sys.modules['matplotlib_inline'] = None"
    common = ("--data", root, "--outdir", folder, "--smoke", "--device", "cpu")
    run(
        ("encoder.py", *common),
        ("classifier.py", *common, "--attributes", "clusters:auto"),
        ("explore.py", "embedding", "--network", folder / "encoder.pt"),
        before=without,
        MPLBACKEND="module://matplotlib_inline.backend_inline",
    )
    assert (folder / "clusters" / "k.png").exists() and (folder / "embedding.png").exists()


# A user without a passwd entry, as `docker run --user 12345` makes one.
NO_ENTRY = """
import pwd
def unknown(*arguments):
    raise KeyError("getpwuid(): uid not found")
pwd.getpwuid = pwd.getpwnam = unknown
"""


@pytest.mark.parametrize("home", [None, "/proc/nowhere"], ids=["no home", "a home that cannot be written"])
def test_users_without_a_home(class_folder, tmp_path, home):
    """Packs, the compiled ops and torch's caches go to the system's temporary folder, and a line says so."""
    temporary = tmp_path / "tmp"
    (ops := temporary / f"infoscc_ops_{os.getuid()}").mkdir(parents=True, mode=0o700)
    shutil.copy(build.library()._name, ops)  # compiling takes half a minute: tests/test_ops.py does it there
    names = ("INFOSCC_CACHE", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "TORCH_HOME", "USER", "LOGNAME", "USERNAME")
    common = ("--data", class_folder, "--outdir", tmp_path / "run", "--smoke", "--device", "cpu")
    rest = [
        ("classifier.py", *common),
        ("gan.py", *common, "--kimg", 0.016),
        ("explore.py", "traverse", "--network", tmp_path / "run"),
        ("metrics.py", "--network", tmp_path / "run" / "gan.pt", "--smoke", "--device", "cpu"),
    ]
    how = dict(before=NO_ENTRY, HOME=home, TMPDIR=str(temporary), **dict.fromkeys(names))
    output = run(("encoder.py", *common), *([] if home else rest), **how)
    assert f"packs go to {temporary}/infoscc-gan-" in output
    assert not (ROOT / "~").exists()
    if not home:  # where a home is read-only, test_ops.py looks at the ops
        assert f"using {temporary}/infoscc_ops_" in output and "fall back" not in output
    assert {p.name.partition("-")[0].partition("_")[0] for p in temporary.iterdir()} >= {"infoscc"}
