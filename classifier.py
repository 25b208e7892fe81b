"""Stage 2: trains the attribute classifier on the frozen encoder's features.

    python classifier.py --data critters
    python classifier.py --data celeba --attributes celeba5
    python classifier.py --data critters --attributes clusters:auto

The classifier is one linear layer on h = E(x), fitted by cross-entropy (classes) or binary cross-entropy (attributes that
are on or off, those weighted by rarity), which maximises the bound on I(Y;E) = H(Y) - H(Y|E), equations (2) and (3) of the
paper. y comes from the data set, or, with clusters:K, from clusters of the embeddings of the training images themselves.
The results are `classifier.pt`, `classifier.json` and, for clusters, the pictures and the table in `clusters/`.
"""

import csv
import json
import math
import re
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

PRESETS = {"": dict(epochs=200.0, batch=256, lr=3e-4, weight_decay=1e-6)}  # the published settings
STEPS = 3000  # at least so many, for data sets so small that 200 epochs are fewer
CLUSTERS = range(3, 16)  # that clusters:auto chooses from
STRENGTH = 0.73  # prediction strength that it asks for


# ---------------------------------------------------------------------------------------------------------------------
# Network.


class Classifier(nn.Linear):
    """logits = W h + b. forward(h [B, features]) -> [B, labels]: log-odds of classes (softmax), or of attributes (sigmoid)."""

    def __init__(self, features: int, labels: int):
        super().__init__(features, labels)


def build(checkpoint: dict) -> Classifier:
    """The frozen classifier in eval mode from the content of `classifier.pt`."""
    classifier = Classifier(**checkpoint["config"])
    classifier.load_state_dict(checkpoint["model"])
    return classifier.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Training, on embeddings: h float32 [N, features], y float32 [N, labels] one-hot or multi-hot, both on the device.


def pos_weight(y: torch.Tensor) -> torch.Tensor:
    """Weight [labels] of an attribute's positives that makes both of its sides count alike: negatives / positives."""
    on = y.sum(0).clamp(1, max(1, len(y) - 1))
    return (len(y) - on) / on


