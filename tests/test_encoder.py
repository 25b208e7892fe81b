"""encoder.py: losses against their formulas, augmentation, evaluation, the command run small."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, copy_run, run_script
from PIL import Image

import checkpoints
import encoder
import training

CPU = training.Run(torch.device("cpu"), None, 0)

# Losses.


def test_nt_xent_is_the_equation():
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 5, 8, dtype=torch.float64)
    z = torch.cat([z1, z2])
    total = 0.0
    for i in range(10):
        sim = [math.exp(float(F.cosine_similarity(z[i], z[k], dim=0)) / 0.3) for k in range(10)]
        total -= math.log(sim[(i + 5) % 10] / sum(s for k, s in enumerate(sim) if k != i))
    assert encoder.nt_xent(z1, z2, 0.3).item() == pytest.approx(total / 10, rel=1e-12)


def test_infonce_bound_on_a_channel_of_known_information():
    # Eight equally likely symbols seen without error carry 3 bits; no symbol carries none.
    symbols = torch.arange(512) % 8
    z = F.one_hot(symbols, 128).double()
    bits = encoder.infonce_bits(encoder.nt_xent(z, z, 0.02), 512).item()
    assert bits == pytest.approx(3, abs=0.01) and bits <= math.log2(1023)
    same = torch.ones(64, 128)
    assert encoder.infonce_bits(encoder.nt_xent(same, same, 0.5), 64).item() == pytest.approx(0, abs=1e-4)
    z = torch.eye(128)
    sure = encoder.infonce_bits(encoder.nt_xent(z, z, 0.02), 128).item()
    assert sure == pytest.approx(math.log2(255), abs=1e-3)  # its ceiling


def test_byol_and_barlow_are_their_equations():
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 4, dtype=torch.float64)
    unit = [F.normalize(v, dim=1) for v in (a, b)]
    assert encoder.byol(a, b, b, a).item() == pytest.approx(0, abs=1e-12)
    assert encoder.byol(a, -a, a, -a).item() == pytest.approx(8)
    both = sum(((p - t) ** 2).sum(1).mean() for p, t in ((unit[0], unit[0]), (unit[1], unit[1])))
    assert encoder.byol(a, b, b, a).item() == pytest.approx(float(both), abs=1e-12)
    expected = ((unit[0] - unit[1]) ** 2).sum(1).mean() * 2
    assert encoder.byol(a, b, a, b).item() == pytest.approx(float(expected))
    x = torch.randn(5000, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64) + 3
    z = encoder.whiten(x, ridge=0)
    torch.testing.assert_close(z.T @ z / 5000, torch.eye(7, dtype=z.dtype))
    turn = (x - x.mean(0)).T @ z  # symmetric: x is not turned
    torch.testing.assert_close(turn, turn.T), torch.testing.assert_close(z.mean(0), torch.zeros(7, dtype=z.dtype))
    few = encoder.whiten(torch.randn(5, 7))  # fewer than features: with a ridge still finite, no variance above 1
    assert few.isfinite().all() and torch.linalg.matrix_norm(few.T @ few / 5, 2) < 1
    assert not encoder.whiten(torch.ones(5, 7)).any()  # a collapsed target
    z = encoder.standardise(torch.randn(50, 7, dtype=torch.float64) * 3 + 2)
    torch.testing.assert_close(z.mean(0), torch.zeros(7).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(7).double(), rtol=0, atol=1e-4)

    n1, n2 = ((v - v.mean(0)) / v.std(0, correction=0) for v in (a, b))
    c = [[float((n1[:, i] * n2[:, j]).mean()) for j in range(4)] for i in range(4)]
    on = sum((1 - c[i][i]) ** 2 for i in range(4))
    off = sum(c[i][j] ** 2 for i in range(4) for j in range(4) if i != j)
    assert encoder.barlow(a, b).item() == pytest.approx(on + off / 4, rel=1e-4)


GATHER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import encoder, training
run = training.start("cpu")
torch.manual_seed(0)
views = torch.randn(2, 8, 10)
losses = {
    "simclr": lambda z1, z2: encoder.nt_xent(z1, z2, 0.5),
    "barlow": encoder.barlow,
    "byol": lambda z1, z2: encoder.byol(z1, z2, z2.detach(), z1.detach()),
}
for name, loss in losses.items():
    torch.manual_seed(1)
    net = torch.nn.Linear(10, 128)
    whole = loss(*net(views))
    expected = torch.autograd.grad(whole, net.weight)[0]
    mine = views[:, run.rank * 4 : run.rank * 4 + 4]
    value = loss(*encoder.gather(net(mine)))
    (value * run.world).backward()
    run.average_gradients(net.parameters())
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(net.weight.grad, expected)
    sys.stdout.write(f"equal {name}\\n")  # in one piece: two processes share the pipe
    sys.stdout.flush()
dist.destroy_process_group()
"""


