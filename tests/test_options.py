"""Every option of every command, given odd values: one line, no traceback, nothing written but where it should be."""

import functools
import sys
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner
from conftest import copy_run

import checkpoints
import classifier
import critters
import dataset
import encoder
import explore
import gan
import metrics
import trained
import training

ODD = (
    *("", " ", "-1", "0", "9" * 30, "-" + "9" * 30, "1e306", "nan", "inf", "0x10", "x" * 300, "x" * 5000, "/" * 5000),
    *("~nosuchuser", "~nosuchuser/x", "a\0b", "a\nb", "\x1b[31m", "\udcff", "été ☃", ",", "0-", "0-" + "9" * 30),
    *("/dev/null", "/dev/full", "/proc/self/mem", "/proc/1/root"),
    *("cuda:99", "cuda:-1", "cuda:" + "9" * 30, "meta", "mps"),
)
COMMANDS = {(module.__name__,): module.main for module in (encoder, classifier, gan, metrics, dataset, critters)}
COMMANDS |= {("explore", name): command for name, command in explore.main.commands.items()}
CASES = [
    (name, parameter.opts[0])
    for name, command in COMMANDS.items()
    for parameter in command.params
    if isinstance(parameter, click.Option) and not parameter.is_flag and not isinstance(parameter.type, click.Choice)
]


class Accepted(click.ClickException):
    """Stands for the work that would follow, which other tests do."""

    exit_code = 0


@pytest.fixture(scope="module")
def folder(command, gan_run, shared):
    def export(folder) -> None:
        copy_run(gan_run, folder)
        command("explore", "export", "--network", folder)  # small, so that each command below loads it in no time

    return shared("options", export)


@pytest.mark.parametrize(("name", "option"), CASES, ids=lambda case: case if isinstance(case, str) else " ".join(case))
def test_odd_values(class_folder, folder, tmp_path, monkeypatch, name, option):
    def accept(*arguments, **options):
        raise Accepted("accepted")

    for module, work in (
        *((encoder, "train"), (classifier, "fit"), (gan.Trainer, "iteration"), (trained.TrainedRun, "__init__")),
        (explore.latents, "project"),
    ):
        monkeypatch.setattr(module, work, accept)
    monkeypatch.setitem(sys.modules, "page", SimpleNamespace(serve=accept))  # without gradio, slow to import
    for module in (checkpoints, gan):  # every value would read the same files again
        monkeypatch.setattr(module, "load", functools.cache(module.load))
    monkeypatch.chdir(tmp_path)
    run = copy_run(folder, tmp_path / "run")
    common = {
        "explore": ["--network", run / "export.pt"],
        "dataset": ["--data", class_folder],
        "critters": ["--num", 1],
        "metrics": ["--network", run / "gan.pt", "--device", "cpu"],
    }.get(name[0], ["--data", class_folder, "--outdir", run, "--device", "cpu"])
    if name[-1] == "project":
        common = [next(class_folder.glob("*/*.png")), *common]
    for value in ODD:
        arguments = [*name[1:], *map(str, common), option, value]
        result = CliRunner().invoke(explore.main if name[0] == "explore" else COMMANDS[name], arguments)
        said = (name, option, value[:50], result.output[-2000:])
        assert result.exception is None or isinstance(result.exception, SystemExit), (said, result.exception)
        assert result.exit_code in (0, 1, 2), said
        errors = [line for line in result.output.splitlines() if line.startswith("Error: ") and "accepted" not in line]
        assert len(errors) == (result.exit_code > 0) and "Traceback" not in result.output, said
        if name[0] != "critters":  # which works alone, and shows click's usage lines
            assert "Usage: " not in result.output and max(map(len, errors), default=0) < 2100, said


def test_no_command_is_left_out():
    assert len(CASES) > 50 and {name[0] for name, _ in CASES} == {*(n[0] for n in COMMANDS)}


def test_tilde_is_the_home_in_every_path(command, class_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bars").symlink_to(class_folder)
    command("encoder", "--data=~/bars", "--outdir=~/run", "--smoke")
    assert (tmp_path / "run" / "encoder.pt").exists()


@pytest.mark.parametrize("stage", ["encoder", "classifier", "gan"])
def test_another_size_is_refused_before_anything_is_packed(command, class_folder, folder, monkeypatch, stage):
    monkeypatch.setattr(dataset, "prepare", lambda *a, **o: pytest.fail("it packs first"))
    for more in ((), ("--unconditional",) if stage == "gan" else ()):
        result = command(stage, "--data", class_folder, "--outdir", folder, "--size", 64, *more, code=1)
        assert "was made with size 32, but here size is 64" in result.output


def test_too_little_memory_is_one_line(command, class_folder, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise training.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")

    monkeypatch.setattr(encoder, "train", fail)
    result = command("encoder", "--data", class_folder, "--outdir", tmp_path, "--smoke", code=1)
    assert result.output.strip().splitlines()[-1].startswith("Error: not enough memory")
