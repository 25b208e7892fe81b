"""Internal attributes (section 2.2 of the paper): clusters of the encoder's embeddings in place of labels.

k-means on the L2-normalised embeddings of the training images; K is given, or chosen by the silhouette. `classifier.py
--attributes clusters:K|auto` calls this; the functions need nothing else of this project.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

KS = range(3, 16)  # that 'auto' chooses from: the numbers of clusters that the authors published for AFHQ
DIMENSIONS = 64  # of the principal components in which k-means runs: as good as all of them, and ten times as fast
SILHOUETTES = 5000  # images that the silhouette is measured on: it takes their pairs


def cluster(h: dict, spec: str, seed: int, folder: Path) -> dict[str, np.ndarray]:
    """Clusters of the embeddings: {split: int64 [N]}, numbered from 0, the largest first.

    h: {split: [N, features]} with a 'train', where the clusters are found; the other splits go to the nearest centre.
    spec: 'clusters:K', or 'clusters:auto', which takes the K of 3 to 15 with the highest mean silhouette (Rousseeuw
    1987) and draws it as k.png in `folder`. Raises click.UsageError for fewer images than twice the clusters,
    and for embeddings that are not finite or all but alike.
    """
    import click
    from sklearn.cluster import KMeans  # slow to import
    from sklearn.decomposition import PCA
    from sklearn.metrics import silhouette_score
    from sklearn.preprocessing import normalize

    n, value = len(h["train"]), spec.removeprefix("clusters:")
    least = KS[0] if value == "auto" else int(value)
    # Two images a cluster on average: the silhouette of a single one is 0 by definition.
    if n < 2 * least:
        raise click.UsageError(f"--attributes {spec}: there are only {n} training images")
    if not all(np.isfinite(v).all() for v in h.values()):
        raise click.UsageError(f"--attributes {spec}: the embeddings are no finite numbers: train the encoder again")
    # Unit length, so that distances compare directions, as the cosines of the contrastive loss do.
    x = {split: normalize(np.asarray(v, np.float64)) for split, v in h.items()}
    with np.errstate(invalid="ignore"):  # where all are alike
        # There are no more components than images or features.
        pca = PCA(min(DIMENSIONS, n, x["train"].shape[1]), random_state=seed).fit(x["train"])
    x = {split: pca.transform(v) for split, v in x.items()}
    # Rounded, because equal images may get embeddings that differ in their last digits.
    different = len(np.unique(x["train"].round(6), axis=0))
    if different < least:
        raise click.UsageError(
            f"--attributes {spec}: only {different} of {n} embeddings differ: train the encoder longer"
        )

    def fit(k: int) -> KMeans:
        # The best of four starts: a single one may end in a poor split.
        return KMeans(k, n_init=4, random_state=seed).fit(x["train"])

    folder.mkdir(parents=True, exist_ok=True)
    if value == "auto":
        found = {k: fit(k) for k in KS if k <= min(n // 2, different)}
        sample = dict(sample_size=min(SILHOUETTES, n), random_state=seed)
        silhouette = {k: silhouette_score(x["train"], model.labels_, **sample) for k, model in found.items()}
        best = max(silhouette, key=silhouette.get)
        model = found[best]
        plot(silhouette, best, folder / "k.png")
    else:
        model = fit(int(value))
        (folder / "k.png").unlink(missing_ok=True)  # of an earlier choice of K
    # argsort twice gives ranks: the largest cluster becomes number 0, whatever k-means called it.
    order = np.bincount(model.labels_, minlength=model.n_clusters).argsort()[::-1].argsort()
    return {split: order[model.predict(v)] for split, v in x.items()}


def plot(silhouette: dict[int, float], best: int, path: Path) -> None:
    """Draw the criterion over K."""
    # Not pyplot, which looks for a display and keeps every figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    axes.plot(list(silhouette), list(silhouette.values()), "o-")
    axes.axvline(best, ls=":")
    axes.set(xlabel="clusters K", ylabel="mean silhouette", title=f"clusters:auto chooses K = {best}")
    figure.savefig(path, dpi=100)


def write(
    found: dict[str, np.ndarray], h: np.ndarray, sets: dict, names: list[str], folder: Path, given: Sequence[Path] = ()
) -> None:
    """Write a table for each split, and for each cluster a picture of 64 of its training images, most typical first.

    `--attributes train.csv,val.csv` takes the tables back. h: embeddings [N, features] of the training images. sets:
    {split: Dataset}. names: of the clusters, 'cluster' and its number, which name their pictures. given: tables that
    the clusters come from, which stay as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("cluster*.png"):
        if re.fullmatch(r"cluster\d+\.png", old.name):
            old.unlink()  # of an earlier clustering, which may have had more clusters
    for split, v in found.items():
        if (folder / f"{split}.csv").resolve() in [path.resolve() for path in given]:
            continue
        # A name that is not UTF-8 is written with escapes.
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            table = csv.writer(file)
            table.writerow(["img", "cluster"])
            # Not i itself: clusters that came from a table keep their numbers there, which may have gaps.
            numbers = [names[i].removeprefix("cluster") for i in v]
            table.writerows(zip(sets[split].names, numbers, strict=True))
    # clip: an embedding of zeros has no direction, and must not become NaN.
    h = np.asarray(h) / np.linalg.norm(h, axis=1, keepdims=True).clip(1e-12)
    for c in np.unique(found["train"]):
        rows = np.flatnonzero(found["train"] == c)
        distance = np.linalg.norm(h[rows] - h[rows].mean(0), axis=1)
        # Evenly from the most to the least typical: the first 64 alone would look purer than the cluster is.
        rows = rows[distance.argsort()][np.linspace(0, len(rows) - 1, min(64, len(rows))).astype(int)]
        contact_sheet(sets["train"].images, rows).save(folder / f"{names[c]}.png")


def contact_sheet(images: np.ndarray, rows: np.ndarray) -> Image.Image:
    """Picture of the first 64 of images[rows] (uint8 [n, S, S, 3]), 8 in a row, white where there are fewer."""
    side = 8
    tiles = images[rows[: side * side]]
    tiles = np.concatenate([tiles, np.full((side * side - len(tiles), *tiles.shape[1:]), 255, np.uint8)])
    s = tiles.shape[1]
    return Image.fromarray(tiles.reshape(side, side, s, s, 3).swapaxes(1, 2).reshape(side * s, side * s, 3))


def agreement(clusters: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Purity, normalised mutual information and adjusted Rand index of two labelings [N], each at most 1."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    # Purity takes each cluster for its most frequent label, so it rises with the number of clusters.
    purity = contingency_matrix(labels, clusters).max(0).sum() / len(clusters)
    nmi, ari = normalized_mutual_info_score(labels, clusters), adjusted_rand_score(labels, clusters)
    return {"purity": float(purity), "nmi": float(nmi), "ari": float(ari)}


def agreements(clusters: np.ndarray, ds) -> dict[str, dict]:
    """`agreement` of the clusters of a Dataset's images with its labels and the hidden ones."""
    # Labels that no stage is trained on, such as the kinds of wild animals in critters.
    known = {name: value for name, (value, _) in ds.hidden.items()}
    labels = np.asarray(ds.labels)
    if ds.label_kind == "one-hot":
        known["label"] = labels.argmax(1)
    else:
        known |= dict(zip(ds.label_names, labels.T, strict=True))
    return {name: agreement(clusters, value) for name, value in known.items()}
