"""clusters.py: known clumps are found, K too; agreement in closed form; the table and the pictures."""

import csv

import click
import numpy as np
import pytest
from PIL import Image

import clusters


class Pictures:
    """As much of a Dataset as `write` and `agreements` use."""

    def __init__(self, labels, kind="one-hot"):
        self.images = np.zeros((len(labels), 32, 32, 3), np.uint8)
        self.labels, self.label_kind = labels, kind
        self.label_names = [f"label{i}" for i in range(labels.shape[1])]
        self.hidden = {"kind": (np.arange(len(labels)) % 2, ["even", "odd"])}
        self.names = [f"a/{i}.png" for i in range(len(labels))]


def clumps(k: int, n: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """n points in k well separated clumps of different sizes on the sphere, and their clump."""
    draw = np.random.default_rng(0)
    which = np.sort(draw.permutation(np.arange(n) % (k + 2) % k))
    x = draw.normal(size=(k, 16))[which] + 0.3 * draw.normal(size=(n, 16))
    return x, which


def test_embeddings_that_have_no_clusters(tmp_path):
    x, _ = clumps(4)
    for spec in ("clusters:auto", "clusters:3"):
        for wrong, words in ((np.full_like(x, np.nan), "no finite numbers"), (np.ones_like(x), "only 1 of 600")):
            with pytest.raises(click.UsageError, match=words):
                clusters.cluster({"train": wrong}, spec, 0, tmp_path)
    found = clusters.cluster({"train": x[[0, 200, 400, 599] * 10]}, "clusters:auto", 0, tmp_path)
    assert found["train"].max() < 4  # no more clusters than different embeddings


@pytest.mark.parametrize("k", [4, 6])
def test_clumps_and_their_number_are_found(tmp_path, k):
    x, which = clumps(k)
    found = clusters.cluster({"train": x, "val": x[:50]}, "clusters:auto", 0, tmp_path)
    assert clusters.agreement(found["train"], which) == pytest.approx({"purity": 1, "nmi": 1, "ari": 1})
    assert np.array_equal(found["val"], found["train"][:50]) and Image.open(tmp_path / "k.png").size[0] > 300
    sizes = np.bincount(found["train"])
    assert len(sizes) == k and (np.diff(sizes) <= 0).all()  # the largest comes first
    for wanted in (2, k + 2):
        assert clusters.cluster({"train": x}, f"clusters:{wanted}", 0, tmp_path)["train"].max() == wanted - 1
        assert not (tmp_path / "k.png").exists()


def test_the_seed_decides(tmp_path):
    noise = {"train": np.random.default_rng(0).normal(size=(500, 6))}
    one, same, other = (clusters.cluster(noise, "clusters:8", seed, tmp_path)["train"] for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_too_few_images(tmp_path):
    for spec, n in (("clusters:4", 7), ("clusters:auto", 5)):
        with pytest.raises(click.UsageError, match=f"only {n} training images"):
            clusters.cluster({"train": np.eye(n)}, spec, 0, tmp_path)


def test_agreement_in_closed_form():
    a = np.repeat(np.arange(4), 25)
    assert clusters.agreement(a, a // 2) == pytest.approx({"purity": 1, "nmi": 2 / 3, "ari": 0.4923}, abs=1e-3)
    assert clusters.agreement(a // 2, a)["purity"] == 0.5
    unrelated = np.tile(np.arange(5), 20)
    assert clusters.agreement(a, unrelated) == pytest.approx({"purity": 0.2, "nmi": 0, "ari": 0}, abs=0.05)
    attributes = clusters.agreements(a, Pictures(np.stack([a < 2, a % 2], 1).astype(float), "multi-label"))
    assert set(attributes) == {"label0", "label1", "kind"} and attributes["label0"]["purity"] == 1
    assert set(clusters.agreements(a, Pictures(np.eye(4)[a]))) == {"label", "kind"}


def test_table_and_pictures(tmp_path):
    (tmp_path / "cluster9.png").touch()  # of an earlier clustering
    (tmp_path / "clusters_of_mine.png").touch()
    found = {"train": np.array([0, 0, 1, 1, 0]), "val": np.array([1])}
    ds = Pictures(np.eye(5))
    ds.images[3] = 99
    h = np.array([[1, 0], [1, 0.1], [0, 1], [0.5, 1], [1, 0.05]])
    clusters.write(found, h, {"train": ds, "val": Pictures(np.eye(1))}, ["cluster0", "cluster1"], tmp_path)
    for split, value in found.items():
        rows = list(csv.DictReader((tmp_path / f"{split}.csv").read_text().splitlines()))
        assert [int(r["cluster"]) for r in rows] == value.tolist() and rows[0]["img"] == "a/0.png"
    own = ["cluster0.png", "cluster1.png", "clusters_of_mine.png"]
    assert sorted(p.name for p in tmp_path.glob("cluster*.png")) == own
    sheet = np.asarray(Image.open(tmp_path / "cluster1.png"))
    assert sheet.shape == (256, 256, 3) and 99 in sheet[:32, :64] and (sheet[:32, 64:] == 255).all()
