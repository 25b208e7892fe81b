"""The training step against the plain baseline: with the same numbers, the same losses and updates."""

import contextlib
import copy
import importlib
import json
import sys

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, copy_run, run_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoints
import encoder
import gan
import ops
import training
from bench import gpu
from bench.__main__ import main as bench
from bench.baseline import PlainDecoder, both_losses, build, plain_discriminator, take_discriminator
from bench.gpu import BUDGET, judge, line, make_trainer, verdict

conv2d = importlib.import_module("ops.conv2d")  # ops.conv2d is the function


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def of_gradients(network):
    """The network with the gradients that the last backward left in the place of its weights."""
    gradients = copy.deepcopy(network)
    for p, q in zip(gradients.parameters(), network.parameters(), strict=True):
        p.data = torch.zeros_like(q) if q.grad is None else q.grad.clone(memory_format=torch.contiguous_format)
    return gradients


def as_plain(network, disc):
    """Our decoder or discriminator as the baseline writes it, with the same weights."""
    if hasattr(network, "generator"):
        plain = PlainDecoder(32, 3)
        plain.take(network)
    else:
        plain = plain_discriminator(disc, 32)
        take_discriminator(plain, network)
    return plain


@pytest.mark.parametrize(
    ("disc", "loss", "convolutions"),
    [
        ("global", "lsgan", "winograd"),
        ("global", "ns", "usual"),
        ("patch", "hinge", "usual"),
        ("patch", "hinge", "winograd"),
    ],
)
@pytest.mark.long
def test_same_losses_and_updates_as_the_plain_step(float64, disc, loss, convolutions, monkeypatch):
    """Losses and gradients to 1e-9 in float64, and the weights after one Adam step of each update: as float64 runs, and
    with the convolutions of float32."""
    ours, plain = sides = tuple(build(side, 32, 8, disc, "resnet18", loss) for side in ("ours", "plain"))
    if convolutions == "winograd":
        monkeypatch.setattr(conv2d, "_FAST", (torch.float64,))
        with torch.no_grad():  # else cut-out images give zeros before the leaky ReLUs, and roundings choose their sides
            for p in ours.D.parameters():
                p.add_(0.01 * torch.randn_like(p))
        plain.take(ours)
    real, y = torch.rand(8, 3, 32, 32) * 2 - 1, torch.eye(3)[torch.arange(8) % 3]
    for update in ("regularise", "discriminate", "penalise", "generate"):
        arguments = (real, y) if update in ("discriminate", "penalise") else ()
        orthogonality = ours.decoder.orthogonality().item()
        losses = both_losses(sides, update, arguments)
        if update == "penalise":
            losses[0] *= ours.options["r1"]
        if update == "generate":
            losses[0] += 100 * orthogonality
        assert losses[0] == pytest.approx(losses[1], rel=1e-9), update
        network = "decoder" if update in ("regularise", "generate") else "D"
        found, wanted = as_plain(of_gradients(getattr(ours, network)), disc), getattr(plain, network)
        gradients = [torch.zeros_like(q) if q.grad is None else q.grad for q in wanted.parameters()]
        scale = max(g.abs().max().item() for g in gradients)
        for p, g in zip(found.parameters(), gradients, strict=True):
            torch.testing.assert_close(p, g, rtol=1e-9, atol=1e-9 * scale)
    for network in ("decoder", "D"):
        found, wanted = as_plain(getattr(ours, network), disc), getattr(plain, network)
        for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


# What a GPU would be asked, counted without one.

# Matrix products that stay in fp32 under autocast: shifts of the augmentation, which are exact, there and back; a crop,
# there and back, and the blur in its two factors; and, in each of six layers, the Gram matrix of a basis with its two
# gradients.
IN_FP32 = {"discriminate": {"bmm float32": 4}, "generate": {"bmm float32": 4, "mm float32": 18}}
IN_FP32 |= {"discriminate_r1r2": IN_FP32["discriminate"], "regularise": {"bmm float32": 6}}


