"""Evaluation beyond FID: attribute control, diversity within one y, bounds on information.

trained.py calls this for `metrics.py --network`. y and labels are float32 [N, Y], one-hot or multi-hot; kind is
'one-hot' or 'multi-label'. `run` is a trained.TrainedRun: it generates, embeds and classifies. Functions without
it need tensors and networks alone.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoints
import training
from ops import Conv2d

# ---------------------------------------------------------------------------------------------------------------------
# Attribute control accuracy.


def questions(kind: str, real: Tensor, each: int, seed: int, published: bool = False) -> tuple[Tensor, Tensor]:
    """What to ask a generator for: y [N, Y], and for each image the label that it is asked for [N].

    one-hot: `each` images of every class. multi-label: `each` (even) for every attribute, half with it and half
    without, the other attributes as they occur together in the rows of `real`. published: all with it, the other
    attributes fair coins.
    """
    # Each purpose has a stream of its own: 2 here, 3 for the judge, 8 for diversity, 9 for information, 1 for y.
    asked, draw = torch.arange(real.shape[1]).repeat_interleave(each), np.random.default_rng([seed, 2])
    if kind == "one-hot":
        return torch.eye(real.shape[1])[asked], asked
    if published:
        y = torch.from_numpy(draw.integers(0, 2, (len(asked), real.shape[1]))).float()
    else:
        # What never occurs together was never learned, so it would be no fair question.
        y = real[torch.from_numpy(draw.integers(0, len(real), len(asked)))].clone()
    on = torch.arange(len(y)) % each < (each if published else each // 2)
    y[torch.arange(len(y)), asked] = on.float()
    return y, asked


def control_accuracy(
    logits: Tensor, y: Tensor, asked: Tensor, kind: str, names: Sequence[str], balance: Tensor | float = 0.0,
    published: bool = False,
) -> dict:  # fmt: skip
    """The part of the images in which a classifier finds what was asked for, in [0, 1].

    one-hot: the largest logit is that of the class. multi-label: the sigmoid is above 0.5 exactly if y has the
    attribute; beside it the number with the attribute on, off, and by the published rule: on only, and the probability
    above 0.2. Logits less `balance` [Y] mean probabilities at the real rates. published: `accuracy` is by this rule.
    `accuracy` is the mean over labels, `exact` counts images that are right in all attributes at once.
    """
    rows = torch.arange(len(y))
    on, score = y[rows, asked] > 0.5, logits[rows, asked]
    # 0.2 as published, of probabilities without balance: a balanced classifier that knows nothing says 0.5.
    found_on = (logits - balance).sigmoid()[rows, asked] > 0.2
    # Otherwise balanced logits stay as they are, since on and off are asked for equally often.
    right = logits.argmax(1) == asked if kind == "one-hot" else found_on == on if published else (score > 0) == on
    labels = {}
    for i, name in enumerate(names):
        its = asked == i
        found = {"accuracy": right[its]}
        if kind == "multi-label":
            found |= {"on": right[its & on], "off": right[its & ~on], "published": found_on[its & on]}
        # Under the published rule nobody asks for off, so there is no such number.
        labels[name] = {key: value.float().mean().item() for key, value in found.items() if len(value)}
    over = {key: float(np.mean([v[key] for v in labels.values()])) for key in ("accuracy", "published") if key in found}
    exact = {} if kind == "one-hot" else {"exact": ((logits > 0) == (y > 0.5)).all(1).float().mean().item()}
    return over | exact | {"labels": labels}


# ---------------------------------------------------------------------------------------------------------------------
# The independent judge: the run's own encoder and classifier are what the generator was trained to please.


# 2,000 images: the standard error of a plain accuracy is then 1.1 % at most.
TESTED = 2000  # of the images held out, at most, the judge is tested on
JUDGE = 3  # count it up with every change of the judge or its training: judges are kept on disk


class Judge(nn.Module):
    """A convolutional classifier that is trained on real images alone: the generator never sees it.

    Its 512 features, standardised over the real images, take Inception's place where that cannot be had. labels: number
    of its logits.
    """

    # Small, since every data set needs a judge of its own, also on CPUs.
    WIDTHS = (32, 32, 64, 64, 128, 128, 128)  # channels of its convolutions
    DIMS = 4 * WIDTHS[-1]  # features: the last map, pooled to 2x2

    def __init__(self, labels: int):
        super().__init__()
        layers: list[nn.Module] = []
        # Strides: 32 px become 16, 8 and 4. No bias, since batch norm takes it out again.
        for i, o, stride in zip((3, *self.WIDTHS), self.WIDTHS, (1, 2, 1, 2, 1, 2, 1), strict=False):
            layers += [Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        # Dropout against overfitting: a set may have a thousand images.
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(self.DIMS, labels)
        # Of the features of real images, set after training; as buffers they are saved with the weights.
        self.register_buffer("mean", torch.zeros(self.DIMS))
        self.register_buffer("std", torch.ones(self.DIMS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, S, S, 3] -> features [B, 512], logits [B, Y]; images larger than 32 px are reduced to that."""
        x = training.to_float(images.to(self.mean.device))
        # So that a judge costs the same at every size.
        x = F.interpolate(x, (32, 32), mode="bilinear", antialias=True) if x.shape[2] > 32 else x
        h = self.trunk(x.contiguous(memory_format=torch.channels_last))
        return (h - self.mean) / self.std, self.head(self.drop(h))

    def look(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> logits [B, Y]."""
        return self(images)[1]


# Labels that belong together: 'one-hot' or 'multi-label', names, float32 [N, names].
Group = tuple[str, list[str], Tensor]


def known_labels(run, split: str) -> list[Group]:
    """All labels of a split's real images, the run's own first (where they are known), then those that it left out.

    A single class is no label: nothing can be learned from it.
    """
    alone = len(run.names) == 1 and run.kind == "one-hot"
    data, y = run.images[split], run.labels(split) if run.names and not alone else None
    groups = [] if y is None else [(run.kind, list(run.names), y)]
    classes, attributes = run.all_labels
    # Columns may be classes as well (layouts.from_columns): `seen` keeps them from counting twice.
    for spec in ["class"] * (len(classes) > 1) + [",".join(attributes)] * bool(attributes):
        part = data.part(split, spec)
        seen = {name for _, names, _ in groups for name in names}
        new = [i for i, name in enumerate(part.label_names) if name not in seen]
        # Classes as a whole or not at all: without some of them, rows would have no 1.
        if new and (part.label_kind == "multi-label" or len(new) == len(part.label_names)):
            y = torch.from_numpy(np.array(part.labels))[:, new]
            groups.append((part.label_kind, [part.label_names[i] for i in new], y))
    # critters' kinds: no stage sees them, but the judge may.
    for value, names in data.hidden.values():
        groups.append(("one-hot", list(names), torch.eye(len(names))[torch.from_numpy(np.array(value)).long()]))
    return groups


def loss_of(logits: Tensor, y: Tensor, groups: Sequence[tuple[str, int]]) -> Tensor:
    """Sum over the groups of labels (kind, width) of their cross-entropy, or the mean of their binary ones."""
    loss = logits.new_zeros(())
    widths = [width for _, width in groups]
    for (kind, _), ours, theirs in zip(groups, logits.split(widths, 1), y.split(widths, 1), strict=True):
        # Both are means: a sum over many attributes would outweigh the classes.
        loss += (F.cross_entropy if kind == "one-hot" else F.binary_cross_entropy_with_logits)(ours, theirs)
    return loss


def hold_out(draw: np.random.Generator, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a tenth of the images, which the judge is tested on, and of the others, which it learns from."""
    # A tenth, as layouts.complete_splits holds out.
    held, kept = np.split(draw.permutation(images), [max(1, images // 10)])
    return held, kept


def train_judge(
    images, groups: Sequence[Group], seed: int, device: torch.device, steps: int, mirror: bool = True
) -> tuple[Judge, list[float]]:
    """Train a Judge on nine tenths of the real images; returns it with its `balanced_accuracy` on at most
    TESTED images of the last tenth.

    images: uint8 [N, S, S, 3], array or memory-map. steps: of 64 images, AdamW with one cycle of the learning rate.
    Images are shifted by up to an eighth, vary in brightness and contrast. mirror: flip half of the batches; False is
    for labels that depend on left and right.
    """
    draw = np.random.default_rng([seed, 3])
    labels, widths = torch.cat([y for _, _, y in groups], 1), [(kind, y.shape[1]) for kind, _, y in groups]
    held, kept = hold_out(draw, len(labels))
    # Sorted, here and below: mapped images are best read in the order of the file.
    held = np.sort(held[:TESTED])
    # The caller's random numbers stay as they are, whether a judge is trained or found on disk.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        judge = Judge(labels.shape[1]).to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
        # One cycle (Smith and Topin 2018): short trainings take a high rate, here up to 3e-3, that falls to almost 0.
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in tqdm(range(steps), desc="independent judge", unit="step", leave=False, dynamic_ncols=True):
            rows = np.sort(draw.choice(kept, min(64, len(kept)), replace=False))
            x = images[rows][:, :, ::-1] if mirror and draw.random() < 0.5 else images[rows]
            # An eighth of the side, as the discriminator's translation in stage 3.
            most = x.shape[1] // 8
            down, right = draw.integers(0, 2 * most + 1, 2)
            # The border is repeated: generated images have no black bars.
            x = np.pad(x, ((0, 0), (most, most), (most, most), (0, 0)), "edge")
            x = x[:, down : down + images.shape[1], right : right + images.shape[2]].astype(np.float32)
            # A tenth of the 255 levels and a fifth of the contrast, so that labels are not read off the exposure.
            light, contrast = draw.uniform(-25, 25, (len(x), 1, 1, 1)), draw.uniform(0.8, 1.2, (len(x), 1, 1, 1))
            x = torch.from_numpy(((x - 128) * contrast + 128 + light).clip(0, 255).astype(np.uint8))
            loss = loss_of(judge.look(x), labels[rows].to(device), widths)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    judge.eval().requires_grad_(False)
    _, logits = judged(judge, images, held)
    accuracies, parts = [], [width for _, width in widths]
    for (kind, _), ours, y in zip(widths, logits.split(parts, 1), labels[held].split(parts, 1), strict=True):
        accuracies.append(balanced_accuracy(ours, y, kind))
    # 2,000 images tell a standard deviation to within 2 %.
    rows = np.sort(draw.permutation(len(labels))[:2000])
    h, _ = judged(judge, images, rows)
    std = h.std(0, correction=0)
    judge.mean.copy_(h.mean(0))
    # 1e-6, in case no feature varies at all.
    judge.std.copy_(std.clamp(min=0.1 * std.mean() + 1e-6))  # a feature that hardly varies must not outweigh the others
    return judge, accuracies


def balanced_accuracy(logits: Tensor, y: Tensor, kind: str) -> float:
    """Part of the labels y [N, Y] that logits [N, Y] have right, all labels alike, and on and off alike: as
    `control_accuracy` asks for them. Labels that never occur do not count."""
    # By class, and by on and off: else always giving the most frequent answer would look good.
    if kind == "one-hot":
        right = logits.argmax(1) == y.argmax(1)
        parts = [right[on > 0.5] for on in y.T]
    else:
        right = (logits > 0) == (y > 0.5)
        parts = [r[on == value] for r, on in zip(right.T, (y > 0.5).T, strict=True) for value in (True, False)]
    return float(np.mean([part.float().mean().item() for part in parts if len(part)]))


def judged(judge: Judge, images, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """The judge's features and logits of the images of these rows, on the CPU."""
    # At most 256 at once, whatever the set: -(-a // b) rounds up.
    parts = [judge(torch.from_numpy(images[part])) for part in np.array_split(rows, -(-len(rows) // 256))]
    return tuple(torch.cat([part[i].cpu() for part in parts]) for i in range(2))


def load_judge(run, seed: int, steps: int) -> tuple[Judge, list[Group], list[float]] | None:
    """The independent judge of a run's data, the groups of labels that it knows and its accuracy on each.

    None if there are no labels.
    """
    if (seed, steps) not in run.judges:  # features and control accuracy ask for the same one
        groups = known_labels(run, "train")
        if not groups:
            return None
        judge, right = kept_judge(run, groups, seed, steps)
        run.judges[seed, steps] = judge, groups, right
    return run.judges[seed, steps]


def kept_judge(run, groups: Sequence[Group], seed: int, steps: int, mirror: bool = True) -> tuple[Judge, list[float]]:
    """What `train_judge` makes of a run's training images: trained once, and kept beside the packed images."""
    # The labels as well as their names: clusters of the same names may hold other images.
    labels = torch.cat([y for _, _, y in groups], 1)
    facts = [run.train.fingerprint, run.train.size, seed, steps, mirror, JUDGE]
    text = json.dumps([[kind, names] for kind, names, _ in groups] + facts)
    key = hashlib.sha256(text.encode() + labels.numpy().tobytes()).hexdigest()
    # 16 digits for the name; the file holds the whole key, which is compared.
    path, state = run.train.pack / f"judge-{key[:16]}.pt", {}

    def prepare() -> None:
        with contextlib.suppress(Exception):  # damaged files raise nearly anything
            state.update(torch.load(path, map_location="cpu", weights_only=True))
        if state.get("key") != key:
            judge, right = train_judge(run.train.images, groups, seed, run.world.device, steps, mirror)
            state.update(key=key, model={k: v.cpu() for k, v in judge.state_dict().items()}, right=right)
            with contextlib.suppress(OSError, RuntimeError), checkpoints.atomic(path) as temporary:
                torch.save(state, temporary)  # it only saves time, so a full or read-only cache is no error

    # All take the first process's: trained twice, a judge differs in the last digits.
    run.world.first(prepare)
    state = run.world.gather(state)[0]
    judge = Judge(labels.shape[1])
    judge.load_state_dict(state["model"])
    return judge.to(run.world.device).eval().requires_grad_(False), state["right"]


def measure_accuracy(run, n: int, seed: int, steps: int) -> dict:
    """Attribute control accuracy of n generated images by the run's classifier and by an independent judge."""
    published, balance = run.protocol == "paper", run.net.balance
    # Even, so that half of an attribute's images can have it; at least one with it and one without.
    y, asked = questions(run.kind, run.real, max(2, n // len(run.names) // 2 * 2), seed, published)
    results, judge = {"accuracy_n": len(y)}, None
    if not published or run.kind == "one-hot":  # asking for an attribute only, always finding it is right
        results["accuracy_chance"] = 1 / len(run.names) if run.kind == "one-hot" else 0.5
    if run.labels("train") is not None:  # the first group that the judge knows is then this run's y
        judge, groups, right = load_judge(run, seed, steps)
        # Drawn again as in train_judge, only to say of how many images its accuracy is.
        held, _ = hold_out(np.random.default_rng([seed, 3]), len(groups[0][2]))
        results |= {"judge_real": right[0], "judge_real_n": len(held[:TESTED])}

    def logits(images: Tensor) -> Tensor:
        """[B, 1 or 2, Y]: by the run's classifier and by the judge. The images are generated once for both."""
        own = run.features.classifier(run.features.embed(images))
        return torch.stack([own, judge.look(images)[:, : len(run.names)]] if judge else [own], 1)

    own, *others = run.look(run.generated(len(y), seed, y), logits).unbind(1)
    found = control_accuracy(own, y, asked, run.kind, run.names, balance, published)
    results |= {f"accuracy_{key}".removesuffix("_accuracy"): value for key, value in found.items()}
    for scores in others:
        # No balance, which is the classifier's, and the plain rule under any protocol.
        found = control_accuracy(scores, y, asked, run.kind, run.names)
        results |= {"accuracy_judge": found["accuracy"], "accuracy_judge_labels": found["labels"]}
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Diversity within one y.


def groups_of_one_y(labels: Tensor, each: int, most: int = 10) -> list[Tensor]:
    """Indices of up to `each` images for each of the `most` most frequent rows of labels that occur more than once."""
    _, inverse, counts = torch.unique(labels, dim=0, return_inverse=True, return_counts=True)
    # stable: equally frequent y come in the same order on every device.
    often = counts.argsort(descending=True, stable=True)[:most]
    return [(inverse == i).nonzero()[:each, 0] for i in often if counts[i] > 1]


def spread(h: Tensor) -> float:
    """Mean distance between two different rows of h [N, D], N at least 2."""
    # N (N - 1) distances: the matrix has every pair twice, and zeros in its diagonal.
    return (torch.cdist(h.double(), h.double()).sum() / (len(h) * (len(h) - 1))).item()


def measure_diversity(run, labels: Tensor, each: int, seed: int, notes: list[str]) -> dict:
    """Mean distance of encoder features within one y, of generated and real images, over the ten most frequent y's."""
    order = torch.from_numpy(np.random.default_rng([seed, 8]).permutation(len(labels)))  # neighbours may be alike
    groups = [order[rows] for rows in groups_of_one_y(labels[order], each)]
    if not groups:
        notes.append("no diversity: no two training images have the same y")
        return {}
    # Real images of the same y beside them, since how far apart images of one y are depends on y.
    y, sizes = torch.cat([labels[g] for g in groups]), [len(g) for g in groups]
    sources = run.generated(len(y), seed, y), run.real_images("train", torch.cat(groups).numpy())
    fake, real = (np.mean([spread(h) for h in run.embed(source).split(sizes)]) for source in sources)
    return {"diversity": float(fake), "diversity_real": float(real), "diversity_n": len(y)}


# ---------------------------------------------------------------------------------------------------------------------
# Information.


def measure_information(run, n: int, seed: int) -> dict:
    """The chain of bounds on mutual information in bits: eqs. (1) and (6)-(7) from the logs, (2)-(5) measured here."""
    h_y = training.entropy_bits(run.real)

    def bits(source, y: Tensor) -> float:
        logits = run.classify(run.embed(source)) - run.net.balance  # probabilities at the real rates
        return training.information_bits(logits, y, run.kind, h_y)

    # y as in the data, whatever the protocol: H(Y) is that of the data, and eq. 4 means it so.
    y = run.real[torch.from_numpy(np.random.default_rng([seed, 1]).integers(0, len(run.real), n))]
    results = {"h_y_bits": h_y, "mi_generated_bits": bits(run.generated(n, seed, y), y), "information_n": n}
    # Validation images, which training does not see (unless with --train-on-all, celeba's published setting).
    labels = run.labels("val")
    if labels is not None:
        index = np.sort(np.random.default_rng([seed, 9]).permutation(len(labels))[:n])
        results["mi_real_bits"] = bits(run.real_images("val", index), labels[index])
        results["mi_real_n"] = len(index)
    # Eq. 1 by InfoNCE of stage 1's last steps; eqs. 6-7 by the discriminator's loss, which --loss ns alone allows.
    logged = {"mi_encoder_bits": run.logged("encoder", "mi_bits"), "jsd_bits": run.logged("gan", "jsd_bound")}
    return results | {key: value for key, value in logged.items() if value is not None}
