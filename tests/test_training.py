"""training.py: folders, checkpoints and errors, each as a user meets them."""

import errno
import json
import math
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, copy_run, run_script

import checkpoints
import classifier
import layouts
import metrics
import training


def one_line(result, code: int = 1) -> str:
    """The output of a failed command, which must be one line."""
    lines = [line for line in result.output.strip().splitlines() if not line.startswith("packing")]
    assert result.exit_code == code and len(lines) == 1 and lines[0].startswith("Error: "), result.output
    return lines[0]


@pytest.mark.parametrize(
    ("data", "name"), [("a/v1.5", "v1.5"), ("a/two words", "two_words"), ("pets.zip", "pets"), ("critters", "critters")]
)
def test_runs_are_named_after_the_data(tmp_path, monkeypatch, data, name):
    monkeypatch.chdir(tmp_path)
    if data.endswith(".zip"):
        Path(data).touch()
    for smoke in (False, True):
        options = {"data": data, "outdir": None, "smoke": smoke}
        assert training.out_folder(options) == Path("runs") / (name + "-smoke" * smoke)
    assert training.out_folder(options | {"outdir": "elsewhere"}) == Path("elsewhere")
    if data == "critters":  # a name, not the folder of that name: here that leads elsewhere
        Path("elsewhere").mkdir()
        Path("critters").symlink_to("elsewhere")
        assert training.out_folder(options) == Path("runs/critters-smoke")
        assert set(training.NO_PATHS) == set(layouts.DATASETS)


def test_arguments_that_make_no_sense():
    w, x = torch.nn.Parameter(torch.ones(3)), torch.zeros(2, 3, 8, 8)
    for wrong, why in (
        (lambda: training.Stepper(training.Run(torch.device("cpu"), None, 0), torch.optim.Adam([w])), "fused"),
        (lambda: training.random_crop(x, 2.0), "a crop of"),
        (lambda: training.information_bits(torch.zeros(2, 2), torch.eye(2), "onehot", 1.0), "'onehot'"),
    ):
        with pytest.raises(ValueError, match=why):
            wrong()
    with pytest.raises(click.ClickException, match="--precision bfloat16"):
        training.start("cpu", "bfloat16")


def test_output_folders_that_cannot_be(command, class_folder, tmp_path):
    (tmp_path / "file").touch()
    for outdir in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        line = one_line(command("encoder", "--data", class_folder, "--smoke", "--outdir", outdir, code=1))
        assert f"cannot write to {outdir}" in line and "--outdir" in line


MEMORY = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch, training
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
training.keep_memory()
def huge():  # KiB of this process in pages of 2 MiB
    return int(Path("/proc/self/smaps_rollup").read_text().partition("AnonHugePages:")[2].split()[0])
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = huge()
x = torch.ones(64 * 2**18)  # 64 MiB
grown = huge() - before
for _ in range(3):  # glibc does not fit an aligned piece into one that was freed a moment ago, every time
    del x
    x = torch.ones(64 * 2**18)
del x
before = faults()
x = torch.ones(64 * 2**18)
print(grown, faults() - before)
"""


@pytest.mark.parametrize("limit", [-1, 2**36])  # none, and one that is never reached
def test_memory_is_kept_and_in_large_pages(tmp_path, limit):
    (tmp_path / "script.py").write_text(MEMORY)
    done = run_script(tmp_path / "script.py", ROOT, limit)
    assert done.returncode == 0, done.stderr
    grown, faults = map(int, done.stdout.split())
    assert faults < 100  # 16,384 where the memory went back to the system
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    if "[madvise]" in pages:  # under a limit, no room is set aside
        assert grown > 60 * 2**10 if limit < 0 else grown == 0


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoints.save(tmp_path / "a.pt", {"stage": "gan", "x": 1})

    def fail(state, file):
        Path(file).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(click.ClickException, match="is the disk full"):
        checkpoints.save(tmp_path / "a.pt", {"stage": "gan", "x": 2})
    assert torch.load(tmp_path / "a.pt", weights_only=True)["x"] == 1 and len(list(tmp_path.iterdir())) == 1


def test_errors_of_the_system_are_one_line(command, class_run, class_folder, tmp_path, monkeypatch):
    run = copy_run(class_run, tmp_path / "run")

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "stats.jsonl")

    # By way of classifier, which gan imports late: its annotations need the class itself.
    monkeypatch.setattr(classifier.training, "Log", fail)
    line = one_line(command("gan", "--data", class_folder, "--outdir", run, "--smoke", code=1))
    assert line == "Error: stats.jsonl: No space left on device"


@pytest.mark.parametrize("content", [b"", b".", b"<html>", b"\x80\x02}q\x00(X", b"PK\x03\x04" + bytes(50)])
def test_damaged_checkpoints(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(click.ClickException, match="is not a checkpoint"):
        checkpoints.load(tmp_path / "a.pt", "gan")


def zipped_anew(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Write the parts of a checkpoint again, with other contents or compressed."""
    with zipfile.ZipFile(path) as parts:
        contents = {name: change(name, parts.read(name)) for name in parts.namelist()}
    with zipfile.ZipFile(path, "w", method) as parts:
        for name, content in contents.items():
            parts.writestr(name, content)


