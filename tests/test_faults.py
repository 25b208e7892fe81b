"""Long runs end well: signals, divergence, full disks, damaged and foreign checkpoints, two runs in one folder."""

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from conftest import COMMANDS, ROOT, TORCHRUN, copy_run, run_script

import checkpoints
import classifier
import encoder
import gan
import training

CPU = training.Run(torch.device("cpu"), None, 0)


def last_line(result) -> str:
    return result.output.strip().splitlines()[-1]


def weights(folder: Path, stage: str) -> str:
    state = checkpoints.load(folder / f"{stage}.pt", stage)
    return checkpoints.fingerprint(state["ema" if stage == "gan" else "model"])


# Signals.


def ask_after(monkeypatch, signum: int, iterations: int) -> None:
    """Have this process get a signal in the given iteration of whatever stage runs next."""
    left = [iterations]

    def counted(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signum)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(encoder, "nt_xent", counted(encoder.nt_xent))
    monkeypatch.setattr(classifier, "loss_of", counted(classifier.loss_of))
    monkeypatch.setattr(gan.Trainer, "discriminate", counted(gan.Trainer.discriminate))


@pytest.mark.parametrize(("stage", "signum"), [("encoder", "SIGTERM"), ("classifier", "SIGINT"), ("gan", "SIGTERM")])
def test_a_stopped_run_goes_on_exactly(command, class_folder, class_run, tmp_path, monkeypatch, stage, signum):
    """Between two saves: nothing is lost, and the end is bit for bit that of the unbroken run."""
    common = ("--data", class_folder, "--smoke", "--no-resume", *(("--kimg", 0.08) if stage == "gan" else ()))
    whole, broken = (copy_run(class_run, tmp_path / name) for name in ("whole", "broken"))
    command(stage, *common, "--outdir", whole)
    with monkeypatch.context() as patch:
        ask_after(patch, signal.Signals[signum], 3)
        result = command(stage, *common, "--outdir", broken, code=128 + signal.Signals[signum])
    assert "stopped and saved" in last_line(result) and "the same command without --no-resume goes on" in last_line(
        result
    )
    assert f"{signum}: finishing the iteration" in result.output
    if stage == "gan":
        assert checkpoints.load(broken / "gan.pt", "gan")["images_seen"] == 24
    command(stage, *(c for c in common if c != "--no-resume"), "--outdir", broken)
    assert weights(broken, stage) == weights(whole, stage)
    lines = [json.loads(line) for line in (broken / "stats.jsonl").read_text().splitlines()]
    images = [line["images"] for line in lines if line["stage"] == stage]
    assert images == sorted(set(images))


def test_a_second_interrupt_ends_at_once_and_background_jobs_can_be_asked(monkeypatch):
    run, seconds = training.Run(torch.device("cpu"), None, 0), [100.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: seconds[0])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as shells start jobs in the background
    try:
        with training.signals(run):
            os.kill(os.getpid(), signal.SIGINT)
            assert run.stopping(0) == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)  # the same key, passed on by torchrun
            seconds[0] += 2
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_before_training_is_one_line(command, class_folder, tmp_path, monkeypatch):
    import dataset

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "open_dataset", interrupted)
    for more, line in (((), "stopped; the same command goes on"), (("--no-resume",), "stopped")):
        result = command("encoder", "--data", class_folder, "--outdir", tmp_path, "--smoke", *more, code=130)
        assert result.output.strip() == line


STOP_ONE = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import gan
discriminate, calls = gan.Trainer.discriminate, []
def counted(self, *arguments, **flags):
    calls.append(1)
    if len(calls) == 3 and self.run.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return discriminate(self, *arguments, **flags)