def test_two_processes_compute_the_loss_of_the_joint_batch(tmp_path):
    (tmp_path / "work.py").write_text(GATHER)
    done = run_script(tmp_path / "work.py", ROOT, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(done.stdout.count(f"equal {name}") == 2 for name in ("simclr", "barlow", "byol"))


SAME = """
import sys, torch.distributed as dist
sys.path.insert(0, sys.argv.pop(1))
import encoder
train = encoder.train
def watched(net, *rest):
    def compare(seen, extra, *must):
        states = net.state_dict(), extra["predictor"]
        weights = [v.double().sum().item() for state in states for k, v in state.items() if "running" not in k]
        both = [None, None]
        dist.all_gather_object(both, weights)
        sys.stdout.write(f"same {both[0] == both[1]}\\n")
        sys.stdout.flush()
        rest[-1](seen, extra, *must)
    return train(net, *rest[:-1], compare)
encoder.train = watched
encoder.main()
"""


def test_two_processes_train_one_network(class_folder, tmp_path):
    (tmp_path / "work.py").write_text(SAME)
    options = ("--data", class_folder, "--method", "byol", "--smoke", "--device", "cpu", "--outdir", tmp_path)
    done = run_script(tmp_path / "work.py", ROOT, *options, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "same True" in done.stdout and "same False" not in done.stdout
    assert done.stdout.count("Wrote") == 1


# Augmentation.


def test_augmented_views_differ_by_image_and_keep_range():
    x = torch.rand(1, 3, 32, 32).expand(64, -1, -1, -1) * 2 - 1
    torch.manual_seed(3)
    views = encoder.augment(x)
    assert views.shape == x.shape and views.dtype == torch.float32
    assert views.min() >= -1 and views.max() <= 1
    assert torch.unique(views.flatten(1), dim=0).shape[0] == 64
    torch.manual_seed(3)
    assert torch.equal(views, encoder.augment(x))


def test_crops_have_the_stated_areas_and_aspects_and_half_are_flipped():
    ramp = ((torch.arange(64) + 0.5) / 32 - 1) * 0.5  # along the image's side, from -0.5 to 0.5
    slopes = []
    for image in (ramp.expand(64, 64), ramp[:, None].expand(64, 64)):
        torch.manual_seed(0)
        view = encoder.augment(image.expand(600, 3, 64, 64), area=0.25, strength=0.0)[:, 0]
        line = view[:, 32] if len(slopes) == 0 else view[:, :, 32]
        slopes.append((line[:, 48] - line[:, 16]) / (ramp[48] - ramp[16]))  # part of the side that is seen
    width, height = slopes
    area, aspect = (width.abs() * height), width.abs() / height
    assert area.min() > 0.25 * 0.98 and area.max() < 1.02 and area.min() < 0.32 and area.max() > 0.9
    assert aspect.max() < 4 / 3 * 1.02 and aspect.min() > 3 / 4 * 0.98 and aspect.max() > 1.2
    assert abs((width < 0).float().mean() - 0.5) < 0.08 and height.min() > 0


def test_colour_changes_have_the_stated_shares():
    flat = torch.tensor([0.2, -0.3, 0.1]).view(1, 3, 1, 1).expand(4000, 3, 8, 8)
    for p in (0.2, 0.6):
        view = encoder.augment(flat, strength=0.0, grey=p)[:, :, 4, 4]
        grey = (view.std(1) < 1e-3).float().mean()
        assert abs(grey - p) < 0.03
        assert torch.allclose(view[view.std(1) > 1e-3], flat[0, :, 0, 0], atol=1e-4)  # nothing else changed
    changed = ((encoder.augment(flat, strength=0.5)[:, :, 4, 4] - flat[:, :, 4, 4]).abs().amax(1) > 1e-3).float().mean()
    assert abs(changed - (0.8 + 0.2 * 0.2)) < 0.03
    spread = [encoder.augment(flat, strength=s)[:, :, 4, 4].std(0).mean() for s in (0.25, 0.5, 1.0)]
    assert spread[0] < spread[1] < spread[2]


# Network.


@pytest.mark.parametrize(("backbone", "stem", "features"), [("resnet18", "small", 512), ("resnet50", "imagenet", 2048)])
def test_network_shapes_and_stems(backbone, stem, features):
    net = encoder.Encoder(backbone, stem).eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    h = net(x)
    assert h.shape == (2, features) == (2, net.features) and net.projection(h).shape == (2, 128)
    side = net.backbone.maxpool(net.backbone.conv1(x)).shape[-1]
    assert side == {"small": 32, "imagenet": 8}[stem]


def test_mean_and_std_normalise_the_input():
    torch.manual_seed(0)
    plain = encoder.Encoder("resnet18", "imagenet").eval()
    other = encoder.Encoder("resnet18", "imagenet", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).eval()
    other.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    torch.testing.assert_close(other(x), plain((x - mean) / std))


def test_build_gives_the_same_function_frozen():
    net = encoder.Encoder("resnet18", "imagenet")
    for name, value in net.state_dict().items():
        if "running" in name:
            value.uniform_(0.5, 2)
    built = encoder.build({"config": net.config, "model": net.state_dict()})
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(built(x), net.eval()(x))
    assert not built.training and not any(p.requires_grad for p in built.parameters())


def test_embedding_keeps_the_order_of_the_images():
    net = encoder.Encoder("resnet18", "imagenet").eval()
    images = torch.randint(0, 256, (7, 32, 32, 3), dtype=torch.uint8)
    h = encoder.embed(net, images.split(3), 7, CPU)
    assert h.shape == (7, 512) and h.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(h, net(training.to_float(images)))


# Evaluation.


def test_knn_and_linear_probe_of_clumps():
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(4, 16))
    y, yv = draw.integers(0, 3, 400), draw.integers(0, 3, 200)
    h, q = (np.float32(centres[v] + 0.3 * draw.normal(size=(len(v), 16))) for v in (y, yv))
    hot = np.eye(4)[y]  # the fourth class has no image
    shares = encoder.knn(h, hot, q)
    assert shares.shape == (200, 4) and np.allclose(shares.sum(1), 1) and not shares[:, 3].any()
    nearest = (h / np.linalg.norm(h, axis=1, keepdims=True)) @ (q[0] / np.linalg.norm(q[0]))
    np.testing.assert_allclose(shares[0], hot[nearest.argsort()[-20:]].mean(0))
    for scores in (shares, encoder.linear_probe(h, hot, q, True)):
        assert encoder.score(scores, np.eye(4)[yv], True) > 0.97
    two = encoder.linear_probe(h[y < 2], hot[y < 2], q, True)  # two classes: scikit-learn then gives one column
    assert (two.argmax(1) == yv)[yv < 2].mean() > 0.97
    assert np.isfinite(encoder.linear_probe(h[:1], hot[:1], q, True)).all()  # one image


def test_linear_probe_of_attributes_is_balanced():
    draw = np.random.default_rng(0)
    on = draw.random((2000, 2)) < (0.05, 0.5)
    h = on @ draw.normal(size=(2, 8)) + 0.8 * draw.normal(size=(2000, 8))
    labels = np.concatenate([on, np.ones((2000, 1))], 1)  # the third is always on: nothing to learn
    scores = encoder.linear_probe(h[:1000], labels[:1000], h[1000:], False)
    assert not scores[:, 2].any()
    recall = [((scores[:, 0] > 0) == side)[labels[1000:, 0] == side].mean() for side in (0, 1)]
    assert min(recall) > 0.6 and abs(recall[0] - recall[1]) < 0.25


def test_balanced_accuracy_of_rare_attributes():
    from sklearn.metrics import balanced_accuracy_score

    draw = np.random.default_rng(0)
    y = (draw.random((500, 3)) < (0.05, 0.5, 0.9)).astype(np.float32)
    scores = y + draw.normal(size=y.shape)
    expected = np.mean([balanced_accuracy_score(y[:, i], scores[:, i] > 0.4) for i in range(3)])
    assert encoder.score(scores, y, False, 0.4) == pytest.approx(expected, abs=1e-6)


def test_effective_rank_of_known_spectra():
    q = torch.linalg.qr(torch.randn(200, 9)).Q
    q = torch.linalg.qr(torch.cat([torch.ones(200, 1), q], 1)).Q[:, 1:]  # centred
    assert encoder.effective_rank(q[:, :8]) == pytest.approx(8, rel=1e-4)
    assert encoder.effective_rank(q[:, :1] @ torch.randn(1, 20)) == pytest.approx(1, abs=0.01)
    p = torch.tensor([0.5, 0.25, 0.25])
    assert encoder.effective_rank(q[:, :3] * p) == pytest.approx(2**1.5, rel=1e-4)


# The command.


def state_of(folder):
    return checkpoints.load(folder / "encoder.pt", "encoder", go_on=True)


def same(a, b):
    return all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_run_writes_everything_and_refuses_other_settings(command, class_run, class_folder, tmp_path):
    state = state_of(class_run)
    assert state["config"]["backbone"] == "resnet18" and state["images_seen"] == 32
    assert state["data"]["label_names"] == ["high", "low", "middle"] and state["data"]["size"] == 32
    results = json.loads((class_run / "encoder.json").read_text())["results"]
    assert 0 <= results["knn"] <= 1 and 0 <= results["pixel_knn"] <= 1 and results["rank"] > 1
    lines = [json.loads(line) for line in (class_run / "stats.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] == "encoder"]
    assert lines and all(line["mi_bits"] <= math.log2(2 * 8 - 1) for line in lines)

    out = copy_run(class_run, tmp_path / "run")
    before = (out / "encoder.pt").read_bytes()
    common = ("--data", class_folder, "--outdir", out, "--smoke")
    assert "is finished" in command("encoder", *common).output
    for extra, name in (
        (("--method", "byol"), "method"),
        (("--backbone", "resnet34"), "backbone"),
        (("--stem", "small"), "stem"),
        (("--batch", "16"), "batch"),
        (("--seed", "5"), "seed"),
        (("--lr", "0.1"), "lr"),
        (("--size", "16"), "size"),
    ):
        line = command("encoder", *common, *extra, code=1).output.splitlines()[-1]
        assert line.startswith("Error: ") and f"made with {name} " in line and "--no-resume" in line
    assert (out / "encoder.pt").read_bytes() == before
    shorter = command("encoder", *common, "--epochs", 0.5, "--no-resume").output
    assert "(0.5 epochs)" in shorter and state_of(out)["images_seen"] == 40  # five batches of 8


def test_other_images_are_refused_by_name(command, class_run, attribute_folder, tmp_path):
    out = copy_run(class_run, tmp_path / "run")
    output = command("encoder", "--data", attribute_folder, "--outdir", out, "--smoke", code=1).output
    line = output.strip().splitlines()[-1]
    assert "other images" in line and "bars" in line and "marks" in line


TWO_STEPS = 0.24  # epochs of 66 images in batches of 8


@pytest.fixture(scope="module")
def two_steps(command, class_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-steps")
    command("encoder", "--data", class_folder, "--outdir", folder, "--smoke", "--epochs", TWO_STEPS)
    state = state_of(folder)
    assert state["images_seen"] == 16
    return state


@pytest.mark.parametrize(
    "extra",
    [
        ("--method", "byol"),
        ("--method", "barlow"),
        ("--seed", "1"),
        ("--batch", "16"),
        ("--lr", "0.01"),
        ("--precision", "bf16"),
        ("--stem", "small"),
    ],
    ids=lambda e: "".join(e).lstrip("-"),
)
@pytest.mark.long
def test_each_option_changes_the_result(command, two_steps, class_folder, tmp_path, monkeypatch, extra):
    targets = []
    keep = SimpleNamespace(deepcopy=lambda net: targets.append(copy.deepcopy(net)) or targets[-1])
    monkeypatch.setattr(encoder, "copy", keep)
    train = encoder.train
    monkeypatch.setattr(
        encoder, "train", lambda network, *rest: train(network.eval(), *rest)
    )  # as `evaluate` leaves it
    command("encoder", "--data", class_folder, "--outdir", tmp_path, "--smoke", "--epochs", TWO_STEPS, *extra)
    assert len(targets) == ("byol" in extra) and all(target.training for target in targets)
    for p in (p for target in targets for p in target.parameters()):  # else its graph grows with every step
        assert p.is_leaf and not p.requires_grad
    state, base = state_of(tmp_path), two_steps
    name, value = extra[0].removeprefix("--"), extra[1]
    assert str(state["options"][name]) == value
    shared = [k for k in base["model"] if base["model"][k].shape == state["model"][k].shape]
    assert any(not torch.equal(base["model"][k], state["model"][k]) for k in shared if k.endswith("weight"))
    assert all(v.isfinite().all() for v in state["model"].values() if v.is_floating_point())
    if name == "method" and value == "byol":
        assert {"predictor", "target"} <= set(state["training"])


def test_an_interrupted_run_goes_on_exactly(command, class_folder, tmp_path, monkeypatch):
    """BYOL, which has most to remember; test_faults.py stops a run of SimCLR."""
    common = ("--data", class_folder, "--smoke", "--method", "byol", "--device", "cpu")
    command("encoder", *common, "--outdir", tmp_path / "whole")
    save = checkpoints.save

    def save_once(path, state, **how):
        save(path, state)
        raise OSError("killed")

    with monkeypatch.context() as m:
        m.setattr(checkpoints, "save", save_once)
        with pytest.raises(AssertionError, match="killed"):
            command("encoder", *common, "--outdir", tmp_path / "broken")
    assert state_of(tmp_path / "broken")["images_seen"] == 16
    assert "Resuming" in command("encoder", *common, "--outdir", tmp_path / "broken").output
    whole, resumed = state_of(tmp_path / "whole"), state_of(tmp_path / "broken")
    assert whole["images_seen"] == resumed["images_seen"] == 32
    assert same(whole, resumed)


def test_length_size_workers_and_starting_over(command, class_folder, tmp_path, monkeypatch):
    import dataset

    asked = []
    batches = dataset.Dataset.batches

    def spy(self, *arguments):
        asked.append(arguments)
        return batches(self, *arguments)

    monkeypatch.setattr(dataset.Dataset, "batches", spy)
    common = ("--data", class_folder, "--outdir", tmp_path, "--batch", "16", "--size", "16", "--workers", "0")
    command("encoder", *common, "--epochs", "0.4")
    first = state_of(tmp_path)
    assert first["images_seen"] == 32 and first["data"]["size"] == 16 and asked[-1][-1] == 0  # 26 images: two batches
    command("encoder", *common, "--epochs", "0.7")
    longer = state_of(tmp_path)
    assert longer["images_seen"] == 48 and asked[-1][3] == 32 and not same(first, longer)
    command("encoder", *common, "--epochs", "0.4", "--no-resume")
    assert same(first, state_of(tmp_path))


def test_small_images_are_trained_in_single_precision_on_a_cpu(command, class_folder, tmp_path):
    """At 16 px oneDNN's bf16 gradients would hold whatever stood in memory before."""
    common = ("--data", class_folder, "--size", "16", "--device", "cpu", "--smoke")
    line = command("encoder", *common, "--outdir", tmp_path / "half", "--precision", "bf16", code=2).output
    assert "--stem imagenet on 16 px needs --precision fp32" in line and not (tmp_path / "half").exists()
    for name, precision in (("auto", "auto"), ("single", "fp32")):
        command("encoder", *common, "--outdir", tmp_path / name, "--precision", precision)
    assert same(state_of(tmp_path / "auto"), state_of(tmp_path / "single"))


def test_init_from_a_run_and_from_imagenet_weights(command, class_run, class_folder, tmp_path):
    source = class_run / "encoder.pt"
    net = encoder.Encoder("resnet18", "imagenet")
    options = dict(backbone="resnet18", stem="auto")
    config, weights = encoder.first_weights(str(source), options)
    checkpoints.init_weights(net, weights, str(source))
    assert same({"model": net.state_dict()}, state_of(class_run)) and config["stem"] == "imagenet"

    torch.manual_seed(7)
    theirs = torchvision.models.resnet18().eval()
    old = {k: v for k, v in theirs.state_dict().items() if "num_batches" not in k}  # as in files of old
    torch.save(old, tmp_path / "resnet18-x.pth")
    config, weights = encoder.first_weights(str(tmp_path / "resnet18-x.pth"), options)
    net = encoder.Encoder(**config).eval()
    checkpoints.init_weights(net, weights, "x")
    x = torch.rand(2, 3, 64, 64)
    seen = torchvision.transforms.functional.normalize(x, encoder.IMAGENET_MEAN, encoder.IMAGENET_STD)
    theirs.fc = torch.nn.Identity()
    torch.testing.assert_close(net(2 * x - 1), theirs(seen), rtol=1e-3, atol=1e-4)

    common = ("--data", class_folder, "--outdir", tmp_path / "run", "--smoke")
    weights = ("--init", tmp_path / "resnet18-x.pth")
    for extra, said in (
        ((*weights, "--backbone", "resnet34"), "does not fit"),
        ((*weights, "--stem", "small"), "backbone.conv1.weight"),
        (("--init", ROOT / "encoder.py"), "cannot be read as weights"),
        (("--init", tmp_path / "none.pt"), "no such file"),
        (("--init", class_run / "classifier.pt"), "classifier.py"),
    ):
        output = command("encoder", *common, *extra, code=1).output
        (line,) = [line for line in output.splitlines() if line.startswith("Error: ")]
        assert said in line and output.endswith(line + "\n")
    assert not (tmp_path / "run").exists()
    command("encoder", *common, *weights)
    assert state_of(tmp_path / "run")["config"]["std"] == tuple(2 * s for s in encoder.IMAGENET_STD)
    assert not same(state_of(tmp_path / "run"), state_of(class_run))


def test_a_single_validation_image(command, tmp_path):
    (tmp_path / "x" / "only").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (32, 32), (90, 9 * i, 0)).save(tmp_path / "x" / "only" / f"{i}.png")
    command("encoder", "--data", tmp_path / "x", "--outdir", tmp_path / "one", "--smoke")
    assert json.loads((tmp_path / "one" / "encoder.json").read_text())["results"]["val_images"] == 1


def test_multi_label_data_is_evaluated_too(attribute_run):
    results = json.loads((attribute_run / "encoder.json").read_text())["results"]
    assert 0 <= results["linear"] <= 1 and results["val_images"] > 0


def test_learning_rates():
    """The published one: 10 epochs flat, then steps down a cosine that ends at 0.54 (AFHQ) and 0.95 (CelebA)."""
    for half_cosine, end in ((403, 0.54), (1266, 0.95)):
        rates = [encoder.rate("published", 100 * e + 50, 20_000, 100, half_cosine) for e in range(200)]
        assert rates[:10] == [1] * 10 and rates[-1] == pytest.approx(end, abs=0.006)
        assert (np.diff(rates[9:]) < 0).all()
        assert encoder.rate("published", 1099, 20_000, 100, half_cosine) == rates[10]  # one step per epoch
    ours = [encoder.rate("cosine", i, 1000, 100, 0) for i in (0, 25, 50, 525, 1000)]
    assert ours[0] == 0 and ours[1] == pytest.approx(0.5, abs=0.01) and ours[2] > 0.99 and ours[4] == 0
    assert ours[3] == pytest.approx(0.5, abs=0.05)


def test_presets_and_dry_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "any").mkdir()
    rows = {
        d: json.loads(command("encoder", "--data", d, "--dry-run").output)
        for d in ("afhq", "celeba", "critters", "any")
    }
    names = ("lr", "weight_decay", "batch", "temperature", "area", "strength", "grey", "epochs")
    for data, size, batch in (("afhq", 256, 32), ("celeba", 128, 128)):  # as published
        assert [rows[data][k] for k in names] == [3e-4, 1e-4, batch, 0.5, 0.08, 1, 0.2, 200]
        more = dict(protocol="paper", backbone="resnet50", schedule="published", stem="imagenet", size=size)
        assert {k: rows[data][k] for k in more} == more
        assert rows[data]["squash"] == rows[data]["train_on_all"] == (data == "celeba")
    assert rows["any"]["backbone"] == "resnet18" and rows["any"]["protocol"] == "ours"
    assert [rows["any"][k] for k in names] == [1e-3, 1e-4, 64, 0.1, 0.6, 0.4, 0.2, 200]
    assert rows["critters"]["stem"] == "imagenet" and rows["any"]["stem"] == "auto"
    row = json.loads(command("encoder", "--data", "afhq", "--batch", "8", "--epochs", "3", "--dry-run").output)
    assert row["batch"] == 8 and row["epochs"] == 3
    assert json.loads(command("encoder", "--data", "any", "--smoke", "--dry-run").output)["epochs"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["any"]


@pytest.mark.parametrize(("options", "images"), [((), 40_000), (("--epochs", 2), None)])
def test_length_on_a_cpu(command, attribute_folder, tmp_path, monkeypatch, options, images):
    monkeypatch.setitem(encoder.PRESETS, "", encoder.PRESETS[""] | dict(epochs=2000.0))
    totals = []
    monkeypatch.setattr(encoder, "train", lambda *a: totals.append((a[5], len(a[1]))) or (a[5], {}))
    command("encoder", "--data", attribute_folder, "--outdir", tmp_path, "--device", "cpu", *options)
    total, n = totals[0]
    assert total == (images or 2 * n)


def test_bad_options_are_one_line(command, class_folder, tmp_path):
    common = ("--data", class_folder, "--outdir", tmp_path, "--smoke")
    assert "--device" in command("encoder", *common, "--device", "cuda:77", code=1).output
    assert "training images" in command("encoder", *common, "--batch", "500", code=2).output
    command("encoder", *common, "--epochs", "0", code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("knn", "linear", "said"),
    [(0.9, 0.9, ""), (0.5, 0.9, "nearest neighbours tell"), (0.4, 0.4, "nearest neighbours and a linear probe tell")],
)
def test_an_embedding_below_pixels_is_said(capsys, knn, linear, said):
    encoder.report(dict(rank=3.0, images=9, val_images=9, knn=knn, linear=linear, pixel_knn=0.6), "one-hot")
    printed = capsys.readouterr().out
    assert ("Warning: " in printed) == bool(said) and said in printed
