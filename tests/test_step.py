"""The training step against the plain baseline of bench.py: with the same numbers, the same losses and updates."""

import copy
import importlib
import json

import bench
import pytest
import torch
from click.testing import CliRunner

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


@pytest.mark.parametrize("convolutions", ["usual", "winograd"])
@pytest.mark.parametrize(("disc", "loss"), [("global", "lsgan"), ("patch", "hinge"), ("global", "ns")])
def test_same_losses_and_updates_as_the_plain_step(float64, disc, loss, convolutions, monkeypatch):
    """Losses and gradients to 1e-9 in float64, and the weights after one Adam step of each update: as float64 runs, and
    with the convolutions of float32."""
    ours, plain = (bench.build(side, 32, 8, disc, "resnet18", loss) for side in ("ours", "plain"))
    if convolutions == "winograd":
        monkeypatch.setattr(conv2d, "_FAST", (torch.float64,))
        with torch.no_grad():  # else cut-out images give zeros before the leaky ReLUs, and roundings choose their sides
            for p in ours.D.parameters():
                p.add_(0.01 * torch.randn_like(p))
        plain.D = bench.plain_discriminator(ours.D)
        plain.opt_d = torch.optim.Adam(plain.D.parameters(), lr=1e-4, betas=(0.5, 0.99))
    real, y = torch.rand(8, 3, 32, 32) * 2 - 1, torch.eye(3)[torch.arange(8) % 3]
    for update in ("regularise", "discriminate", "penalise", "generate"):
        arguments = (real, y) if update in ("discriminate", "penalise") else ()
        orthogonality = ours.decoder.orthogonality().item()
        losses = bench.both_losses((ours, plain), update, arguments)
        if update == "penalise":
            losses[0] *= ours.options["r1"]
        if update == "generate":
            losses[0] += 100 * orthogonality
        assert losses[0] == pytest.approx(losses[1], rel=1e-9), update
        if update in ("regularise", "generate"):
            found, wanted = bench.PlainDecoder(32, 3), plain.decoder
            found.take(of_gradients(ours.decoder))
        else:
            found, wanted = bench.plain_discriminator(of_gradients(ours.D)), plain.D
        gradients = [torch.zeros_like(q) if q.grad is None else q.grad for q in wanted.parameters()]
        scale = max(g.abs().max().item() for g in gradients)
        for p, g in zip(found.parameters(), gradients, strict=True):
            torch.testing.assert_close(p, g, rtol=1e-9, atol=1e-9 * scale)
    check = bench.PlainDecoder(32, 3)
    check.take(ours.decoder)
    for p, q in zip(check.parameters(), plain.decoder.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    for p, q in zip(bench.plain_discriminator(ours.D).parameters(), plain.D.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_the_benchmark_prints_and_saves_every_kind_of_row(tmp_path, monkeypatch):
    rows = [
        dict(what="alone", note="3 s"),
        dict(what="a ratio", ratio=2.5),
        dict(what="both", ratio=1, spread=[0.5, 2]),
    ]
    monkeypatch.setattr(bench, "collect", lambda only, quick: rows)
    result = CliRunner().invoke(bench.main, ["--out", str(tmp_path / "b.json")])
    alone, ratio, both, _ = result.output.splitlines()
    assert alone.endswith("3 s") and ratio.endswith("2.50x") and both.endswith("1.00x [0.50, 2.00]")
    assert json.loads((tmp_path / "b.json").read_text())["rows"] == rows