gan.Trainer.discriminate = counted
gan.main()
"""


def test_a_signal_to_one_process_stops_all_of_them_together(class_folder, class_run, tmp_path):
    folder = copy_run(class_run, tmp_path / "run")
    (tmp_path / "work.py").write_text(STOP_ONE)
    options = ("--data", class_folder, "--outdir", folder, "--smoke", "--kimg", 0.4, "--device", "cpu")
    done = run_script(tmp_path / "work.py", ROOT, *options, processes=2)
    assert done.returncode != 0 and done.stderr.count("stopped and saved at 64 images") == 1, done.stderr[-2000:]
    assert checkpoints.load(folder / "gan.pt", "gan")["images_seen"] == 64  # all look at every eighth iteration


def test_a_signal_amid_a_line_is_taken(monkeypatch):
    def reentrant(*arguments, **options):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    run = training.Run(torch.device("cpu"), None, 0)
    monkeypatch.setattr(training.tqdm, "write", reentrant)
    with training.signals(run):
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stopping(0) == signal.SIGTERM


def test_a_run_killed_amid_its_saves_makes_up_for_them(command, class_folder, class_run, tmp_path, monkeypatch):
    """The end of a process in the first snapshot: the resumed run has every snapshot and picture all the same."""
    folder = copy_run(class_run, tmp_path / "run")
    options = ("--data", class_folder, "--outdir", folder, "--smoke", "--kimg", 0.032, "--snap", 0.016)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_snapshot", lambda *arguments: sys.exit(9))
        command("gan", *options, code=9)
    command("gan", *options)
    assert sorted(p.name for p in (folder / "snapshots").iterdir()) == ["gan-00000016.pt", "gan-00000032.pt"]
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["00000016.png", "00000032.png"]


# Divergence.


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_gradients_that_are_not_finite_are_skipped_and_counted(dtype):
    run = training.Run(torch.device("cpu"), dtype, 0)
    w = torch.nn.Parameter(torch.ones(3))
    stepper = training.Stepper(run, torch.optim.Adam([w], lr=0.1, fused=True))
    assert stepper.step((w * 2).sum()).item() == pytest.approx(12**0.5, rel=1e-3)
    before = w.detach().clone(), stepper.state_dict()["optimizer"]["state"][0]["exp_avg"].clone()
    for i in range(1, 21):
        w.grad = None
        stepper.step((w * math.inf).sum())
        assert stepper.skipped == i
    assert torch.equal(w, before[0])
    assert torch.equal(stepper.state_dict()["optimizer"]["state"][0]["exp_avg"], before[1])
    with pytest.raises(click.ClickException, match=r"diverged: 20 of the last 21 gradients.*--lr"):
        training.check_finite([stepper], 1000, {"lr": 1.0, "precision": "auto"})
    w.grad = None
    stepper.step((w * 2).sum())
    assert stepper.skipped == 20 and not torch.equal(w, before[0])
    stepper.steps.fill_(101)  # a fifth of them
    training.check_finite([stepper], 1000, {"lr": 1.0, "precision": "auto"})
    assert stepper.skipped == stepper.steps == 0


def test_a_run_that_diverges_ends_and_saves_nothing_more(command, class_folder, class_run, tmp_path, monkeypatch):
    """After its first save the generator's gradients are no longer finite: the save stays as it is."""
    folder, generate, calls = copy_run(class_run, tmp_path / "run"), gan.Trainer.generate, []

    def broken(self, joint=False):
        calls.append(1)
        self.options = self.options | {"orth": "penalty"}
        monkeypatch.setattr(gan, "ORTH", 100.0 if len(calls) <= 5 else math.inf)
        return generate(self, joint)

    monkeypatch.setattr(gan.Trainer, "generate", broken)
    options = ("--data", class_folder, "--outdir", folder, "--smoke", "--batch", 4, "--kimg", 0.2, "--snap", 0.02)
    line = last_line(command("gan", *options, code=1))
    assert line.startswith("Error: training has diverged") and "--lr" in line
    state = checkpoints.load(folder / "gan.pt", "gan", go_on=True)
    assert state["images_seen"] < 125 and all(v.isfinite().all() for v in state["trainer"]["decoder"].values())
    for line in (folder / "stats.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_everywhere(command, class_folder, class_run, tmp_path, value):
    folder = copy_run(class_run, tmp_path / "run")
    options = ("--data", class_folder, "--outdir", folder, "--smoke")
    state = checkpoints.load(folder / "encoder.pt", "encoder")
    state["model"]["backbone.conv1.weight"][7, 0, 0, 0] = value
    checkpoints.save(folder / "bad.pt", state)
    for arguments in (("encoder", *options, "--no-resume", "--init", folder / "bad.pt"), ("classifier", *options)):
        if arguments[0] == "classifier":
            (folder / "bad.pt").replace(folder / "encoder.pt")
        line = last_line(command(*arguments, code=1))
        assert "backbone.conv1.weight" in line and "no finite numbers" in line
    assert "no finite numbers" in last_line(command("gan", *options, code=1))


def test_variances_and_kept_weights_are_numbers_too(command, class_folder, class_run, tmp_path):
    folder = copy_run(class_run, tmp_path / "run")
    options = ("--data", class_folder, "--outdir", folder, "--smoke")
    command("classifier", *options, "--no-resume")
    state = checkpoints.load(folder / "classifier.pt", "classifier", go_on=True)
    state["training"]["best"]["weight"][0, 0] = math.nan
    del state["results"]  # as if it had been stopped
    checkpoints.save(folder / "classifier.pt", state)
    line = last_line(command("classifier", *options, code=1))
    assert "classifier.pt" in line and "no finite numbers" in line
    state = checkpoints.load(folder / "encoder.pt", "encoder")
    state["model"]["backbone.bn1.running_var"][0] = -5
    checkpoints.save(folder / "encoder.pt", state)
    line = last_line(command("classifier", *options, "--no-resume", code=1))
    assert "backbone.bn1.running_var" in line and "no finite numbers" in line


# The disk.


@pytest.mark.parametrize("kilobytes", [0, 4, 128, 1024])
def test_a_full_disk_ends_in_one_line_and_loses_nothing(class_folder, class_run, tmp_path, kilobytes):
    """No file may grow beyond a limit: as on a full disk, writing fails wherever it happens."""
    folder = copy_run(class_run, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in folder.glob("*.pt")}
    options = (
        "--data",
        class_folder,
        "--outdir",
        folder,
        "--smoke",
        "--device",
        "cpu",
        "--kimg",
        0.032,
        "--snap",
        0.016,
    )
    done = run_script(ROOT / "gan.py", *options, most=1024 * kilobytes)
    lines = done.stderr.replace("\r", "\n").strip().splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert lines[-1].startswith("Error: ") and ("cannot write" in lines[-1] or "gan.json" in lines[-1])
    assert {p.name: p.read_bytes() for p in folder.glob("*.pt")} == before
    assert not [p for p in folder.iterdir() if p.name.startswith(".") and p.name != ".lock"]


def test_logs_that_cannot_be_written_end_no_run(tmp_path, capsys):
    (tmp_path / "stats.jsonl").mkdir()
    (tmp_path / "tensorboard").touch()
    with training.Log(tmp_path, "gan", total=100) as log:
        for i in range(3):
            log.add(x=torch.tensor(1.0))
            log.write(i)
        log.picture("p", torch.zeros(4, 4, 3, dtype=torch.uint8), 1)
    said = capsys.readouterr().err
    assert said.count("Warning: stats.jsonl cannot be written") == 1
    assert said.count("Warning: TensorBoard's log cannot be written") == 1


def test_a_terminal_that_cannot_be_written_ends_no_run(class_folder, tmp_path):
    """Its reader has gone, or it is a file on a full disk."""
    stages, common = ("encoder", "classifier", "gan"), ["--data", str(class_folder), "--outdir", str(tmp_path / "run")]
    commands = [[str(ROOT / f"{stage}.py"), *common, "--smoke", "--device", "cpu"] for stage in stages]
    commands[-1] += ["--kimg", "0.016"]
    with open("/dev/full", "w") as full:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        command = [sys.executable, "-c", COMMANDS, str(ROOT), json.dumps(commands)]
        done = subprocess.run(command, stdout=full, stderr=full, timeout=300, env=environment)
    assert done.returncode == 0
    for stage in stages:
        checkpoints.load(tmp_path / "run" / f"{stage}.pt", stage, finished=stage != "gan")


@pytest.mark.parametrize("left", [b"\xff\xfe\0\n", b"[" * 100_000, b"[1]\n{}\nnull\n"])
def test_whatever_a_crash_left_in_the_log_ends_no_run(tmp_path, left):
    line = b'{"stage": "gan", "images": 1}\n'
    (tmp_path / "stats.jsonl").write_bytes(line + left)
    with training.Log(tmp_path, "gan", total=100, done=10):
        pass
    assert (tmp_path / "stats.jsonl").read_bytes() == line


def test_a_save_that_fails_underway_is_tried_again(command, class_folder, class_run, tmp_path, monkeypatch):
    folder, save = copy_run(class_run, tmp_path / "run"), torch.save

    def full(state, file):
        if isinstance(state, dict) and state.get("images_seen") == 16:
            raise RuntimeError("unexpected pos 64 vs 0")  # as torch.save reports a full disk
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    options = ("--data", class_folder, "--outdir", folder, "--smoke", "--kimg", 0.032, "--snap", 0.016)
    assert "training goes on until the next save" in command("gan", *options).output
    assert checkpoints.load(folder / "gan.pt", "gan")["images_seen"] == 32


@pytest.mark.parametrize("stage", ["encoder", "classifier", "gan"])
def test_a_stop_that_cannot_be_saved_does_not_say_that_it_was(
    command, class_folder, class_run, tmp_path, monkeypatch, stage
):
    def full(state, file):
        raise RuntimeError("unexpected pos 64 vs 0")  # as torch.save reports a full disk

    folder = copy_run(class_run, tmp_path / "run")
    options = ("--data", class_folder, "--outdir", folder, "--smoke", "--no-resume")
    ask_after(monkeypatch, signal.SIGTERM, 1)
    monkeypatch.setattr(torch, "save", full)
    line = last_line(command(stage, *options, code=1))
    assert line.startswith(f"Error: cannot write {folder / stage}.pt")


def test_a_stop_in_the_last_iteration_is_the_end(command, class_folder, class_run, tmp_path, monkeypatch):
    folder = copy_run(class_run, tmp_path / "run")
    ask_after(monkeypatch, signal.SIGTERM, 2)
    options = ("--data", class_folder, "--outdir", folder, "--smoke", "--kimg", 0.016)
    assert "wrote " in last_line(command("gan", *options))


# Checkpoints.


def damage(path: Path) -> None:
    """Zero some bytes in the middle, as failing disks do."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.unlink()  # it may be a link to another test's
    path.write_bytes(content)


def test_damaged_checkpoints_are_found_and_the_one_before_is_taken(command, class_folder, class_run, tmp_path):
    folder = copy_run(class_run, tmp_path / "run")
    options = ("--data", class_folder, "--outdir", folder, "--smoke")
    command("gan", *options, "--kimg", 0.032, "--snap", 0.016)
    whole = weights(folder, "gan")
    damage(folder / "gan.pt")
    for arguments in (
        ("explore", "sample", "--network", folder / "gan.pt"),
        ("metrics", "--network", folder / "gan.pt"),
    ):
        line = last_line(command(*arguments, code=1))
        assert "damaged" in line and f"the newest whole one is {folder / 'gan.previous.pt'}" in line
    output = command("gan", *options, "--kimg", 0.032, "--snap", 0.016).output
    assert "Warning: " in output and "gan.pt is" in output and "gan.previous.pt" in output
    assert weights(folder, "gan") == whole
    damage(folder / "gan.pt")
    damage(folder / "gan.previous.pt")
    damage(max((folder / "snapshots").iterdir()))
    for arguments in (("explore", "sample", "--network", folder), ("gan", *options)):
        named = f"the newest whole one is {folder / 'snapshots' / 'gan-00000016.pt'}"
        assert named in last_line(command(*arguments, code=1))
    damage(folder / "encoder.pt")
    assert "encoder.pt is" in last_line(command("classifier", *options, "--no-resume", code=1))
    assert "--no-resume" in last_line(command("encoder", *options, code=1))


def first_moments(state: dict) -> dict:
    return state["trainer"]["step_d"]["optimizer"]["state"][0]


def spoil(state: dict, name: str) -> None:
    state[name] = torch.full_like(state[name], math.nan)


BROKEN = {  # none of them writes into a tensor: the tests share those
    "no trainer": lambda s: s.pop("trainer"),
    "no Adam": lambda s: s["trainer"].pop("step_g"),
    "half an Adam": lambda s: s["trainer"]["step_g"]["optimizer"]["state"].popitem(),
    "an Adam of other shapes": lambda s: first_moments(s).update(exp_avg=torch.zeros(3)),
    "an Adam of NaN": lambda s: spoil(first_moments(s), "exp_avg_sq"),
    "other D": lambda s: s["trainer"]["D"].popitem(),
    "no iteration": lambda s: s.pop("iteration"),
    "images of another type": lambda s: s.update(images_seen="many"),
    "no data": lambda s: s.pop("data"),
    "no fingerprint": lambda s: s["data"].pop("fingerprint"),
    "data of another type": lambda s: s.update(data=[1]),
    "no options": lambda s: s.pop("options"),
    "no orth": lambda s: s["options"].pop("orth"),
    "no weights": lambda s: s.pop("ema"),
    "a weight less": lambda s: s["ema"].popitem(),
    "a weight of another shape": lambda s: s["ema"].update({"mapper.bias": torch.zeros(3)}),
    "weights of another type": lambda s: s["ema"].update({"mapper.bias": "zeros"}),
    "other names": lambda s: s["data"].update(label_names=["a", "b"]),
    "rows of another width": lambda s: s["labels"].update(rows=torch.zeros(3, 7, dtype=torch.uint8)),
    "no classifier": lambda s: s["classifier"].pop("config"),
    "another network in its place": lambda s: s["encoder"]["config"].update(backbone="regnet_y_128gf"),
    "a classifier larger than its weights": lambda s: s["classifier"]["config"].update(labels=30_000),
    "more labels than images": lambda s: s["labels"].update(counts=s["labels"]["counts"] + 10**7),
    "images larger than its weights": lambda s: s["data"].update(size=1024),
    "a size that no computer has": lambda s: s["data"].update(size=10**100),
    "weights with numbers for names": lambda s: s["ema"].update({3: torch.zeros(1)}),
    "label names that are no text": lambda s: s["data"].update(label_names=[{}, [], None]),
    "no attributes": lambda s: s["data"].pop("attributes"),
    "no squash": lambda s: s["data"].pop("squash"),
    "a classifier of other features": lambda s: s["classifier"].update(
        config=dict(features=7, labels=3), model=dict(weight=torch.zeros(3, 7), bias=torch.zeros(3))
    ),
    "a tensor for an option": lambda s: s["options"].update(batch=torch.zeros(0)),
    "text for a trainer": lambda s: s.update(trainer="x"),
    "text for a classifier": lambda s: s.update(classifier="x"),
    "a classifier of NaN": lambda s: spoil(s["classifier"]["model"], "bias"),
    "an encoder of NaN": lambda s: spoil(s["encoder"]["model"], "backbone.conv1.weight"),
    "a balance of NaN": lambda s: s["classifier"].update(balance=[math.nan] * 3),
    "an encoder that divides by zero": lambda s: s["encoder"]["config"].update(std=(0.0,) * 3),
    "an encoder of pixels beyond white": lambda s: s["encoder"]["config"].update(mean=(1e30,) * 3),
    "labels of NaN": lambda s: s["labels"].update(rows=torch.full((3, 3), math.nan)),
    "one name twice": lambda s: s["data"].update(label_names=["a", "a", "b"]),
    "a name that clears the screen": lambda s: s["data"].update(label_names=["a", "b", "\x1b[2J"]),
    "labels of another kind": lambda s: s["data"].update(label_kind="two-hot"),
    "images beyond counting": lambda s: s.update(images_seen=10**400),
    "another version": lambda s: s.update(version=1),
    "a tensor for a version": lambda s: s.update(version=torch.zeros(3)),
    "a list": lambda s: s.update(stage=["gan"]),
}


@pytest.fixture(scope="module")
def gan_state(gan_run):
    return torch.load(gan_run / "gan.pt", weights_only=True)


@pytest.fixture(scope="module")
def damaged(gan_run, tmp_path_factory):
    """A copy of the run for any damaged gan.pt, and no other file of stage 3."""
    folder = copy_run(gan_run, tmp_path_factory.mktemp("damaged") / "run")
    for path in folder.glob("gan*.pt"):
        path.unlink()
    return folder


LOAD, LOAD_ONCE = checkpoints.load, functools.cache(checkpoints.load)


def load_but_gan_once(path: Path, stage: str, **how) -> dict:
    return (LOAD if stage == "gan" else LOAD_ONCE)(path, stage, **how)


def copied(state):
    """A copy of dicts and lists at any depth, with the same tensors."""
    if isinstance(state, dict):
        return type(state)({key: copied(value) for key, value in state.items()})
    return [*map(copied, state)] if isinstance(state, list) else state


@pytest.mark.parametrize("what", BROKEN)
def test_incomplete_checkpoints_are_one_line(command, class_folder, damaged, gan_state, monkeypatch, what):
    state = copied(gan_state)
    BROKEN[what](state)
    path = damaged / "gan.pt"
    path.unlink(missing_ok=True)
    torch.save(state, path)
    before = os.stat(path)
    options = ("--data", class_folder, "--outdir", damaged, "--smoke", "--kimg", 0.032)
    anew = ("rows of another width", "no classifier", "another network in its place", "more labels than images")
    anew += ("a classifier larger than its weights", "a balance of NaN", "an encoder that divides by zero")
    anew += ("an encoder of pixels beyond white", "labels of NaN")
    if what not in anew:  # which training does not read
        with monkeypatch.context() as quick:
            quick.setattr(checkpoints, "load", load_but_gan_once)
            quick.setattr(gan, "frozen_encoder", lambda encoder, *how: encoder)  # nothing is trained
            line = last_line(command("gan", *options, code=1))
        assert line.startswith("Error: ") and "gan.pt" in line and len(line) < 500
        after = os.stat(path)
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    training_only = ("no trainer", "no Adam", "half an Adam", "an Adam of other shapes", "an Adam of NaN")
    training_only += ("other D", "no iteration", "text for a trainer")
    refused = (
        contextlib.nullcontext() if what in training_only else pytest.raises(click.ClickException, match=r"gan\.pt")
    )
    with refused:
        gan.load(path)


def test_a_snapshot_is_the_decoder_alone_and_works_in_its_place(command, gan_run, tmp_path, class_folder):
    folder = copy_run(gan_run, tmp_path / "run")
    (snapshot,) = (folder / "snapshots").glob("*.pt")
    assert snapshot.stat().st_size < (folder / "gan.pt").stat().st_size / 5
    network = gan.load(snapshot)
    assert network.encoder is not None and network.classifier is not None
    snapshot.replace(folder / "gan.pt")
    options = ("--data", class_folder, "--outdir", folder, "--smoke", "--kimg", 0.032)
    assert "is a snapshot" in last_line(command("gan", *options, code=1))
    assert gan.load(folder / "gan.pt").encoder is None


def test_snapshots_that_are_kept(tmp_path, monkeypatch):
    state, others = {"stage": "gan", "images_seen": 0}, ("gan-copy.pt", "gan-7.pt", "gan-best of 3.pt")
    folder = tmp_path / "snapshots"
    folder.mkdir()
    for name in others:  # a user's own
        (folder / name).touch()

    def kept(*images: int) -> list[int]:
        for n in images:
            checkpoints.save_snapshot(folder / f"gan-{n:08d}.pt", state, keep=3, every=10_000)
        assert all((folder / name).exists() for name in others)
        return sorted(int(p.stem[4:]) for p in folder.iterdir() if p.name not in others)

    assert kept(*range(1000, 26000, 1000)) == [10_000, 20_000, 23_000, 24_000, 25_000]
    checkpoints.save_snapshot(folder / "gan-00026000.pt", state, keep=3, every=7_000)  # other rounds leave those kept
    assert 10_000 in checkpoints.snapshots(folder, "gan") and 20_000 in checkpoints.snapshots(folder, "gan")
    assert kept(21_000) == [10_000, 20_000, 21_000]  # a run that was started over
    millions = [99_999_000, 100_000_000, 100_001_000]  # of nine digits, which names do not sort
    assert kept(*millions) == [10_000, 20_000, *millions]

    def load(path, *arguments, **options):
        if not path.exists():
            raise click.ClickException("not there")

    monkeypatch.setattr(checkpoints, "load", load)
    assert checkpoints.instead(tmp_path / "gan.pt", "gan").endswith("gan-100001000.pt")  # the newest


# One run at a time.


def test_two_runs_in_one_folder(command, class_folder, class_run, tmp_path):
    folder = copy_run(class_run, tmp_path / "run")
    (folder / ".gan.12345.pt").write_bytes(b"of a killed run")
    holder = "import sys, training; from pathlib import Path\n"
    holder += f"with training.lock(Path({str(folder)!r}), 'gan'):\n print('held', flush=True); sys.stdin.readline()"
    other = subprocess.Popen([sys.executable, "-c", holder], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.pt")}
    for stage in ("encoder", "classifier", "gan"):
        line = last_line(command(stage, "--data", class_folder, "--outdir", folder, "--smoke", "--no-resume", code=1))
        assert f"in use by gan.py, process {other.pid}" in line and "--outdir" in line
    assert {p: p.stat().st_mtime_ns for p in folder.glob("*.pt")} == before
    other.communicate(b"\n")
    command("gan", "--data", class_folder, "--outdir", folder, "--smoke", "--kimg", 0.008)
    assert not (folder / ".gan.12345.pt").exists()


def test_a_run_that_evaluates_holds_its_folder(command, class_folder, tmp_path, monkeypatch):
    seen = []

    def evaluate(*arguments):
        with pytest.raises(click.ClickException, match=r"is in use by encoder\.py"), training.lock(tmp_path, "gan"):
            pass
        seen.append(1)
        return real(*arguments)

    real = encoder.evaluate
    monkeypatch.setattr(encoder, "evaluate", evaluate)
    command("encoder", "--data", class_folder, "--outdir", tmp_path, "--smoke")
    assert seen == [1]


def test_only_what_killed_runs_left_is_cleared(tmp_path):
    left = [
        ".encoder.12.pt",
        ".gan.previous.34.pt",
        ".stats.5.jsonl",
        "snapshots/.gan-00000016.77.pt",
        "samples/.00000016.8.png",
    ]
    kept = [".bashrc.1", ".gan.pt", "other/.gan.12.pt", "gan.pt", ".lock.3"]
    for name in left + kept:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with training.lock(tmp_path, "gan"):
        assert not [name for name in left if (tmp_path / name).exists()]
        assert all((tmp_path / name).exists() for name in kept)


# Processes.

SEPARATE = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import gan
outdir, *options = sys.argv[1:]
gan.main(["--outdir", outdir.replace("RANK", os.environ["RANK"]), *options])
"""


@pytest.mark.long
def test_only_the_first_process_needs_the_folder(class_folder, class_run, tmp_path):
    """Two processes with folders of their own, as on machines that share none: resumed, they train one network."""
    (tmp_path / "work.py").write_text(SEPARATE)
    first, shared = (copy_run(class_run, tmp_path / name) for name in ("run0", "shared"))
    options = ("--data", class_folder, "--smoke", "--device", "cpu")
    for outdir, kimg in ((tmp_path / "runRANK", 0.016), (tmp_path / "runRANK", 0.032), (shared, 0.032)):
        done = run_script(tmp_path / "work.py", ROOT, outdir, "--kimg", kimg, *options, processes=2)
        assert done.returncode == 0, done.stderr[-2000:]
    assert weights(first, "gan") == weights(shared, "gan")
    assert not (tmp_path / "run1").exists()


def test_bad_options_under_torchrun_are_said_once(tmp_path):
    command = [*TORCHRUN, str(ROOT / "gan.py"), "--outdir", str(tmp_path), "--augment", "blur"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and done.stderr.count("Error: --augment blur") == 1, done.stderr
