"""Stage 2: trains the attribute classifier on the frozen encoder's features.

    python classifier.py --data critters
    python classifier.py --data celeba --attributes celeba5
    python classifier.py --data critters --attributes clusters:auto
    python classifier.py --data afhq --attributes train_5.csv,val_5.csv

The classifier is one linear layer on h = E(x), fitted by cross-entropy (classes) or binary cross-entropy (attributes that
are on or off), weighted by rarity. That maximises the bound on I(Y;E) = H(Y) - H(Y|E), equations (2) and (3) of
the paper. y comes from the data set, or, with clusters:K, from clusters of the embeddings of the training images
themselves, or from tables of clusters. The results are `classifier.pt`, `classifier.json` and, for clusters, the pictures and the table in
`clusters/`.

`training.py` and `checkpoints.py` beside this file are all that the layer and its training need.
"""

import json
import math
import re
from collections.abc import Callable

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import training

# balance: without it the classifier hardly ever says a class of few per cent, and stage 3 learns from what it says.
PRESETS = {"": dict(epochs=200, batch=256, lr=3e-4, weight_decay=1e-6, balance=True)}  # all but balance as published
PAPER = {"": dict(balance=False)}
STEPS = 3000  # at least: 200 epochs of a small data set are too few steps to converge


# ---------------------------------------------------------------------------------------------------------------------
# Network.


class Classifier(nn.Linear):
    """logits = W h + b. forward(h [B, features]) -> [B, labels]: log-odds of classes (softmax) or attributes (sigmoid).

    balance [labels]: how much higher the logits are than log-odds since labels were balanced in training.
    """

    def __init__(self, features: int, labels: int):
        super().__init__(features, labels)
        # Not among the weights: a checkpoint has it as an entry of its own, which `build` reads.
        self.register_buffer("balance", torch.zeros(labels), persistent=False)


def build(checkpoint: dict) -> Classifier:
    """The frozen classifier in eval mode, from the content of `classifier.pt`.

    Raises ValueError or RuntimeError if that does not fit.
    """
    classifier = checkpoints.rebuild(lambda: Classifier(**checkpoint["config"]), checkpoint["model"])
    balance = torch.tensor(checkpoint["balance"], dtype=torch.float32)
    # One number alone would broadcast to all labels, and NaN would reach every bound in bits.
    if balance.shape != classifier.bias.shape or not balance.isfinite().all():
        raise ValueError("its classifier's balance is not one number for each label")
    classifier.balance = balance
    return classifier.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Training, on embeddings: h float32 [N, features], y float32 [N, labels] one-hot or multi-hot, both on the device.


def weights_of(y: torch.Tensor, one_hot: bool) -> torch.Tensor:
    """Weights [labels] that balance the labels: of a class's images, so that all classes count alike, or of an
    attribute's positives, so that both of its sides do. The logits are then higher by the weights' logarithms."""
    # Clamped: an attribute of no image would weigh infinity, one of all images 0, which has no logarithm.
    on = y.sum(0).clamp(1, max(1, len(y) - 1))
    # The classes' weights average to 1 over the images; an attribute's leave its off side at 1.
    return len(y) / on / y.shape[1] if one_hot else (len(y) - on) / on


