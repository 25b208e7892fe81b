"""metrics.py against the usual ways: pytorch-fid and scikit-learn."""

import tempfile
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision
from PIL import Image

import metrics

from .timing import row, take_turns


def divergence(p: torch.Tensor, y: torch.Tensor, block: int = 1024) -> torch.Tensor:
    """KL(P || Q) in nats of points y [N, dims] for affinities p [N, N], float64: what t-SNE minimises."""
    v, y, cross, total = y.shape[1] - 1, y.double(), 0.0, 0.0
    for a in range(0, len(y), block):
        # Differences, not a matrix product, which would lose the distances of close pairs.
        log_w = torch.log1p((y[a : a + block, None] - y).square().sum(2) / v) * (-(v + 1) / 2)
        other = torch.arange(a, a + len(log_w))[:, None] != torch.arange(len(y))
        part = p[a : a + block].double() * other
        cross = cross + (torch.special.xlogy(part, part) - part * log_w).sum()
        total = total + (log_w.exp() * other).sum()
    return cross + torch.log(total)


def frechet_row(quick: bool) -> dict:
    """The distance of two Gaussians from their means and covariances."""
    from pytorch_fid.fid_score import calculate_frechet_distance

    # 2048: the width of Inception's features.
    draw, d = np.random.default_rng(0), 512 if quick else 2048
    # Turned: else both covariances would be nearly diagonal.
    turn = np.linalg.qr(draw.standard_normal((d, d)))[0]
    scale = np.sqrt(np.exp(-np.arange(d) / (d / 10)) + 1e-4)  # a spectrum that falls off, as that of real features
    # 2 d rows: more than d, so the covariances have full rank.
    x, y = draw.standard_normal((2 * d, d)) * scale @ turn, draw.standard_normal((2 * d, d)) * scale
    stats = [f(v) for v in (x, y) for f in (lambda v: v.mean(0), lambda v: np.cov(v, rowvar=False))]
    found = {}
    sides = {
        "ours": lambda: found.update(ours=metrics.frechet_distance(*stats)),
        "theirs": lambda: found.update(theirs=calculate_frechet_distance(*stats)),
    }
    # A call takes seconds, so that a warm-up would change little.
    times = take_turns(sides, warm=0)
    note = f"the two differ by {abs(found['ours'] - found['theirs']) / found['theirs']:.0e}"
    return row(f"Frechet step, {d} features", times["ours"], times["theirs"], "pytorch-fid", note=note)


def features_row(quick: bool) -> dict:
    """Files to features, each library with its own way of loading."""
    import pytorch_fid.inception
    from pytorch_fid.fid_score import get_activations

    torch.manual_seed(0)
    # 1008 classes: FID's Inception. init_weights: drawing them takes long, and speed does not depend on them.
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    n, world = 32 if quick else 96, metrics.World(torch.device("cpu"), batch=50)  # 50: pytorch-fid's default
    with tempfile.TemporaryDirectory() as folder:
        draw = np.random.default_rng(0)
        for i in range(n):
            Image.fromarray(draw.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(f"{folder}/{i:03d}.png")
        torch.save(net.state_dict(), f"{folder}/weights.pth")
        ours = metrics.InceptionFeatures(f"{folder}/weights.pth", "torch", world.device)
        # Else it would download the weights.
        with mock.patch.object(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: net.state_dict()):
            theirs = pytorch_fid.inception.InceptionV3([3]).eval()
        files = sorted(Path(folder).glob("*.png"))
        sides = {
            "ours": lambda: metrics.measure(metrics.Folder(folder, ours.prepare), ours, world, "ours"),
            "theirs": lambda: get_activations(files, theirs, 50, 2048, "cpu", torch.get_num_threads()),
        }
        times = take_turns(sides, turns=1 if quick else 3, warm=0)
    result = row("Inception features, CPU", times["ours"], times["theirs"], "pytorch-fid")
    return result | {"note": f"{n / result['ours']:.1f} against {n / result['theirs']:.1f} images/s"}


def tsne_rows(quick: bool) -> list[dict]:
    """scikit-learn with its default method (Barnes-Hut) against the exact one, then growth with n."""
    from sklearn.manifold import TSNE

    draw, rows = np.random.default_rng(0), []
    sizes = (500, 1000) if quick else (1500, 3000, 6000)
    # Like features: 8 causes behind 512 numbers that are not negative, and noise.
    points = np.maximum(draw.normal(size=(sizes[-1], 8)) @ draw.normal(size=(8, 512)), 0)
    points = (points + 0.3 * draw.normal(size=points.shape)).astype(np.float32)
    metrics.tsne(torch.from_numpy(points[:100]), iterations=1)  # compiles the ops, where that has not been done
    # The start and the learning rate of `metrics.tsne` too.
    theirs = TSNE(3, init="pca", learning_rate="auto", random_state=0)
    for n in sizes:
        x, found = torch.from_numpy(points[:n]), {}
        sides = {"ours": lambda x=x, found=found: found.update(ours=metrics.tsne(x))}
        # At one size only: this is the slow side.
        if n == (sizes[0] if quick else 3000):
            sides["theirs"] = lambda x=x, found=found: found.update(
                theirs=torch.from_numpy(theirs.fit_transform(x.numpy()))
            )
        times = take_turns(sides, warm=0)
        p = metrics.affinities(x, 30.0)  # 30: the perplexity of both sides
        note = " against ".join(f"{divergence(p, y):.4f}" for y in found.values())
        rows.append(
            row(f"3-D t-SNE of {n} points", times["ours"], times.get("theirs"), "scikit-learn", note="KL " + note)
        )
    return rows


def metric_rows(quick: bool) -> list[dict]:
    """A row for each comparison."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytorch-fid uses what SciPy deprecates
        return [frechet_row(quick), features_row(quick), *tsne_rows(quick)]