def loss_of(logits: torch.Tensor, y: torch.Tensor, one_hot: bool, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Equation (3): cross-entropy [1], or the binary one of each attribute [Y], to be summed; in nats, mean over images."""
    if one_hot:
        return F.cross_entropy(logits, y)[None]
    return F.binary_cross_entropy_with_logits(logits, y, pos_weight=weight, reduction="none").mean(0)


def fit(h, y, one_hot: bool, options: dict, epochs: int, first: Classifier | None, state: dict, log=None, save=None):
    """Fit the layer by Adam; returns the Classifier.

    It is trained on standardised features, whatever their scale, and the standardisation is folded into W and b. A tenth
    of the images is held out to choose the epoch that is kept: the one with the least cross-entropy there, for each
    attribute its own. Attributes (multi-label) are balanced by `pos_weight`. `first` gives the first weights; `state` is
    what `save` was given before.
    """
    n, batch = len(h), options["batch"]
    generator = torch.Generator().manual_seed(options["seed"])
    held, kept = torch.randperm(n, generator=generator).to(h.device).split([n // 10, n - n // 10])
    weight = None if one_hot else pos_weight(y)
    mean, std = h.mean(0), h.std(0, correction=0) + 1e-6
    x = (h - mean) / std

    layer = Classifier(h.shape[1], y.shape[1]).to(h.device)
    if first is None:
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    else:
        layer.load_state_dict({"weight": first.weight * std, "bias": first.bias + first.weight @ mean})
    optimizer = torch.optim.Adam(layer.parameters(), options["lr"], weight_decay=options["weight_decay"], fused=True)
    best, least, done = layer.state_dict(), torch.tensor(math.inf, device=h.device), state.get("epochs", 0)
    if state:
        layer.load_state_dict(state["layer"]), optimizer.load_state_dict(state["optimizer"])
        best, least = {k: v.to(h.device) for k, v in state["best"].items()}, state["least"].to(h.device)
    best = {k: v.clone() for k, v in best.items()}

    def folded() -> Classifier:
        final = Classifier(h.shape[1], y.shape[1]).to(h.device)
        w = best["weight"] / std
        final.load_state_dict({"weight": w, "bias": best["bias"] - w @ mean})
        return final.eval().requires_grad_(False)

    for epoch in range(done, epochs):
        order = torch.randperm(len(kept), generator=generator.manual_seed(options["seed"] + epoch + 1)).to(h.device)
        for rows in kept[order].split(batch):
            loss = loss_of(layer(x[rows]), y[rows], one_hot, weight).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            test = loss_of(layer(x[held]), y[held], one_hot, weight) if len(held) else loss[None]
            for name, value in layer.state_dict().items():
                better = (test < least).view(-1, *[1] * (value.ndim - 1))
                best[name] = torch.where(better, value, best[name])
            least = torch.minimum(test, least)
        if log:
            log.add(loss=loss, held_out_loss=test.sum())
            log.step(n)
        if save and ((epoch + 1) % max(1, epochs // 10) == 0 or epoch + 1 == epochs):
            training = dict(layer=layer.state_dict(), optimizer=optimizer.state_dict(), best=best, least=least)
            save(folded(), training | {"epochs": epoch + 1})
    return folded()


# ---------------------------------------------------------------------------------------------------------------------
# What it achieves.


def entropy_bits(y: torch.Tensor) -> float:
    """H(Y) in bits: the entropy of the rows of y [N, labels] as they occur together, not a sum over attributes."""
    counts = torch.unique(y, dim=0, return_counts=True)[1].double()
    return torch.special.entr(counts / len(y)).sum().item() / math.log(2)


def information_bits(logits: torch.Tensor, y: torch.Tensor, one_hot: bool) -> tuple[float, float, float]:
    """H(Y), H(Y|E) and the lower bound I(Y;E) >= H(Y) - H(Y|E), equation (2), in bits.

    H(Y|E) is bounded from above by the (unweighted) cross-entropy, or the sum of the attributes' binary ones, of logits
    [N, labels] that must mean probabilities: those of a balanced classifier have their `balance` taken off first.
    """
    given = loss_of(logits.double(), y.double(), one_hot).sum().item() / math.log(2)
    return entropy_bits(y), given, entropy_bits(y) - given


def average_precision(scores: torch.Tensor, y: torch.Tensor) -> float:
    """Sum over the thresholds of (recall gained) * precision; scores [N], y [N] 0 or 1; NaN without a positive."""
    scores, order = scores.sort(descending=True)
    hits = y[order].double().cumsum(0)
    last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool, device=y.device)])  # of equal scores
    hits, number = hits[last], torch.arange(1, len(y) + 1, device=y.device)[last]
    gained = hits.diff(prepend=hits.new_zeros(1))
    return (gained * hits / number).sum().item() / hits[-1].item() if hits[-1] > 0 else math.nan


def balanced_accuracy(guess: torch.Tensor, y: torch.Tensor) -> float:
    """Mean of the recalls of both sides; guess, y [N] 0 or 1; NaN if a side is empty."""
    on, off = y.sum(), (1 - y).sum()
    return ((guess * y).sum() / on / 2 + ((1 - guess) * (1 - y)).sum() / off / 2).item()


def evaluate(logits: torch.Tensor, y: torch.Tensor, names: list[str], one_hot: bool, balance: torch.Tensor) -> dict:
    """All that is reported: one entry per label, their means, and the information in bits.

    Per label (a class against the rest; an attribute): `rate` of images that have it, `accuracy`, `majority` (accuracy
    of always giving the more frequent answer), `balanced` accuracy, `ap` average precision; all in [0, 1].
    """
    if one_hot:
        guess = F.one_hot(logits.argmax(1), len(names)).to(y)
        overall = dict(accuracy=(guess * y).sum(1).mean().item(), majority=y.mean(0).max().item())
    else:
        guess = (logits > 0).to(y)
        overall = dict(accuracy=(guess == y).float().mean().item(),
                       majority=torch.maximum(y.mean(0), 1 - y.mean(0)).mean().item())  # fmt: skip
    scores = logits.log_softmax(1) if one_hot else logits
    labels = {}
    for i, name in enumerate(names):
        rate = y[:, i].mean().item()
        labels[name] = dict(rate=rate, accuracy=(guess[:, i] == y[:, i]).float().mean().item(), majority=max(rate, 1 - rate),
                            balanced=balanced_accuracy(guess[:, i], y[:, i]), ap=average_precision(scores[:, i], y[:, i]))  # fmt: skip
    recalls = [(guess[:, i] * y[:, i]).sum().item() / y[:, i].sum().item() for i in range(len(names)) if y[:, i].any()]

    def mean(key: str) -> float:  # of the labels that have it
        values = [v[key] for v in labels.values() if not math.isnan(v[key])]
        return float(np.mean(values)) if values else math.nan

    overall |= dict(balanced=float(np.mean(recalls)) if one_hot else mean("balanced"), ap=mean("ap"))
    bits = dict(zip(("h_y", "h_y_given_e", "mi"), information_bits(logits - balance, y, one_hot), strict=True))
    return {"images": len(y), "overall": overall, "labels": labels, "bits": bits}


def report(results: dict, one_hot: bool) -> None:
    """Print `evaluate`'s results as a table."""
    print(f"On {results['images']:,} validation images, in %:")
    print(f"{'':24s}{'rate':>8s}{'accuracy':>10s}{'majority':>10s}{'balanced':>10s}{'avg. prec.':>12s}")
    for name, v in [
        *results["labels"].items(),
        ("all classes" if one_hot else "mean", {"rate": math.nan} | results["overall"]),
    ]:
        row = [
            f"{100 * v[key]:.2f}" if v[key] == v[key] else "-"
            for key in ("rate", "accuracy", "majority", "balanced", "ap")
        ]
        print(f"{name:24s}{row[0]:>8s}{row[1]:>10s}{row[2]:>10s}{row[3]:>10s}{row[4]:>12s}")
    if one_hot:
        print("A class's row is that class against the rest; balanced is the mean recall.")
    else:
        print(
            "Imbalance: positives weighed by negatives / positives in training, so that 0.5 is the balanced decision."
        )
    b = results["bits"]
    print(f"I(Y;E) >= H(Y) - H(Y|E) = {b['h_y']:.3f} - {b['h_y_given_e']:.3f} = {b['mi']:.3f} bits, equations (2), (3)")


# ---------------------------------------------------------------------------------------------------------------------
# Internal attributes: clusters of the embeddings.


def kmeans(x: torch.Tensor, k: int, seed: int, restarts: int = 8, iterations: int = 100) -> tuple[torch.Tensor, float]:
    """k-means++ (Arthur and Vassilvitskii 2007) with restarts on x [N, F], on its device.

    Returns the centres [k, F] of the run with the least mean squared distance, and that distance.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    best, least = None, math.inf
    for _ in range(restarts):
        centres = x[torch.randint(len(x), (1,), generator=generator, device=x.device)]
        apart = (x - centres).square().sum(1)
        for _ in range(k - 1):
            new = x[torch.multinomial(apart.clamp(min=1e-12), 1, generator=generator)]
            centres, apart = torch.cat([centres, new]), torch.minimum(apart, (x - new).square().sum(1))
        old = None
        for _ in range(iterations):
            nearest, distance = assign(x, centres)
            if old is not None and torch.equal(nearest, old):
                break
            old, count = nearest, torch.bincount(nearest, minlength=k)
            centres = torch.zeros_like(centres).index_add_(0, nearest, x) / count.clamp(min=1)[:, None]
            empty = (count == 0).nonzero()[:, 0]
            if len(empty):  # starts again from the images that are worst off
                centres[empty] = x[distance.topk(len(empty)).indices]
        distance = distance.mean().item()
        if distance < least:
            best, least = centres, distance
    return best, least


def assign(x: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index [N] of the nearest centre and the squared distance [N] to it."""
    distance, nearest = (centres.square().sum(1) - 2 * x @ centres.T).min(1)
    return nearest, (distance + x.square().sum(1)).clamp(min=0)


def contingency(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Counts [values of a, values of b], float64, of two labelings [N]."""
    a, b = (torch.unique(v, return_inverse=True)[1] for v in (a, b))
    rows, columns = int(a.max()) + 1, int(b.max()) + 1
    return torch.bincount(a * columns + b, minlength=rows * columns).view(rows, columns).double()


def agreement(clusters: torch.Tensor, labels: torch.Tensor) -> dict:
    """Purity, normalised mutual information (by the mean of the entropies) and adjusted Rand index of integers [N]."""
    table = contingency(clusters, labels)
    n = table.sum()
    a, b = table.sum(1), table.sum(0)
    ha, hb, hab = (torch.special.entr(v / n).sum() for v in (a, b, table))
    nmi = (ha + hb - hab) / ((ha + hb) / 2) if ha + hb > 0 else torch.tensor(1.0)
    pairs, pa, pb = ((v * (v - 1) / 2).sum() for v in (table, a, b))
    expected = pa * pb / (n * (n - 1) / 2)
    ari = (pairs - expected) / ((pa + pb) / 2 - expected) if (pa + pb) / 2 != expected else torch.tensor(1.0)
    return {"purity": (table.max(1).values.sum() / n).item(), "nmi": nmi.item(), "ari": ari.item()}


def partitions(x: torch.Tensor, least: int, most: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusterings of x [N, F] into least..most clusters by k-means++ and merging, on its device.

    k-means++ makes `cells`, at most 120 or `most`. Then, two at a time, the clusters A and B merge that have the most
    links for their size, w(A, B) / sqrt(w(A) w(B)), where links join images that are among each other's 20 nearest. So
    the gaps between clusters count, while plain k-means also cuts what varies without one, like brightness. In the end
    what holds less than a thirtieth of the images merges first. Fitted on four fifths of x, at most 10,000.

    Returns the cells' centres [cells, F] and, a row for each number of clusters, the cells' cluster [most - least + 1,
    cells], clusters being numbered from 0 by size.
    """
    part = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: min(10_000, len(x) * 4 // 5)]
    x = x[part.to(x.device)]
    n, k = len(x), min(20, len(x) // 5 + 1)
    near = torch.cat([(block @ x.T).topk(k + 1).indices[:, 1:] for block in x.split(1000)])  # on the sphere: by cosine
    a, b = torch.arange(n, device=x.device).repeat_interleave(k), near.flatten()
    mutual = torch.isin(b * n + a, a * n + b)
    cells = max(most, min(120, n // 10))
    centres = kmeans(x, cells, seed, restarts=1, iterations=25)[0]
    cell = assign(x, centres)[0]
    links = torch.full((cells, cells), 1e-6, device=x.device)  # not 0, so that what is not linked can merge at last
    links = links.index_put_(
        (cell[a[mutual]], cell[b[mutual]]), torch.tensor(1.0, device=x.device), accumulate=True
    ).cpu()
    size = torch.bincount(cell, minlength=cells).cpu()
    owner, rows = torch.arange(cells), []
    while len(links) >= least:
        total = torch.zeros(len(links)).index_add_(0, owner, size.float())
        if len(links) <= most:
            rows.append(total.argsort(descending=True).argsort()[owner])
        weight = links.sum(1)
        closeness = (links / (weight[:, None] * weight).sqrt()).fill_diagonal_(-1)
        if len(links) <= 2 * most and total.min() < n / 30:  # too small to learn from: merges first
            closeness[total > total.min()] = -1
        i, j = sorted(divmod(closeness.argmax().item(), len(links)))
        keep = torch.arange(len(links)) != j
        links[i] += links[j]
        links[:, i] += links[:, j]
        links = links[keep][:, keep]
        owner = torch.where(owner == j, i, owner) - (owner > j).long()
    return centres, torch.stack(rows[::-1])


def prediction_strength(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the cluster of a [N] that b [N] keeps worst, the share of its pairs that are together in b too, in [0, 1].

    Tibshirani & Walther 2005; a and b number the clusters of the same images.
    """
    table = contingency(a, b)
    size, pairs = table.sum(1), (table * (table - 1)).sum(1)
    return (pairs / (size * (size - 1)).clamp(min=1)).min().item()


def choose_clusters(
    x: torch.Tensor, least: int, most: int, seed: int, path: Path | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of five `partitions` of different parts of x, the one that agrees best with the others: centres, cells' cluster.

    The number of clusters K, from least to most, is the largest at which the mean `prediction_strength` between the
    five is at least STRENGTH, or else the one where it is greatest. Draws that of all K at `path`.
    """
    from tqdm import tqdm

    runs = [
        partitions(x, least, most, seed + i) for i in tqdm(range(5), desc="clusters", unit="run", dynamic_ncols=True)
    ]
    every = [assign(x, centres)[0].cpu() for centres, _ in runs]
    scores = []  # [K, run]: mean strength with which the other runs predict it
    for row in range(most - least + 1):
        labels = [clusters[row][cell] for (_, clusters), cell in zip(runs, every, strict=True)]
        scores.append([np.mean([prediction_strength(a, b) for b in labels if b is not a]) for a in labels])
    strength = np.mean(scores, axis=1)
    row = int(max(np.flatnonzero(strength >= STRENGTH), default=strength.argmax()))
    if path:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4))
        axes = figure.subplots()
        axes.plot(range(least, most + 1), strength, "o-")
        axes.axvline(least + row, ls=":")
        axes.axhline(STRENGTH, ls=":")
        axes.set(
            xlabel="clusters K",
            ylabel="prediction strength",
            title=f"clusters:auto chooses K = {least + row}",
        )
        figure.savefig(path, dpi=100)
    centres, clusters = runs[int(np.argmax(scores[row]))]
    return centres, clusters[row].to(x.device)


def contact_sheet(images: np.ndarray, rows: np.ndarray, side: int = 8) -> Image.Image:
    """Picture of images[rows] (uint8 [n, S, S, 3]), side x side of them, white where there are fewer."""
    tiles = images[rows[: side * side]]
    tiles = np.concatenate([tiles, np.full((side * side - len(tiles), *tiles.shape[1:]), 255, np.uint8)])
    s = tiles.shape[1]
    return Image.fromarray(tiles.reshape(side, side, s, s, 3).swapaxes(1, 2).reshape(side * s, side * s, 3))


def cluster(h: dict, sets: dict, spec: str, seed: int, folder: Path, device) -> dict:
    """Internal attributes: clusters of the L2-normalised embeddings of the training images.

    h: {'train': [N, F], 'val': [M, F]}.  sets: the Datasets.  spec: 'clusters:K' or 'clusters:auto'.
    Writes assignments.csv, a picture of each cluster and, for auto, the criterion's plot to `folder`. Returns the
    assignments {split: int64 [N]}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("cluster*.png"):
        old.unlink()
    x = {split: F.normalize(v.to(device), dim=1) for split, v in h.items()}
    value, n = spec.removeprefix("clusters:"), len(x["train"])
    if value == "auto":
        least, most, plot = CLUSTERS[0], max(CLUSTERS[0], min(CLUSTERS[-1], n // 2)), folder / "k.png"
    else:
        least, most, plot = int(value), int(value), None
    if n < 2 * least:
        raise click.UsageError(f"--attributes {spec}: there are only {n} training images")
    centres, clusters = choose_clusters(x["train"], least, most, seed, plot)
    found = {split: clusters[assign(points, centres)[0]] for split, points in x.items()}
    means = torch.stack([x["train"][found["train"] == c].mean(0) for c in range(int(clusters.max()) + 1)])
    distance = (x["train"] - means[found["train"]]).square().sum(1).cpu()
    found = {split: v.cpu() for split, v in found.items()}
    with open(folder / "assignments.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["index", "split", "cluster"])
        table.writerows((i, split, c) for split, v in found.items() for i, c in enumerate(v.tolist()))
    clusters = found["train"]
    for c in range(len(means)):  # from the most to the least typical
        rows = (clusters == c).nonzero()[:, 0]
        rows = rows[distance[rows].argsort()]
        rows = rows[np.linspace(0, len(rows) - 1, min(64, len(rows))).astype(int)]
        contact_sheet(sets["train"].images, rows.numpy()).save(folder / f"cluster{c:02d}.png")
    return found


def agreements(clusters: torch.Tensor, ds) -> dict:
    """`agreement` of the clusters of a Dataset's images with each of their labels that is known."""
    known = {name: torch.from_numpy(np.asarray(value)) for name, (value, _) in ds.hidden.items()}
    labels = torch.from_numpy(np.asarray(ds.labels))
    known |= (
        {"label": labels.argmax(1)} if ds.label_kind == "one-hot" else dict(zip(ds.label_names, labels.T, strict=True))
    )
    return {name: agreement(clusters, v) for name, v in known.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The command.


# fmt: off
OPTIONS = [
    click.option("--attributes", metavar="SPEC", help="class; names separated by commas; celeba5, celeba10, celeba15; clusters:K or clusters:auto (K from 3 to 15), found in the "
                 "encoder's embeddings.  [default: classes if there are any, else all attributes; celeba: celeba5]"),
    click.option("--epochs", metavar="N", type=click.IntRange(1), help="Passes over the embeddings.  [default: 200, and at least 3,000 steps]"),
]
# fmt: on


def run_stage(options: dict) -> None:
    """Run stage 2 with the command's options."""
    import encoder as encoder_stage
    import training
    from dataset import open_dataset

    # Resolve the options.
    given = options["epochs"]
    options = training.by_data(PRESETS, options["data"], options | dict(lr=None, weight_decay=None))
    spec = options["attributes"]
    internal = (spec or "").startswith("clusters:")
    if internal and not re.fullmatch(r"clusters:(auto|[2-9]|[1-9]\d)", spec):
        raise click.UsageError(f"--attributes {spec}: give clusters:auto, or clusters:K with K from 2 to 99")
    if options["dry_run"]:
        print(json.dumps(options, indent=2))
        return

    # Open the encoder and the data.
    outdir = training.out_folder(options)
    checkpoint = training.load(outdir / "encoder.pt", "encoder", finished=True)
    remedy = "run encoder.py with the same --data and --size first, or give another --outdir"
    if options["size"]:
        training.check_same(checkpoint["data"], options, ["size"], outdir / "encoder.pt", remedy)
    options["size"] = checkpoint["data"]["size"]
    run = training.start(options["device"], options["precision"], options["seed"])
    if run.rank > 0:
        return  # seconds of work: for one process
    ds = open_dataset(options["data"], options["size"], "train", None if internal else spec)
    sets = {"train": ds, "val": ds.part("val")}
    if checkpoint["data"]["fingerprint"] != ds.fingerprint:
        raise click.ClickException(
            f"{outdir / 'encoder.pt'} was trained on other images ({checkpoint['data']['data']}) than {ds.data}: {remedy}"
        )
    options["attributes"] = spec if internal else ds.attributes
    path, encoder_hash = outdir / "classifier.pt", training.fingerprint(checkpoint["model"])

    # Go on from a checkpoint if it is of the same encoder and labels.
    state = training.load(path, "classifier") if options["resume"] and path.exists() else {}
    if state:
        remedy = "give --no-resume to start over, or another --outdir"
        theirs, ours = state["options"] | {"encoder": state["encoder_hash"]}, options | {"encoder": encoder_hash}
        keys = ["encoder", "attributes", "batch", "seed", "smoke"] + ["init"] * bool(options["init"])
        training.check_same(theirs, ours, keys, path, remedy)
    weights = training.load(options["init"], "classifier")["model"] if options["init"] else None

    # Embed every image once.
    steps = -(-len(ds) * 9 // 10 // options["batch"])
    epochs = max(options["epochs"], 0 if given else math.ceil(STEPS / max(1, steps)))
    epochs = 2 if options["smoke"] else int(epochs)
    if state.get("training", {}).get("epochs", 0) >= epochs and "results" in state:
        print(f"{path} is finished: {epochs} epochs. --epochs for more, --no-resume to start over.")
        return
    encoder = encoder_stage.build(checkpoint).to(run.device, memory_format=torch.channels_last)
    h = {
        split: encoder_stage.embed(encoder, d, run.device, run.autocast(), workers=options["workers"])
        for split, d in sets.items()
    }

    # The labels: of the data, or clusters.
    data = ds.info()
    labels = {split: torch.from_numpy(np.asarray(d.labels)).to(run.device) for split, d in sets.items()}
    results, assignments = {}, {}
    if internal:
        if state:
            found = {split: v.long() for split, v in state["assignments"].items()}
        else:
            found = cluster(h, sets, spec, run.seed, outdir / "clusters", run.device)
        results["clusters"] = agreements(found["train"], ds)
        k = int(found["train"].max()) + 1
        labels = {split: F.one_hot(v, k).float().to(run.device) for split, v in found.items()}
        assignments = {"assignments": {split: v.to(torch.uint8) for split, v in found.items()}}
        data |= dict(attributes=f"clusters:{k}", label_names=[f"cluster{i}" for i in range(k)], label_kind="one-hot")
    one_hot, names = data["label_kind"] == "one-hot", data["label_names"]
    config = dict(features=h["train"].shape[1], labels=len(names))
    balance = torch.zeros(len(names)) if one_hot else pos_weight(labels["train"]).log().cpu()

    def save(classifier: Classifier, extra: dict, **more) -> None:
        content = dict(
            stage="classifier", config=config, model=classifier.state_dict(), data=data, encoder_hash=encoder_hash
        )
        content |= dict(balance=balance.tolist(), options=options, training=extra) | assignments | more
        nonlocal saved
        saved = content
        training.save(path, content)

    # Train.
    first, saved = None, state  # state: of a run that was stopped after its last epoch
    if weights:
        first = Classifier(**config)
        training.init_weights(first, weights, options["init"])
        first.to(run.device).requires_grad_(False)
    log = training.Log(outdir, "classifier", epochs * len(ds), state.get("training", {}).get("epochs", 0) * len(ds))
    h = {split: v.to(run.device) for split, v in h.items()}
    classifier = fit(h["train"], labels["train"], one_hot, options, epochs, first, state.get("training", {}), log, save)

    # Evaluate.
    results |= evaluate(classifier(h["val"]).cpu(), labels["val"].cpu(), names, one_hot, balance)
    log.write(epochs * len(ds), accuracy=results["overall"]["accuracy"], mi_bits=results["bits"]["mi"])
    log.close()
    training.save(path, saved | {"results": results})
    training.write_options(outdir / "classifier.json", options | {"results": results})
    report(results, one_hot)
    for name, v in results.get("clusters", {}).items():
        print(f"{len(names)} clusters against {name}: purity {v['purity']:.3f}  NMI {v['nmi']:.3f}  ARI {v['ari']:.3f}")
    print(f"Wrote {path}, {outdir / 'classifier.json'}" + (f" and {outdir / 'clusters'}/" if internal else ""))


def command() -> click.Command:
    """The command line; built on demand, so that the network above needs no other file of the project."""
    import training

    @click.command(context_settings=dict(max_content_width=120, show_default=True))
    @training.with_options(OPTIONS)
    def main(**options):
        """Train the attribute classifier (stage 2); needs encoder.pt in the output folder.

        Writes classifier.pt, classifier.json, stats.jsonl and tensorboard/ to the output folder, and clusters/ for
        internal attributes. The same command again goes on where it stopped.
        """
        run_stage(options)

    return main


if __name__ == "__main__":
    command()()