def loss_of(logits: torch.Tensor, y: torch.Tensor, one_hot: bool, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Equation (3): cross-entropy [1], or the binary one of each attribute [Y], to be summed; in nats, mean over images."""
    if one_hot:
        return F.cross_entropy(logits, y, weight)[None]
    # One loss for each attribute, since each keeps the epoch that is best for it.
    return F.binary_cross_entropy_with_logits(logits, y, pos_weight=weight, reduction="none").mean(0)


def fit(
    h: torch.Tensor,
    y: torch.Tensor,
    one_hot: bool,
    options: dict,
    epochs: int,
    first: Classifier | None = None,
    state: dict | None = None,
    log: training.Log | None = None,
    save: Callable | None = None,
    stopping: Callable[[], int] = int,  # int() is 0: no signal
) -> Classifier:
    """Fit the layer by Adam; returns the Classifier.

    It is trained on standardised features, whatever their scale, and the standardisation is folded into W and b. A tenth
    of the images is held out to choose the epoch that is kept: the one with the least cross-entropy there, for each
    attribute its own. With options['balance'], labels are balanced by `weights_of`. `first` gives the first weights;
    `state` is what `save(classifier, state, must)` was given before; must: it may not fail, since a signal asked for
    the end. Raises training.Stopped, after a save, where `stopping()`
    gives the number of a signal.
    """
    state = state or {}
    n, batch = len(h), options["batch"]
    # On the CPU, so that every device holds out the same images.
    generator = torch.Generator().manual_seed(options["seed"])
    held, kept = torch.randperm(n, generator=generator).to(h.device).split([n // 10, n - n // 10])
    weight = weights_of(y, one_hot) if options["balance"] else None
    # Adam's steps are as large in all weights: without this, features of small scale would take many more epochs.
    # 1e-6: a feature may be 0 for all images, since a ReLU made it.
    mean, std = h.mean(0), h.std(0, correction=0) + 1e-6
    x = (h - mean) / std

    layer = Classifier(h.shape[1], y.shape[1]).to(h.device)
    if first is None:
        # The loss of a single layer is convex: no random start is needed to break a symmetry.
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    else:
        # The inverse of `folded`: the layer here sees standardised features, `first` sees h itself.
        layer.load_state_dict({"weight": first.weight * std, "bias": first.bias + first.weight @ mean})
    optimizer = torch.optim.Adam(layer.parameters(), options["lr"], weight_decay=options["weight_decay"], fused=True)
    best, least, done = layer.state_dict(), torch.tensor(math.inf, device=h.device), state.get("epochs", 0)
    if state:
        with checkpoints.reading("classifier.pt, or classifier.previous.pt,"):
            layer.load_state_dict(state["best"])  # checks it
            best = {k: v.to(h.device) for k, v in state["best"].items()}
            least = state["least"].to(h.device).view(1 if one_hot else y.shape[1])
            layer.load_state_dict(state["layer"])
            if not all(checkpoints.all_finite(v) for part in ("best", "layer") for v in state[part].values()):
                raise ValueError("its weights are no finite numbers")
            training.load_adam(optimizer, state["optimizer"], parameters=2)  # weight and bias
    # A state_dict shares memory with its layer: without a copy, every step would change the best that is kept.
    best = {k: v.clone() for k, v in best.items()}

    def folded() -> Classifier:
        final = Classifier(h.shape[1], y.shape[1]).to(h.device)
        # W (h - mean) / std + b = (W / std) h + (b - (W / std) mean): users of the layer give it plain h.
        w = best["weight"] / std
        final.load_state_dict({"weight": w, "bias": best["bias"] - w @ mean})
        return final.eval().requires_grad_(False)

    for epoch in range(done, epochs):
        # One pass in an order that depends on the epoch alone: a resumed run goes on exactly.
        order = torch.randperm(len(kept), generator=generator.manual_seed(options["seed"] + epoch + 1)).to(h.device)
        total = torch.zeros((), device=h.device)
        for rows in kept[order].split(batch):
            # A sum over attributes, not a mean: rows of W share nothing, so each attribute trains as it would alone.
            loss = loss_of(layer(x[rows]), y[rows], one_hot, weight).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)

        # Keep what is best on the images held out, label by label.
        with torch.no_grad():
            tested = held if len(held) else kept  # of fewer than ten images none is held out
            test = loss_of(layer(x[tested]), y[tested], one_hot, weight)
            for name, value in layer.state_dict().items():
                # One flag for all classes, whose softmax is one decision, or one for each attribute.
                better = (test < least).view(-1, *[1] * (value.ndim - 1))
                best[name] = torch.where(better, value, best[name])
            least = torch.minimum(test, least)
        signum = stopping()
        # About ten saves and ten lines of the log in a run.
        due = (epoch + 1) % max(1, epochs // 10) == 0 or epoch + 1 == epochs or signum
        if log:
            log.add(loss=total / len(kept), **({"held_out_loss": test.sum()} if len(held) else {}))
            log.step(n)
            if due and epoch + 1 < epochs:  # the last line has the results as well
                log.write((epoch + 1) * n)
        if save and due:
            extra = dict(layer=layer.state_dict(), optimizer=optimizer.state_dict(), best=best, least=least)
            save(folded(), extra | {"epochs": epoch + 1}, bool(signum))
        if signum:
            raise training.Stopped(signum, f"stopped and saved after {epoch + 1} epochs")
    return folded()


# ---------------------------------------------------------------------------------------------------------------------
# What it achieves.


def evaluate(logits: torch.Tensor, y: torch.Tensor, names: list[str], one_hot: bool, balance: torch.Tensor) -> dict:
    """All that is reported: one entry per label, their means, and the information in bits.

    Per label (a class against the rest; an attribute): `rate` of images that have it, `accuracy`, `majority` (accuracy
    of always giving the more frequent answer), `balanced` accuracy, `ap` average precision; all in [0, 1], NaN where the
    images do not show both sides of a label.
    """
    from sklearn.metrics import average_precision_score, balanced_accuracy_score  # slow to import

    # AP ranks images by each class's score, and logits of classes compare between images only after the softmax.
    scores = (logits.log_softmax(1) if one_hot else logits).numpy()
    truth = y.numpy().astype(int)
    # With the balance left in, a threshold of 0 is where both sides of an attribute weigh alike.
    guess = np.eye(len(names), dtype=int)[logits.argmax(1).numpy()] if one_hot else (logits > 0).int().numpy()
    labels = {}
    for i, name in enumerate(names):
        rate, right = truth[:, i].mean(), (guess[:, i] == truth[:, i]).mean()
        both = 0 < rate < 1
        ap = average_precision_score(truth[:, i], scores[:, i]) if both else math.nan
        balanced = balanced_accuracy_score(truth[:, i], guess[:, i]) if both else math.nan
        row = dict(rate=rate, accuracy=right, majority=max(rate, 1 - rate), balanced=balanced, ap=ap)
        labels[name] = {key: float(value) for key, value in row.items()}

    def mean(key: str) -> float:  # over the labels that have it
        values = [v[key] for v in labels.values() if not math.isnan(v[key])]
        return float(np.mean(values)) if values else math.nan

    overall = {key: mean(key) for key in ("accuracy", "majority", "balanced", "ap")}
    if one_hot:
        seen, told = truth.argmax(1), guess.argmax(1)
        # Classes without a validation image have no recall, and are left out of the mean.
        recalls = [(told == c)[seen == c].mean() for c in np.unique(seen)]
        overall |= dict(accuracy=float((seen == told).mean()), majority=float(truth.mean(0).max()))
        overall |= dict(balanced=float(np.mean(recalls)))
    h_y = training.entropy_bits(y)
    # H(Y|E) needs log-odds as they are in the data: balanced logits overstate rare labels, and the bound gets loose.
    mi = training.information_bits(logits - balance, y, "one-hot" if one_hot else "multi-label", h_y)
    return {"images": len(y), "overall": overall, "labels": labels, "bits": dict(h_y=h_y, h_y_given_e=h_y - mi, mi=mi)}


def report(results: dict, one_hot: bool, balance: bool) -> None:
    """Print `evaluate`'s results as a table."""
    print(f"On {results['images']:,} validation images, in %:")
    print(f"{'':24s}{'rate':>8s}{'accuracy':>10s}{'majority':>10s}{'balanced':>10s}{'avg. prec.':>12s}")
    last = ("all classes" if one_hot else "mean", {"rate": math.nan} | results["overall"])
    for name, v in [*results["labels"].items(), last]:
        columns = ("rate", "accuracy", "majority", "balanced", "ap")
        row = ["-" if math.isnan(v[key]) else f"{100 * v[key]:.2f}" for key in columns]
        print(f"{name:24s}{row[0]:>8s}{row[1]:>10s}{row[2]:>10s}{row[3]:>10s}{row[4]:>12s}")
    if one_hot:
        print("The row of a class is that class against the rest; 'balanced' of all classes is their mean recall.")
    if balance:
        print(
            "Labels were weighted by their rarity in training, so decisions are balanced, not the most accurate ones."
        )
    b = results["bits"]
    print(f"I(Y;E) >= H(Y) - H(Y|E) = {b['h_y']:.3f} - {b['h_y_given_e']:.3f} = {b['mi']:.3f} bits, equations (2), (3)")


# ---------------------------------------------------------------------------------------------------------------------
# The command.


# fmt: off
OPTIONS = [
    click.option("--attributes", metavar="SPEC", help="class; names separated by commas; celeba5, celeba10, celeba15; clusters:K (2 to 99) or clusters:auto (the best K of 3 to 15), found in the "
                 "encoder's embeddings; TRAIN.csv,VAL.csv or one table for both: clusters of images, with the header img,cluster.  [default: classes if there are any, else all attributes; celeba: celeba5]"),
    click.option("--epochs", metavar="N", type=click.IntRange(1, 10**6), help="Passes over the embeddings.  [default: 200, and at least 3,000 steps]"),
    click.option("--balance/--no-balance", default=None, help="Let all classes weigh the same, or the images with and without an attribute.  [default: balance; --protocol paper: no]"),
]
# fmt: on


@click.command(cls=training.OneLine, context_settings=dict(max_content_width=120, show_default=True))
@training.with_options(OPTIONS)
def main(**options):
    """Train the attribute classifier (stage 2); needs encoder.pt in the output folder.

    Writes classifier.pt, classifier.json, stats.jsonl and tensorboard/ to the output folder, and clusters/ for internal
    attributes. The same command again goes on where it stopped.
    """
    # Here, not at the top: the layer and its training need none of these files.
    import clusters
    import dataset
    import encoder as stage1
    import layouts

    # Resolve the options.
    given = options["epochs"]
    options = training.resolve(PRESETS, PAPER, layouts.preset_of(options["data"], options["preset"]), options)
    spec = options["attributes"]
    tables = (spec or "").endswith(".csv")
    internal = tables or (spec or "").startswith("clusters:")
    if internal and not tables and not re.fullmatch(r"clusters:(auto|[2-9]|[1-9]\d)", spec):
        raise click.UsageError(f"--attributes {spec}: give clusters:auto, or clusters:K with K from 2 to 99")
    if options["smoke"] and not given:
        options["epochs"] = 2
    if options["dry_run"]:
        print(json.dumps(options, indent=2))
        return

    # Open the encoder and the data.
    outdir = training.out_folder(options)
    run = training.start(options["device"], options["precision"], options["seed"], options["tf32"])
    if run.rank > 0:
        return  # seconds of work: for one process
    checkpoint = checkpoints.load(outdir / "encoder.pt", "encoder", finished=True)
    remedy = "run encoder.py with the same --data and --size first, or give another --outdir"
    if options["size"]:
        checkpoints.check_same(checkpoint["data"], options, ["size"], outdir / "encoder.pt", remedy)
    options["size"] = checkpoint["data"]["size"]
    # As the encoder saw them: squashed or cropped, and the same images for training.
    how = dataset.same_images(checkpoint["data"]) | {"preset": options["preset"]}
    ds = dataset.open_dataset(options["data"], options["size"], "train", None if internal else spec, **how)
    sets = {"train": ds, "val": ds.part("val")}
    checkpoints.check_images(checkpoint["data"], ds, outdir / "encoder.pt", remedy)
    options["attributes"] = spec if internal else ds.attributes
    path, options["encoder"] = outdir / "classifier.pt", checkpoints.fingerprint(checkpoint["model"])

    # Go on from a checkpoint if it is of the same encoder and labels.
    keys = ("encoder", "attributes", "balance", "batch", "seed", "smoke")
    state = checkpoints.resume(path, "classifier", options, ds, keys)
    training.make_folder(outdir)
    weights = checkpoints.load_init(options["init"], "classifier")["model"] if options["init"] else None

    # Embed every image once.
    # Nine tenths train, the last is held out. An --epochs that was given counts, however few steps it makes.
    steps = -(-len(ds) * 9 // 10 // options["batch"])
    least = 0 if given or options["smoke"] else math.ceil(STEPS / max(1, steps))
    epochs = options["epochs"] = int(max(options["epochs"], least))
    if state and tables:
        # A table may have changed since the checkpoint, under the same name.
        now, _ = layouts.read_clusters(spec, ds)
        with checkpoints.reading(path):
            same = all(np.array_equal(now[split], v.numpy()) for split, v in state["assignments"].items())
        if not same:
            raise click.ClickException(f"{path} was made from other clusters than {spec}: {checkpoints.RESUME_REMEDY}")
    if state.get("training", {}).get("epochs", 0) >= epochs and "results" in state:
        print(f"{path} is finished: {epochs} epochs. --epochs for more, --no-resume to start over.")
        return
    with checkpoints.reading(outdir / "encoder.pt"):
        encoder = stage1.build(checkpoint).to(run.device, memory_format=torch.channels_last)
    # The encoder is frozen and nothing is augmented, so one pass serves all epochs.
    h = {}
    for split, d in sets.items():
        # Embeddings do not depend on the batch, since norms are in eval mode; 256 only bounds the memory.
        batches = (images for images, _ in d.sequential(256, run.device, options["workers"]))
        h[split] = stage1.embed(encoder, batches, len(d), run)

    # Take the labels from the data, or from clusters of the embeddings.
    data = ds.info()
    labels = {split: torch.from_numpy(np.asarray(d.labels)).to(run.device) for split, d in sets.items()}
    results, assignments = {}, {}
    if internal:
        if state:
            with checkpoints.reading(path):
                # Another k-means could number the clusters otherwise than those that the classifier has learnt.
                found = {split: v.numpy() for split, v in state["assignments"].items()}
            names = state["data"]["label_names"]
        else:
            with training.lock(outdir, "classifier"):  # a run that reads there has these clusters
                if tables:
                    found, names = layouts.read_clusters(spec, ds)
                else:
                    found = clusters.cluster(h, spec, run.seed, outdir / "clusters")
                    names = [f"cluster{i}" for i in range(found["train"].max() + 1)]
                given = layouts.cluster_tables(spec) if tables else []
                clusters.write(found, h["train"], sets, names, outdir / "clusters", given)
        # How far clusters, found without labels, agree with the labels that there are.
        results["clusters"] = clusters.agreements(found["train"], ds)
        k = len(names)
        labels = {split: torch.eye(k)[torch.from_numpy(v).long()].to(run.device) for split, v in found.items()}
        assignments = {"assignments": {split: torch.from_numpy(v).long() for split, v in found.items()}}
        data |= dict(attributes=f"clusters:{k}", label_names=names, label_kind="one-hot")
    one_hot, names = data["label_kind"] == "one-hot", data["label_names"]
    config = dict(features=h["train"].shape[1], labels=len(names))
    # Weights w raise logits by log w (Bayes' rule): this is what to take off them for log-odds of the data.
    balance = weights_of(labels["train"], one_hot).log().cpu() if options["balance"] else torch.zeros(len(names))

    def save(classifier: Classifier, extra: dict, must: bool) -> None:
        content = dict(stage="classifier", config=config, model=classifier.state_dict(), data=data, options=options)
        nonlocal saved
        saved = content | dict(encoder_hash=options["encoder"], balance=balance.tolist(), training=extra) | assignments
        checkpoints.save(path, saved, must)  # the last save, with the results, must be

    # Train.
    first, saved = None, state  # a run that was stopped after its last epoch saves no more: it has its state
    if weights:
        first = Classifier(**config)
        checkpoints.init_weights(first, weights, options["init"])
        first.to(run.device).requires_grad_(False)
    h = {split: v.to(run.device) for split, v in h.items()}
    done = state.get("training", {}).get("epochs", 0)
    go_on = dict(first=first, state=state.get("training"), save=save, stopping=lambda: run.signal)
    with training.lock(outdir, "classifier"):
        with (
            training.signals(run),
            training.Log(outdir, "classifier", epochs * len(ds), done * len(ds)) as log,
        ):
            classifier = fit(h["train"], labels["train"], one_hot, options, epochs, log=log, **go_on)

            # Evaluate.
            results |= evaluate(classifier(h["val"]).cpu(), labels["val"].cpu(), names, one_hot, balance)
            log.write(epochs * len(ds), accuracy=results["overall"]["accuracy"], mi_bits=results["bits"]["mi"])
        checkpoints.save(path, saved | {"results": results})
        training.write_options(outdir / "classifier.json", options | {"results": results})
    report(results, one_hot, options["balance"])
    for name, v in results.get("clusters", {}).items():
        print(f"{len(names)} clusters against {name}: purity {v['purity']:.3f}  NMI {v['nmi']:.3f}  ARI {v['ari']:.3f}")
    print(f"Wrote {path}, {outdir / 'classifier.json'}" + (f" and {outdir / 'clusters'}/" if internal else ""))


if __name__ == "__main__":
    main()
