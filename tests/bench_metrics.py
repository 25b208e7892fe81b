"""Times metrics.py against the usual ways, in turns in the same process: the ratios hold on any machine.

python tests/bench_metrics.py [--quick]
"""

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import metrics


def seconds(repeats: int, *ways: Callable[[], object]) -> list[float]:
    """Median time of each way, taken in turns."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for way, kept in zip(ways, times, strict=True):
            began = time.perf_counter()
            way()
            kept.append(time.perf_counter() - began)
    return [float(np.median(kept)) for kept in times]


def frechet_row(quick: bool) -> dict:
    from pytorch_fid.fid_score import calculate_frechet_distance

    draw, d = np.random.default_rng(0), 512 if quick else 2048
    turn = np.linalg.qr(draw.standard_normal((d, d)))[0]
    scale = np.sqrt(np.exp(-np.arange(d) / (d / 10)) + 1e-4)
    x, y = draw.standard_normal((2 * d, d)) * scale @ turn, draw.standard_normal((2 * d, d)) * scale
    stats = [f(v) for v in (x, y) for f in (lambda v: v.mean(0), lambda v: np.cov(v, rowvar=False))]
    found = []
    ours, theirs = seconds(1, lambda: found.append(metrics.frechet_distance(*stats)),
                           lambda: found.append(calculate_frechet_distance(*stats)))  # fmt: skip
    note = f"the two differ by {abs(found[0] - found[1]) / found[1]:.0e}"
    return {
        "what": f"Frechet step, {d} features",
        "ours_s": ours,
        "theirs": "pytorch-fid",
        "theirs_s": theirs,
        "note": note,
    }


def features_row(quick: bool) -> dict:
    """Files to features, each library with its own way of loading."""
    import pytorch_fid.inception
    from pytorch_fid.fid_score import get_activations

    torch.manual_seed(0)
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    n, world = 32 if quick else 96, metrics.World(torch.device("cpu"), batch=50)
    with tempfile.TemporaryDirectory() as folder:
        draw = np.random.default_rng(0)
        for i in range(n):
            Image.fromarray(draw.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(f"{folder}/{i:03d}.png")
        torch.save(net.state_dict(), f"{folder}/weights.pth")
        ours = metrics.InceptionFeatures(f"{folder}/weights.pth", "torch", world.device)
        with mock.patch.object(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: net.state_dict()):
            theirs = pytorch_fid.inception.InceptionV3([3]).eval()
        files = sorted(Path(folder).glob("*.png"))
        t = seconds(1 if quick else 3, lambda: metrics.measure(metrics.Folder(folder), ours, world, "ours"),
                    lambda: get_activations(files, theirs, 50, 2048, "cpu", torch.get_num_threads()))  # fmt: skip
    note = f"{n / t[0]:.1f} against {n / t[1]:.1f} images/s"
    return {"what": "Inception features, CPU", "ours_s": t[0], "theirs": "pytorch-fid", "theirs_s": t[1], "note": note}


def tsne_rows(quick: bool) -> list[dict]:
    """scikit-learn with its default method (Barnes-Hut) against the exact one, then growth with n."""
    from sklearn.manifold import TSNE

    draw, rows = np.random.default_rng(0), []
    sizes = (500, 1000) if quick else (1500, 3000, 6000)
    points = np.maximum(draw.normal(size=(sizes[-1], 8)) @ draw.normal(size=(8, 512)), 0)
    points = (points + 0.3 * draw.normal(size=points.shape)).astype(np.float32)
    metrics.tsne(torch.from_numpy(points[:100]), iterations=1)  # compiles
    theirs = TSNE(3, init="pca", learning_rate="auto", random_state=0)

    def timed(way: Callable[[], object]) -> tuple[object, float]:
        began = time.perf_counter()
        return way(), time.perf_counter() - began

    for n in sizes:
        x = torch.from_numpy(points[:n])
        y, took = timed(partial(metrics.tsne, x))
        row = {"what": f"3-D t-SNE of {n} points", "ours_s": took}
        row["note"] = f"KL {metrics.tsne_divergence(metrics.affinities(x, 30.0), y):.4f}"
        if n == (sizes[0] if quick else 3000):
            y, took = timed(partial(theirs.fit_transform, x.numpy()))
            divergence = metrics.tsne_divergence(metrics.affinities(x, 30.0), torch.from_numpy(y))
            row |= {"theirs": "scikit-learn", "theirs_s": took, "note": f"{row['note']} against {divergence:.4f}"}
        rows.append(row)
    return rows


def metric_rows(quick: bool) -> list[dict]:
    """One dict a comparison: what, ours_s, theirs (name), theirs_s, ratio (theirs / ours), note."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytorch-fid uses what SciPy deprecates
        rows = [frechet_row(quick), features_row(quick), *tsne_rows(quick)]
    return [row | ({"ratio": row["theirs_s"] / row["ours_s"]} if "theirs_s" in row else {}) for row in rows]


if __name__ == "__main__":
    for row in metric_rows("--quick" in sys.argv):
        against = f"{row['theirs']} {row['theirs_s']:8.2f} s, {row['ratio']:6.1f} x" if "ratio" in row else ""
        print(f"{row['what']:28s}{row['ours_s']:8.2f} s  {against:40s}{row['note']}")
