"""The training step against the plain baseline: with the same numbers, the same losses and updates."""

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.baseline import PlainDecoder, both_losses, build, plain_discriminator, take_discriminator

ROOT = Path(__file__).resolve().parent.parent
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


@pytest.mark.parametrize("convolutions", ["usual", "winograd"])
@pytest.mark.parametrize(("disc", "loss"), [("global", "lsgan"), ("patch", "hinge"), ("global", "ns")])
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


def test_the_benchmark_prints_what_it_saves(tmp_path):
    """One group of it as users run it; a side compared with itself is as fast as itself."""
    command = [sys.executable, "-m", "bench", "--quick", "--only", "data", "--out", str(tmp_path / "b.json")]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert len(rows) == 3 and len(printed) == 4
    for row, line in zip(rows, printed, strict=False):
        assert row["images_per_second"] == pytest.approx(1 / row["ours"])
        assert line.startswith(row["what"]) and f"{row['ratio']:.2f}x" in line and line.endswith(row["note"])
    assert rows[0]["ratio"] == 1 and rows[0]["spread"] == [1, 1] and rows[0]["against"] == "ImageFolder"
