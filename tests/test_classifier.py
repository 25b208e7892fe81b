"""classifier.py: training on channels of known information, scores against scikit-learn, the command."""

import copy
import csv
import json
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import OTHER_PRECISION, copy_run

import checkpoints
import classifier
import dataset
import encoder
import training

OPTIONS = dict(batch=256, lr=3e-3, weight_decay=1e-6, balance=True, seed=0)
CPU = training.Run(torch.device("cpu"), None, 0)


def h2(p: float) -> float:
    """Entropy of a coin in bits."""
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def information(logits, y, kind):
    return training.information_bits(logits, y, kind, training.entropy_bits(y))


# Training and scores.


def channel(n: int, on: float, off: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features that say a fair coin e, at an odd scale, and an attribute that is on with probability `on` or `off`."""
    draw = torch.Generator().manual_seed(seed)
    e = (torch.rand(n, generator=draw) < 0.5).float()
    y = (torch.rand(n, generator=draw) < torch.where(e == 1, on, off)).float()
    return torch.stack([e * 1e-3 + 7, 500 * torch.randn(n, generator=draw)], 1), y[:, None]


def test_training_reaches_the_known_information():
    (h, y), (hv, yv) = (channel(n, 0.9, 0.1, seed) for n, seed in ((8000, 0), (8000, 1)))
    one_hot = [torch.cat([1 - v, v], 1) for v in (y, yv)]
    net = classifier.fit(h, one_hot[0], True, OPTIONS, 20, None, {})
    bits = classifier.evaluate(net(hv), one_hot[1], ["a", "b"], True, torch.zeros(2))["bits"]
    assert bits["mi"] == pytest.approx(1 - h2(0.1), abs=0.03) and bits["mi"] <= bits["h_y"]


def test_rare_attributes_are_balanced_and_still_calibrated():
    (h, y), (hv, yv) = (channel(20000, 0.15, 0.01, seed) for seed in (0, 1))  # 8 % on
    net = classifier.fit(h, y, False, OPTIONS, 20, None, {})
    balance = classifier.weights_of(y, False).log()
    assert balance.item() == pytest.approx(math.log(0.92 / 0.08), abs=0.1)
    results = classifier.evaluate(net(hv), yv, ["rare"], False, balance)
    assert results["labels"]["rare"]["balanced"] > 0.7  # an unbalanced one would say 'off' always: 0.5
    expected = h2(0.08) - (h2(0.15) + h2(0.01)) / 2
    assert results["bits"]["mi"] == pytest.approx(expected, abs=0.01)
    naive = information(net(hv), yv, "multi-label")
    assert naive < 0  # the same logits without their balance taken off


def test_rare_classes_are_balanced_and_still_calibrated():
    """Two classes are two sides of one attribute: the same weights, up to a factor, and the same information."""
    (h, y), (hv, yv) = (channel(20000, 0.15, 0.01, seed) for seed in (0, 1))  # 8 % in the second class
    y, yv = (torch.cat([1 - v, v], 1) for v in (y, yv))
    weights = classifier.weights_of(y, True)
    assert (weights * y.sum(0)).tolist() == pytest.approx([10_000, 10_000])
    expected = h2(0.08) - (h2(0.15) + h2(0.01)) / 2
    for balanced, rare_found in ((True, 1.0), (False, 0.0)):
        net = classifier.fit(h, y, True, OPTIONS | {"balance": balanced}, 20, None, {})
        balance = weights.log() if balanced else torch.zeros(2)
        results = classifier.evaluate(net(hv), yv, ["often", "rare"], True, balance)
        assert (net(hv).argmax(1)[yv[:, 1] == 1] == 1).float().mean() == pytest.approx(rare_found, abs=0.3)
        assert results["bits"]["mi"] == pytest.approx(expected, abs=0.01)


def test_the_held_out_tenth_stops_overfitting():
    draw = torch.Generator().manual_seed(0)
    h, y = torch.randn(100, 300, generator=draw), F.one_hot(torch.arange(100) % 2).float()  # nothing to learn
    hv, yv = torch.randn(500, 300, generator=draw), F.one_hot(torch.arange(500) % 2).float()
    net = classifier.fit(h, y, True, OPTIONS, 200, None, {})
    assert information(net(hv), yv, "one-hot") > -0.3
    first = classifier.fit(h, y, True, OPTIONS, 200, net, {})  # starts where `net` is, so its first epoch is no worse
    assert information(first(hv), yv, "one-hot") > -0.3


def test_each_attribute_keeps_its_own_epoch():
    """One that cannot be learnt stops early; another beside it learns on as it would alone."""
    h, y = channel(400, 0.9, 0.1, 0)
    h = torch.cat((h, torch.randn(400, 50)), 1)
    noise = y[torch.randperm(400)]
    both = classifier.fit(h, torch.cat((y, noise), 1), False, OPTIONS, 100, None, {})
    for i, attribute in enumerate((y, noise)):
        alone = classifier.fit(h, attribute, False, OPTIONS, 100, None, {})
        torch.testing.assert_close((both.weight[i], both.bias[i]), (alone.weight[0], alone.bias[0]))
    assert both.weight[1, 2:].norm() < both.weight[0, 2:].norm()


def test_scores_agree_with_scikit_learn():
    from sklearn.metrics import average_precision_score, balanced_accuracy_score

    draw = np.random.default_rng(0)
    y = (draw.random((400, 3)) < (0.1, 0.5, 0.8)).astype(np.float32)
    logits = (2 * y - 1 + 2 * draw.normal(size=y.shape)).round(1).astype(np.float32)  # rounded: with ties
    results = classifier.evaluate(torch.from_numpy(logits), torch.from_numpy(y), ["a", "b", "c"], False, torch.zeros(3))
    for i, v in enumerate(results["labels"].values()):
        guess = logits[:, i] > 0
        assert v["ap"] == pytest.approx(average_precision_score(y[:, i], logits[:, i]), abs=1e-6)
        assert v["balanced"] == pytest.approx(balanced_accuracy_score(y[:, i], guess), abs=1e-6)
        assert v["accuracy"] == pytest.approx((guess == y[:, i]).mean(), abs=1e-6)
        assert v["majority"] == pytest.approx(max(y[:, i].mean(), 1 - y[:, i].mean()), abs=1e-6)

    classes = draw.integers(0, 3, 400)
    logits = np.eye(3)[classes] + draw.normal(size=(400, 3))
    one_hot = torch.from_numpy(np.eye(3)[classes])
    with warnings.catch_warnings():  # of constant labels nothing can be said
        warnings.simplefilter("error")
        zeros = torch.zeros(4, 2)
        constant = classifier.evaluate(zeros, zeros, ["a", "b"], False, zeros[0])["overall"]
    assert math.isnan(constant["balanced"]) and math.isnan(constant["ap"])
    overall = classifier.evaluate(torch.from_numpy(logits), one_hot, ["a", "b", "c"], True, torch.zeros(3))["overall"]
    assert overall["accuracy"] == pytest.approx((logits.argmax(1) == classes).mean())
    assert overall["balanced"] == pytest.approx(balanced_accuracy_score(classes, logits.argmax(1)))
    assert overall["majority"] == pytest.approx(np.bincount(classes).max() / 400)
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert overall["ap"] == pytest.approx(average_precision_score(np.eye(3)[classes], softmax), abs=1e-6)


@pytest.mark.parametrize("classes", [1, 2])
def test_one_image_is_scored(classes):
    one = torch.eye(classes)[:1]
    results = classifier.evaluate(one, one, ["a", "b"][:classes], True, torch.zeros(classes))
    assert results["overall"]["accuracy"] == 1 and results["bits"]["h_y"] == 0


# The command.


def state_of(folder: Path) -> dict:
    return checkpoints.load(folder / "classifier.pt", "classifier", go_on=True)


def test_run_reports_and_builds(command, class_run, class_folder, tmp_path):
    out = copy_run(class_run, tmp_path / "run")
    (out / "classifier.pt").unlink()
    output = command("classifier", "--data", class_folder, "--outdir", out).output
    state = state_of(out)
    assert state["data"]["label_names"] == ["high", "low", "middle"] and state["config"] == dict(features=512, labels=3)
    assert state["encoder_hash"] == checkpoints.fingerprint(checkpoints.load(out / "encoder.pt", "encoder")["model"])
    assert state["results"] == json.loads((out / "classifier.json").read_text())["results"]
    assert "I(Y;E) >= H(Y) - H(Y|E)" in output and "majority" in output and "middle" in output
    assert state["results"]["bits"]["mi"] <= state["results"]["bits"]["h_y"]
    assert state["results"]["overall"]["accuracy"] > state["results"]["overall"]["majority"]  # bars are easy

    # The saved layer gives the reported accuracy through the saved encoder.
    val = dataset.open_dataset(str(class_folder), 32, "val")
    images = (torch.from_numpy(val.images[i : i + 5]) for i in range(0, len(val), 5))
    h = encoder.embed(encoder.build(checkpoints.load(out / "encoder.pt", "encoder")), images, len(val), CPU)
    net = classifier.build(state)
    right = net(h).argmax(1) == torch.from_numpy(np.asarray(val.labels)).argmax(1)
    assert right.float().mean().item() == pytest.approx(state["results"]["overall"]["accuracy"])
    assert not net.weight.requires_grad and not net.training
    assert "is finished" in command("classifier", "--data", class_folder, "--outdir", out).output


def test_going_on_equals_an_unbroken_run_and_options_count(command, class_run, class_folder, tmp_path, monkeypatch):
    def train(name, *extra):
        if not (tmp_path / name).exists():
            (tmp_path / name).mkdir()
            shutil.copy(class_run / "encoder.pt", tmp_path / name)
        command("classifier", "--data", class_folder, "--outdir", tmp_path / name, *extra)
        return state_of(tmp_path / name)["model"]["weight"]

    whole = train("whole", "--epochs", "6")
    half = train("half", "--epochs", "3")
    assert not torch.equal(whole, half)
    assert torch.equal(train("half", "--epochs", "6"), whole)
    assert torch.equal(train("whole", "--epochs", "6", "--no-resume"), whole)
    asked, sequential = [], dataset.Dataset.sequential
    monkeypatch.setattr(dataset.Dataset, "sequential", lambda *a: asked.append(a[-1]) or sequential(*a))
    assert torch.equal(train("workers", "--epochs", "6", "--workers", "0"), whole) and asked == [0, 0]
    for extra in (
        ("--seed", "1"),
        ("--batch", "8"),
        ("--precision", OTHER_PRECISION),
        ("--init", tmp_path / "half/classifier.pt"),
    ):
        assert not torch.equal(train(extra[0], "--epochs", "6", *extra), whole), extra


def test_attributes_are_chosen_by_name(command, attribute_run, attribute_folder, tmp_path):
    out = copy_run(attribute_run, tmp_path / "run")
    common = ("--data", attribute_folder, "--outdir", out)
    line = command("classifier", *common, "--attributes", "Top,Left", "--smoke", code=1).output.splitlines()[-1]
    assert "made with attributes" in line and "--no-resume" in line
    output = command("classifier", *common, "--attributes", "Top,Left", "--no-resume", "--smoke").output
    state = state_of(out)
    assert state["data"]["label_names"] == ["Top", "Left"] and state["data"]["label_kind"] == "multi-label"
    assert list(state["results"]["labels"]) == ["Top", "Left"] and len(state["balance"]) == 2
    assert "weighted by their rarity" in output
    line = command("classifier", *common, "--attributes", "Bald", "--no-resume", code=1).output.splitlines()[-1]
    assert "Bald" in line and "Left" in line


@pytest.mark.parametrize("balance", [[0.0], [math.nan] * 3, ["a"] * 3])
def test_a_balance_that_does_not_fit_is_one_line(command, class_run, class_folder, tmp_path, balance):
    out = copy_run(class_run, tmp_path / "run")
    checkpoints.save(
        out / "classifier.pt", checkpoints.load(out / "classifier.pt", "classifier", go_on=True) | {"balance": balance}
    )
    line = command("gan", "--data", class_folder, "--outdir", out, "--smoke", code=1).output.splitlines()[-1]
    assert line.startswith("Error: ") and "classifier.pt" in line


def test_a_few_images_go_on():
    """Of fewer than ten none is held out; the log has a line for each save, with the mean over its epochs."""
    torch.manual_seed(0)
    h, y, states, values, lines = torch.randn(9, 5), torch.randint(2, (9, 3)).float(), [], [], []
    log = SimpleNamespace(add=lambda **given: values.append(given), step=int, write=lines.append)
    whole = classifier.fit(h, y, False, OPTIONS, 20, None, {}, log, lambda *s: states.append(copy.deepcopy(s[1])))
    assert lines == [n * 9 for n in range(2, 20, 2)] and "held_out_loss" not in values[0]
    again = classifier.fit(h, y, False, OPTIONS, 20, None, states[4])
    assert torch.equal(whole.weight, again.weight)


def test_clusters_of_several_attributes(command, attribute_folder, attribute_run, tmp_path):
    out = copy_run(attribute_run, tmp_path / "run")
    options = ("--data", attribute_folder, "--outdir", out, "--smoke", "--no-resume", "--attributes", "clusters:3")
    command("classifier", *options)
    assert set(state_of(out)["results"]["clusters"]) == {"Left", "Right", "Top"}


def test_clusters_become_the_labels(command, class_run, class_folder, tmp_path):
    out = copy_run(class_run, tmp_path / "run")
    common = ("--data", class_folder, "--outdir", out, "--smoke", "--no-resume")
    output = command("classifier", *common, "--attributes", "clusters:4").output
    state = state_of(out)
    assert state["data"]["attributes"] == "clusters:4" and state["data"]["label_kind"] == "one-hot"
    assert state["data"]["label_names"] == [f"cluster{i}" for i in range(4)] and state["config"]["labels"] == 4
    assert state["assignments"]["train"].dtype == torch.int64  # there may be more than 256
    assert "purity" in output and "NMI" in output
    for split, value in state["assignments"].items():
        rows = list(csv.DictReader((out / "clusters" / f"{split}.csv").read_text().splitlines()))
        assert [int(r["cluster"]) for r in rows] == value.tolist()
    assert len(list((out / "clusters").glob("cluster*.png"))) == 4
    table = tmp_path / "mine.csv"
    rows = (out / "clusters" / "train.csv").read_text() + (out / "clusters" / "val.csv").read_text().partition("\n")[2]
    table.write_text(rows)
    command("classifier", *common, "--attributes", table)
    table.write_text(rows.replace(",3", ",2"))
    changed = command("classifier", *common[:-1], "--attributes", table, code=1).output
    assert "was made from other clusters than" in changed and "--no-resume" in changed
    command("classifier", *common, "--attributes", "clusters:4")
    state = state_of(out)
    agreement = state["results"]["clusters"]["label"]
    assert 0 <= agreement["nmi"] <= 1
    del state["results"]  # as if killed before the end
    checkpoints.save(out / "classifier.pt", state)
    assert "unfinished" in command("gan", *common[:-1], code=1).output
    assert "purity" in command("classifier", *common[:-1], "--attributes", "clusters:4").output
    assert state_of(out)["results"]["clusters"]["label"] == agreement

    command("classifier", *common, "--attributes", "clusters:auto")
    state = state_of(out)
    k = state["config"]["labels"]
    assert 3 <= k <= 15 and state["data"]["attributes"] == f"clusters:{k}" and (out / "clusters" / "k.png").exists()
    assert len(list((out / "clusters").glob("cluster*.png"))) == k
    again = command("classifier", *common[:-1], "--attributes", "clusters:auto").output
    assert "is finished" in again


def test_tables_of_clusters(command, class_run, class_folder, tmp_path):
    """What clusters:K wrote comes back; the published lists have the same form."""
    out, tables = copy_run(class_run, tmp_path / "run"), tmp_path / "tables"
    common = ("--data", class_folder, "--outdir", out, "--smoke", "--no-resume")
    command("classifier", *common, "--attributes", "clusters:4")
    first = state_of(out)["assignments"]
    shutil.copytree(out / "clusters", tables)
    command("classifier", *common, "--attributes", f"{tables}/train.csv,{tables}/val.csv")
    state = state_of(out)
    assert all(torch.equal(state["assignments"][split], first[split]) for split in ("train", "val"))
    assert state["data"]["label_kind"] == "one-hot" and state["data"]["attributes"] == "clusters:4"
    for split in ("train", "val"):  # merged by hand, where they lie
        path = out / "clusters" / f"{split}.csv"
        path.write_text("".join(f"{line},note\n" for line in path.read_text().replace(",1\n", ",0\n").splitlines()))
    merged = [out / "clusters" / f"{split}.csv" for split in ("train", "val")]
    before = [path.read_text() for path in merged]
    command("classifier", *common, "--attributes", ",".join(map(str, merged)))
    assert [path.read_text() for path in merged] == before
    assert state_of(out)["data"]["label_names"] == ["cluster0", "cluster2", "cluster3"]
    pictures = sorted(path.stem for path in (out / "clusters").glob("cluster*.png"))
    assert pictures == ["cluster0", "cluster2", "cluster3"]
    moved = [shutil.move(path, tmp_path / path.name) for path in merged]
    command("classifier", *common, "--attributes", ",".join(map(str, moved)))
    written = (out / "clusters" / "train.csv").read_text().splitlines()[1:]
    assert written == [line.removesuffix(",note") for line in before[0].splitlines()[1:]]  # numbers stay theirs
    rows = (tables / "train.csv").read_text().splitlines()
    (tables / "train.csv").write_text("\n".join(rows[:-1]))
    line = command("classifier", *common, "--attributes", f"{tables}/train.csv,{tables}/val.csv", code=1).output
    assert rows[-1].split(",")[0] in line.splitlines()[-1]


def test_without_balance_rare_attributes_are_rarely_found():
    (h, y), (hv, yv) = (channel(20000, 0.15, 0.01, seed) for seed in (0, 1))  # 8 % on
    net = classifier.fit(h, y, False, OPTIONS | {"balance": False}, 20, None, {})
    found = net(hv).sigmoid()
    assert not (found > 0.5).any() and found.mean().item() == pytest.approx(yv.mean().item(), abs=0.05)


def test_bad_input_is_one_line_and_loses_nothing(command, class_run, class_folder, attribute_folder, tmp_path):
    out = copy_run(class_run, tmp_path / "run")
    before = (out / "classifier.pt").read_bytes()
    common = ("--data", class_folder, "--outdir", out, "--smoke")
    for arguments, code, said in (
        (("--data", class_folder, "--outdir", tmp_path / "empty"), 1, "run encoder.py"),
        (("--data", attribute_folder, "--outdir", out), 1, "other images"),
        ((*common, "--size", "16"), 1, "made with size 32"),
        ((*common, "--attributes", "clusters:1"), 2, "clusters:K"),
        ((*common, "--attributes", "clusters:many"), 2, "clusters:auto"),
        ((*common, "--attributes", "clusters:99", "--no-resume"), 2, "training images"),
        ((*common, "--init", out / "encoder.pt", "--no-resume"), 1, "encoder.py"),
        ((*common, "--seed", "3"), 1, "made with seed 0"),
    ):
        line = command("classifier", *arguments, code=code).output.splitlines()[-1]
        assert line.startswith("Error: ") and said in line, line
    assert (out / "classifier.pt").read_bytes() == before

    # So are an encoder whose training was broken off, and first weights that are not there, whatever is done already.
    line = command("classifier", *common, "--init", tmp_path / "no.pt", code=1).output.splitlines()[-1]
    assert "made with init" in line or "no.pt does not exist" in line
    state = checkpoints.load(out / "encoder.pt", "encoder")
    checkpoints.save(out / "encoder.pt", {k: v for k, v in state.items() if k != "results"})
    assert "unfinished" in command("classifier", *common, code=1).output
    checkpoints.save(out / "encoder.pt", state)

    # A classifier of another encoder is refused, not used.
    state = checkpoints.load(out / "encoder.pt", "encoder")
    state["model"]["backbone.conv1.weight"] += 1
    checkpoints.save(out / "encoder.pt", state)
    line = command("classifier", *common, code=1).output.splitlines()[-1]
    assert "made with encoder" in line and "--no-resume" in line


def test_dry_run_prints_the_published_settings(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = json.loads(command("classifier", "--data", "celeba", "--attributes", "celeba5", "--dry-run").output)
    names = ("lr", "weight_decay", "batch", "epochs", "attributes", "balance", "protocol")
    assert [row[k] for k in names] == [3e-4, 1e-6, 256, 200, "celeba5", False, "paper"]
    assert json.loads(command("classifier", "--dry-run").output)["balance"]
    assert json.loads(command("classifier", "--dry-run", "--smoke").output)["epochs"] == 2
    assert "--init no.pt: no such file" in command("gan", "--unconditional", "--init", "no.pt", code=1).output
    assert list(tmp_path.iterdir()) == []