@pytest.fixture(scope="module", params=["global", "patch"])
def counted(request, shared):
    """What each update launches in bf16 at 256 px, by discriminator."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} lets no other device stand in for a GPU")

    def count(folder) -> None:
        done = run_script(ROOT / "tests" / "fake_device.py", request.param, "bfloat16")
        assert done.returncode == 0, done.stderr[-2000:]
        folder.mkdir()
        (folder / "updates.json").write_text(done.stdout)

    folder = shared(f"counted-{request.param}", count)
    return request.param, json.loads((folder / "updates.json").read_text())


@pytest.mark.long
def test_launches_stay_within_their_budget(counted):
    """Nor do they fall far below it: then the budget no longer guards anything, and is to be lowered."""
    disc, updates = counted
    assert updates.keys() == BUDGET[disc].keys()
    for name, update in updates.items():
        most = BUDGET[disc][name]
        assert 0.8 * most <= update["total"] <= most, (name, update["launches"])
        assert update["launches"]["triton"] > 10  # the ops took a GPU's way


def test_no_update_waits_for_the_device_or_copies_from_it(counted):
    for name, update in counted[1].items():
        assert update["waits"] == [] and update["copies"] == [], name


def test_matrix_products_under_autocast_are_in_16_bits(counted):
    for name, update in counted[1].items():
        found = {op: times for op, times in update["products"].items() if op.endswith("float32")}
        if name == "penalise":  # R1 is computed in fp32 throughout
            assert found == update["products"]
        else:
            assert found == IN_FP32[name] and update["products"]["convolution bfloat16"] > 10


@pytest.mark.parametrize("disc", ["global", "patch"])
def test_every_parameter_is_in_the_format_of_its_kernel(disc):
    """After the Trainer's .to, the average's too: kernels of convolutions channels_last, all else in plain order."""
    trainer, _, _ = make_trainer(training.Run(torch.device("cpu"), None, 0), 64, 4, disc, "resnet18")
    seen = 0
    for network in (trainer.decoder, trainer.ema, trainer.D, trainer.encoder):
        for name, p in network.named_parameters():
            last = p.ndim == 4
            assert p.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format), name
            seen += last
    assert seen > 30
    for block in trainer.decoder.generator.blocks:  # what the kernel reads: maps whose channels lie side by side
        for maps in block.convolve(block.subspace.maps()):
            assert maps.is_contiguous(memory_format=torch.channels_last)


def test_the_frozen_encoder_in_16_bits_is_the_same_under_autocast():
    network = encoder.Encoder("resnet18", "imagenet").eval()
    whole, half = (gan.frozen_encoder(network, 64, torch.device("cpu"), dtype) for dtype in (None, torch.bfloat16))
    weights = [w for n, w in half.state_dict().items() if n.endswith("weight")]
    assert len(weights) > 15 and all(w.dtype == torch.bfloat16 for w in weights) and half.mean.dtype == torch.float32
    x = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(whole(x), half(x)) and not torch.equal(half(x), half(-x))
    norm = ops.freeze(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(12)), (3, 2, 2), torch.bfloat16)[1]
    assert norm.weight.dtype == norm.running_var.dtype == torch.float32


# CUDA graphs, as far as they can be tested without a GPU: what a graph would repeat is recorded and repeated.


class Recording(TorchDispatchMode):
    """In the place of torch.cuda.CUDAGraph: holds the operations that ran within it and the tensors that they took."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, out in self.calls:
            taken = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                # What is neither a view nor changed in place.
                if torch.is_tensor(old) and old.untyped_storage().data_ptr() not in taken:
                    old.copy_(new)