def doubled(times: int) -> list:
    """A list of 2^times numbers, which takes `times` lists: each holds the one before twice."""
    x = [0]
    for _ in range(times):
        x = [x, x]
    return x


CLAIMS = {
    "lists within lists": lambda: doubled(100),
    "names without end": lambda: [f"name {i}" for i in range(2 * 10**6)],
    "a tensor of a few bytes": lambda: torch.zeros(1).expand(10**12),
    "many of one": lambda: list(torch.zeros(10**4).expand(100, -1)),
    "no plain tensor": lambda: torch.zeros(9).to_sparse(),
    "complex": lambda: torch.zeros(9, dtype=torch.complex64),
    "no memory": lambda: torch.zeros(9, device="meta"),
}


@pytest.mark.parametrize("what", [*CLAIMS, "compressed", "a part cut short", "a loop"])
def test_checkpoints_that_claim_more_than_they_hold(tmp_path, what):
    path, state = tmp_path / "gan.pt", {"stage": "gan", "x": CLAIMS[what]() if what in CLAIMS else torch.zeros(10**5)}
    if what == "a loop":
        state["x"] = state
    torch.save(state, path)
    if what == "compressed":
        zipped_anew(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    if what == "a part cut short":
        zipped_anew(path, lambda name, content: content[:8] if name.endswith("data/0") else content)
    with pytest.raises(click.ClickException, match="is not a checkpoint of this project, or damaged"):
        checkpoints.load(path, "gan")


def test_what_only_further_training_needs_is_read_for_that_alone(class_run, tmp_path):
    path, state = tmp_path / "encoder.pt", checkpoints.load(class_run / "encoder.pt", "encoder")
    checkpoints.save(path, state | {"training": {"stepper": torch.zeros(3)}})
    to_use, to_go_on = (checkpoints.load(path, "encoder", go_on=go_on) for go_on in (False, True))
    assert to_go_on.keys() - to_use.keys() == {"training"}
    for name, value in to_go_on["model"].items():
        assert torch.equal(value, to_use["model"][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_finite_means_every_element(dtype):
    x = torch.ones(3, 5, dtype=dtype)
    assert checkpoints.all_finite(x) and checkpoints.all_finite(x[:0])
    for value in (math.nan, math.inf, -math.inf) if dtype.is_floating_point else ():
        x[1, 2] = value
        assert not checkpoints.all_finite(x)


def test_uint8_and_float_undo_each_other():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    x = training.to_float(levels)
    assert x.shape == (1, 3, 16, 16) and x.is_contiguous(memory_format=torch.channels_last)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(training.to_uint8(x), levels)
    assert torch.equal(training.to_uint8(x + 0.003), levels) and training.to_uint8(3 + 0 * x).min() == 255


def test_atomic_leaves_the_old_file_or_the_whole_new_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), checkpoints.atomic(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with checkpoints.atomic(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_what_has_no_value_is_null(tmp_path):
    training.write_options(tmp_path / "a.json", {"x": [1.5, math.nan], "y": {"z": math.nan}})
    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read["x"] == [1.5, None] and read["y"] == {"z": None}


@pytest.mark.parametrize("device", ["meta", "nonsense", "cuda:99"])
def test_devices_that_are_not_there(device):
    with pytest.raises(click.ClickException, match=f"--device {device}"):
        training.choose_device(device)


@pytest.mark.parametrize(
    ("stage", "option", "value"),
    [
        ("encoder", "--epochs", "nan"),
        ("encoder", "--epochs", "inf"),
        ("gan", "--kimg", "nan"),
        ("gan", "--augment", "blur"),
        ("classifier", "--attributes", "clusters:1"),
    ],
)
def test_bad_values_are_one_line(command, tmp_path, stage, option, value):
    line = one_line(command(stage, option, value, "--outdir", tmp_path, code=2), code=2)
    assert option in line and value in line
    assert not list(tmp_path.iterdir())
    assert command(stage, "--seed", 2**32, code=2)


def test_commands_of_the_tests_run_on_the_cpu(command):
    """Also where there is a GPU; a device that a test asks for is still the one it gets."""
    for stage in ("encoder", "classifier", "gan"):
        assert json.loads(command(stage, "--dry-run").output)["device"] == "cpu"
        assert json.loads(command(stage, "--dry-run", "--device", "cuda:1").output)["device"] == "cuda:1"


def test_bar_in_a_file_moves_seldom(tmp_path, capfd):
    with training.Log(tmp_path, "gan", total=2000) as log:
        start = time.perf_counter()
        for _ in range(2000):
            time.sleep(0.0005)
            log.step(1)
    assert time.perf_counter() - start > 0.5  # a terminal's bar would have moved five times and more
    assert capfd.readouterr().err.count("img/s]") == 2  # at its start and its end


def test_the_time_that_a_run_takes_is_said_once(tmp_path, capfd, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    with training.Log(
        tmp_path, "gan", total=60_000, lengths={"the default": 60_000, "the published": 6_400_000}
    ) as log:
        for i in range(40):
            now[0] += 0.5 if i > 4 else 100  # 20 images/s after a slow start
            log.step(10)
    said = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "images/s" in line]
    assert said == ["20 images/s: about 50 minutes to the end (from the start: 4 days for the published)"]
    assert [training.duration(s) for s in (59, 119, 120, 7200, 172800)] == [
        *("59 seconds", "119 seconds", "2 minutes", "2 hours", "2 days")
    ]


@pytest.fixture
def chosen(monkeypatch):
    """Behave as if there were GPUs: the numbers of those that are chosen."""
    empty, numbers = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *size, device=None: empty(*size))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", numbers.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield numbers
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def test_cuda_devices_have_a_number(monkeypatch, chosen):
    """torch.cuda.set_device refuses one without; of several processes each takes its own."""
    for device, local_rank, number in (("auto", None, 0), ("cuda", None, 0), ("cuda", "2", 2), ("cuda:1", "2", 1)):
        if local_rank:
            monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert training.start(device).device == metrics.start(device, 8).device == torch.device("cuda", number)
    assert chosen == [0, 0, 0, 0, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("precision", "tf32", "convolutions", "products"),
    [
        *(("auto", None, True, False), ("bf16", None, True, False), ("fp16", None, True, False)),
        *(("fp32", None, False, False), ("fp32", True, True, True), ("bf16", False, False, False)),
    ],
)
def test_tf32(chosen, precision, tf32, convolutions, products):
    """Exact with --precision fp32; what stays in fp32 beside 16 bits may be as coarse as they are, in convolutions."""
    for before in (False, True):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = before
        training.start("cuda", precision, tf32=tf32)
        assert torch.backends.cudnn.allow_tf32 is convolutions
        assert torch.backends.cuda.matmul.allow_tf32 is products


# Information.


def h2(p: float) -> float:
    """Entropy of a coin in bits."""
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def test_information_of_a_discrete_channel():
    joint = torch.tensor([[30, 5, 5], [2, 20, 8], [10, 10, 10]])  # counts of (y, e)
    y, e = (v.flatten() for v in torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"))
    y, e = y.repeat_interleave(joint.flatten()), e.repeat_interleave(joint.flatten())
    logits = (joint.double() / joint.sum(0)).log().T[e]
    p = joint.double() / joint.sum()
    expected = (p * (p / p.sum(0) / p.sum(1, keepdim=True)).log2()).sum().item()
    h_y = training.entropy_bits(F.one_hot(y))
    assert h_y == pytest.approx(-(p.sum(1) * p.sum(1).log2()).sum().item())
    assert training.information_bits(logits, F.one_hot(y).float(), "one-hot", h_y) == pytest.approx(expected, abs=1e-9)


def test_entropy_and_information_in_known_cases():
    y = torch.eye(4).repeat(25, 1)
    assert training.entropy_bits(y) == pytest.approx(2)
    assert training.entropy_bits(torch.eye(2)[[0, 0, 0, 1]]) == pytest.approx(0.811278, abs=1e-6)
    assert training.information_bits(200 * y, y, "one-hot", 2) == pytest.approx(2)
    assert training.information_bits(0 * y, y, "one-hot", 2) == pytest.approx(0, abs=1e-6)
    # A binary symmetric channel that is wrong one time in ten: 1 - h(0.1).
    y = torch.tensor([[0.0], [1.0]]).repeat(50, 1)
    seen = torch.where(torch.arange(100)[:, None] < 10, 1 - y, y)
    found = training.information_bits((2 * seen - 1) * math.log(9), y, "multi-label", training.entropy_bits(y))
    assert found == pytest.approx(1 - h2(0.1), rel=1e-4)


def test_information_of_attributes_uses_their_joint_entropy():
    rows = torch.tensor([[0, 0]] * 45 + [[1, 1]] * 45 + [[0, 1]] * 5 + [[1, 0]] * 5).float()
    joint = training.entropy_bits(rows)
    assert joint == pytest.approx(1 + h2(0.1))  # not 2, the sum of both entropies

    def bits(logits):
        return training.information_bits(logits, rows, "multi-label", joint)

    assert bits((2 * rows - 1) * 100) == pytest.approx(joint)
    # E knows the first attribute alone, so the second with error 0.1: 1 bit in all.
    first = rows[:, :1]
    assert bits(torch.cat([(2 * first - 1) * 100, (2 * first - 1) * math.log(9)], 1)) == pytest.approx(1, abs=1e-6)
    # A guess that knows nothing gives no more than nothing.
    assert bits(torch.zeros(100, 2)) == pytest.approx(joint - 2)
