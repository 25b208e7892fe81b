"""explore.py: what its pictures show, and the command."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import copy_run
from PIL import Image

import explore
import gan


@pytest.fixture(scope="module")
def network(command, class_folder, class_run, tmp_path_factory):
    """The gan.pt of a run of a few iterations."""
    folder = copy_run(class_run, tmp_path_factory.mktemp("explore") / "run")
    command("gan", "--data", class_folder, "--outdir", folder, "--smoke", "--kimg", 0.032)
    return folder / "gan.pt"


def test_samples_and_traversals(command, network):
    folder = network.parent
    command("explore", "sample", "--network", network)
    command("explore", "traverse", "--network", network, "--steps", 3, "--y", "low")
    whole = np.asarray(Image.open(folder / "sample.png"))
    assert np.asarray(Image.open(folder / "traverse.png")).shape[0] > 18 * 64  # 3 layers of 6 dimensions
    for change in (["--y", "low"], ["--seeds", "9-12"], ["--truncation", "0.2"], ["--tile", "32"]):
        command("explore", "sample", "--network", network, "--out", folder / "other.png", *change)
        other = np.asarray(Image.open(folder / "other.png"))
        assert other.shape != whole.shape or not np.array_equal(other, whole), change
    strip = (folder / "traverse.png").read_bytes()
    command("explore", "traverse", "--network", network, "--steps", 3, "--y", "high")
    assert (folder / "traverse.png").read_bytes() != strip


def test_bad_options_are_one_line(command, network):
    sample = ("explore", "sample", "--network", network)
    assert "--y x" in command(*sample, "--y", "x", code=2).output
    for seeds in ("a", "-1", "5-3", str(2**32), "0-99999999"):
        assert "--seeds" in command(*sample, "--seeds", seeds, code=2).output
    assert "--device tpu" in command(*sample, "--device", "tpu", code=1).output
    assert "nothing.pt" in command("explore", "sample", "--network", "nothing.pt", code=1).output
    for wrong in (["--tile", 2000], ["--truncation", "nan"], ["--truncation", "inf"]):
        assert wrong[0] in command(*sample, *wrong, code=2).output
    many = ["--seeds", "0-999", "--tile", 1024]
    assert "pixels: ask for less" in command(*sample, *many, code=2).output


def test_embedding(command, class_run, attribute_run, attribute_folder, tmp_path):
    for run in (class_run, attribute_run):
        out = tmp_path / f"{run.name}.png"
        line = command("explore", "embedding", "--network", run / "encoder.pt", "--out", out, code=1).output
        assert "validation images are too few" in line  # 7 and 6 of them
    moved = ("--network", class_run / "encoder.pt", "--data", attribute_folder)
    assert "made from other images" in command("explore", "embedding", *moved, code=1).output


def test_scatter_of_names_that_are_no_formulas(tmp_path):
    points = np.random.default_rng(0).normal(size=(30, 2))
    figures = []
    for names in (["$0_to_$10", "$10_to_^$"], ["off", "on"]):
        figure = explore.scatter(points, [("label", np.arange(30) % 2, names)], "points")
        figure.savefig(tmp_path / "x.png")
        figures.append((tmp_path / "x.png").read_bytes())
    assert figures[0] != figures[1]


def test_names_beyond_ascii_are_drawn():
    pictures = [np.asarray(explore.gallery(torch.zeros(1, 3, 8, 8), 1, 64, [n], [""])) for n in ("größe", "gräße")]
    assert not np.array_equal(*pictures)


def test_classes_with_commas():
    network = SimpleNamespace(label_names=["dog", "tench, Tinca"], label_kind="one-hot")
    assert explore.parse_y(network, [])[0].tolist() == [[1, 0], [0, 1]]
    assert explore.parse_y(network, ["tench, Tinca"])[0].tolist() == [[0, 1]]


def test_traversal_moves_one_dimension_and_is_sorted():
    decoder = gan.Decoder(32, 0)
    decoder.generator.blocks[1].subspace.L.data[3] = -20.0
    network = gan.Network(decoder.eval(), None, None, {}, [], "none", None, 32, 0, {}, None)
    order = explore.importance(network)
    assert order[0] == (20.0, 2, 4) and [t[0] for t in order] == sorted((t[0] for t in order), reverse=True)
    latent = network.latents([3])
    strip = explore.traverse(
        network, None, latent, 2, 4, torch.tensor([-4.5, latent[0, gan.NOISE + 6 + 3].item(), 4.5])
    )
    torch.testing.assert_close(strip[1:2], network.decode(None, latent), rtol=0, atol=1e-5)
    assert (strip[0] - strip[2]).abs().max() > 1e-3