@pytest.fixture
def graphs_on_the_cpu(monkeypatch):
    """Makes CUDA graphs work without a GPU; capturing changes nothing, as there. Gives the list of trainers to keep."""
    trainers = []

    class OnCPU(gan.Graphs):
        def __init__(self, on):
            super().__init__(on=True)

    @contextlib.contextmanager
    def graph(recording, pool, capture_error_mode):
        states = [(t.state(), [(s.skipped, s.steps) for s in (t.step_g, t.step_d)]) for t in trainers]
        before, generator = [t.clone() for t in tensors(states)], torch.get_rng_state()
        with recording:
            yield
        for now, then in zip(tensors(states), before, strict=True):
            now.copy_(then)
        torch.set_rng_state(generator)

    def tensors(states):
        return [t for t in tree_leaves(states) if torch.is_tensor(t)]

    monkeypatch.setattr(gan, "Graphs", OnCPU)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.Tensor, "tolist", lambda coins: [True] * len(coins))  # the augmentation's way on GPUs
    monkeypatch.setattr(conv2d, "_FAST", ())  # our C++ is not dispatched by torch, so it is not recorded
    for name in ("bias_lrelu", "subspace_lrelu"):
        monkeypatch.setattr(sys.modules[f"ops.{name}"], "choose", lambda impl, device: "ref")
    return trainers


@pytest.mark.parametrize("penalty", ["r1r2", "r1"])
def test_updates_as_graphs_are_the_same_updates(graphs_on_the_cpu, monkeypatch, penalty):
    """Other images, rates and random numbers reach the repeated operations: losses and weights are the same bits."""
    run = training.Run(torch.device("cpu"), None, 0)
    options = dict(
        batch=4, kimg=0.024, lr_decay=1.0, penalty=penalty, penalty_every=2, augment="color,translation,cutout", width=4
    )
    found = {}
    for eager in (99, 2):
        monkeypatch.setattr(gan.Graphs, "EAGER", eager)
        torch.manual_seed(1)
        classifier = torch.nn.Linear(512, 3).requires_grad_(False)
        network = gan.frozen_encoder(encoder.Encoder("resnet18", "imagenet").eval(), 32, run.device)
        given = gan.default_options(32, **options)
        trainer = gan.Trainer(given, run, torch.eye(3), "one-hot", network.requires_grad_(False), classifier)
        graphs_on_the_cpu[:] = [trainer]
        losses = []
        for i in range(6):
            real = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(i)) * 2 - 1
            run.reseed(4 * i)
            stats = trainer.iteration(
                i, real.contiguous(memory_format=torch.channels_last), torch.eye(3)[[0, 1, 2, i % 3]]
            )
            losses.append({name: value.item() for name, value in stats.items()})
        found[eager] = (
            losses,
            checkpoints.fingerprint(trainer.decoder.state_dict()),
            checkpoints.fingerprint(trainer.D.state_dict()),
        )
        # With penalties and without, each other time, D's step is two graphs.
        names = ["discriminate", "generate", "regularise", "penalise" if penalty == "r1" else "discriminate"]
        assert sorted(key[0].__name__ for key in trainer.graphs.captured) == (sorted(names) if eager == 2 else [])
        assert int(trainer.step_g.steps) == 9 and int(trainer.step_g.skipped) == 0
    assert found[2] == found[99]


def test_a_graph_that_cannot_be_captured_is_said_with_the_remedy(
    graphs_on_the_cpu, monkeypatch, command, class_run, class_folder, tmp_path
):
    @contextlib.contextmanager
    def refuse(*arguments, **options):
        try:
            yield
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    graphs = gan.Graphs(True)

    def double(x):
        return {"twice": 2 * x}

    assert [graphs(double, torch.tensor(i))["twice"].item() for i in range(2)] == [0, 2]
    with pytest.raises(ops.CaptureError, match=r"double cannot be .* \(operation not permitted "):
        graphs(double, torch.tensor(2))
    run = copy_run(class_run, tmp_path / "run")
    error = command("gan", "--data", class_folder, "--outdir", run, "--smoke", code=1).output.splitlines()[-1]
    assert "cannot be a CUDA graph (operation not permitted" in error and error.endswith("give --graph off")


def test_updates_flags_and_shapes_that_differ_have_graphs_of_their_own(graphs_on_the_cpu):
    graphs, seen = ops.Graphs(True), []

    def times(n):
        def update(x, twice=False):
            return {"y": n * x * (2 if twice else 1)}

        return update

    for update, factor in ((times(3), 3), (times(5), 5)):  # of one name
        for shape in ((2,), (1,)):
            for twice in (False, True):
                seen += [
                    torch.equal(
                        graphs(update, i * torch.ones(shape), twice=twice)["y"],
                        i * factor * (1 + twice) * torch.ones(shape),
                    )
                    for i in range(4)
                ]
    assert all(seen) and len(graphs.captured) == 8


def test_graphs_are_captured_anew_after_another_state_is_loaded(graphs_on_the_cpu):
    run = training.Run(torch.device("cpu"), None, 0)
    trainer = gan.Trainer(gan.default_options(32, batch=2, width=4, reg_every=0), run, torch.eye(3), "one-hot")
    graphs_on_the_cpu[:] = [trainer]
    for i in range(3):
        trainer.iteration(i, torch.zeros(2, 3, 32, 32), torch.eye(3)[:2])
    assert trainer.graphs.captured
    trainer.load_state(copy.deepcopy(trainer.state()), trainer.ema.state_dict())
    assert not trainer.graphs.captured
    before = checkpoints.fingerprint(trainer.D.state_dict())
    trainer.iteration(3, torch.zeros(2, 3, 32, 32), torch.eye(3)[:2])
    assert checkpoints.fingerprint(trainer.D.state_dict()) != before


def test_augmentation_is_the_same_on_both_ways(monkeypatch):
    """On CPUs what a coin leaves out does not run; on GPUs it runs without effect."""
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    for seed in range(12):
        torch.manual_seed(seed)
        skipping = gan.augment(x, "color,translation,cutout")
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda coins: [True] * len(coins))
            torch.manual_seed(seed)
            masked = gan.augment(x, "color,translation,cutout")
        torch.testing.assert_close(masked, skipping, rtol=0, atol=1e-6)


@pytest.mark.long
def test_the_gpu_check_runs_and_says_what_it_skipped(tmp_path):
    """On the CPU, quickly; what only a GPU can tell is named as skipped."""
    done = CliRunner().invoke(gpu.main, ["--device", "cpu", "--quick", "--out", str(tmp_path / "gpu.json")])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    lines = done.stdout.splitlines()
    assert lines[:-1] == [line(row) for row in rows]
    skipped = {row["part"] for row in rows if row["note"].startswith("skipped")}
    assert skipped == {"waits", "busy", "graphs", "r1_error", "processes"}
    told = {row["part"] for row in rows if row["ok"] or row["value"] is not None}
    assert told == {"op_tests", "bandwidth", "launches", "r1_error", "short_runs", "rates"}


def test_a_part_that_fails_is_said_and_the_others_go_on(monkeypatch):
    def broken(run, quick):
        yield verdict("begins", ok=True)
        raise RuntimeError("no such kernel\nand more")

    def fine(run, quick):
        yield verdict("a figure", 2.5, ok=2.5 <= 2, note="at most 2")

    monkeypatch.setattr(gpu, "PARTS", (broken, fine))
    rows = list(judge(training.Run(torch.device("cpu"), None, 0), True))
    assert [line(row).split()[0] for row in rows] == ["ok", "FAIL", "FAIL"]
    assert rows[1]["part"] == "broken" and rows[1]["note"] == "RuntimeError: no such kernel" and "2.5" in line(rows[2])
    monkeypatch.setattr(gpu, "SECONDS", -1)
    assert all(row["note"].startswith("skipped") for row in judge(training.Run(torch.device("cpu"), None, 0), True))


def test_the_benchmark_prints_what_it_saves(tmp_path):
    """One group of it; a side compared with itself is as fast as itself."""
    done = CliRunner().invoke(bench, ["--quick", "--only", "data", "--out", str(tmp_path / "b.json")])
    assert done.exit_code == 0, done.output
    printed = done.stdout.splitlines()
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert len(rows) == 3 and len(printed) == 4
    for row, text in zip(rows, printed, strict=False):
        assert row["images_per_second"] == pytest.approx(1 / row["ours"])
        assert text.startswith(row["what"]) and f"{row['ratio']:.2f}x" in text and text.endswith(row["note"])
    assert rows[0]["ratio"] == 1 and rows[0]["spread"] == [1, 1] and rows[0]["against"] == "ImageFolder"
