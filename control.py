"""What a conditional generator is asked beyond FID: attribute control, diversity within one y, bounds on information.

`metrics.py --network` calls this. y and labels are float32 [N, Y], one-hot or multi-hot; kind is 'one-hot' or
'multi-label'. `run` is the metrics.Run of a trained network: it generates, embeds and classifies. The functions above
the `measure_*` need networks, images and labels alone.
"""

import contextlib
import hashlib
import pickle
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import training

# ---------------------------------------------------------------------------------------------------------------------
# Attribute control accuracy.


def questions(kind: str, real: Tensor, each: int, seed: int, published: bool = False) -> tuple[Tensor, Tensor]:
    """What to ask a generator for: y [N, Y], and for each image the label that it is asked for [N].

    one-hot: `each` images of every class. multi-label: `each` (even) for every attribute, half with it and half
    without, the other attributes as they occur together in the rows of `real`. published: all with it, the other
    attributes fair coins.
    """
    asked, draw = torch.arange(real.shape[1]).repeat_interleave(each), np.random.default_rng([seed, 2])
    if kind == "one-hot":
        return torch.eye(real.shape[1])[asked], asked
    if published:
        y = torch.from_numpy(draw.integers(0, 2, (len(asked), real.shape[1]))).float()
    else:
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
    found_on = (logits - balance).sigmoid()[rows, asked] > 0.2
    right = logits.argmax(1) == asked if kind == "one-hot" else found_on == on if published else (score > 0) == on
    labels = {}
    for i, name in enumerate(names):
        its = asked == i
        found = {"accuracy": right[its]}
        if kind == "multi-label":
            found |= {"on": right[its & on], "off": right[its & ~on], "published": found_on[its & on]}
        labels[name] = {key: value.float().mean().item() for key, value in found.items() if len(value)}
    over = {key: float(np.mean([v[key] for v in labels.values()])) for key in ("accuracy", "published") if key in found}
    exact = {} if kind == "one-hot" else {"exact": ((logits > 0) == (y > 0.5)).all(1).float().mean().item()}
    return over | exact | {"labels": labels}


# ---------------------------------------------------------------------------------------------------------------------
# The independent judge: the run's own classifier is what the generator was trained to please.


class Judge(nn.Sequential):
    """A small convolutional classifier, trained on real images alone; the generator never sees it."""

    def __init__(self, labels: int):
        layers: list[nn.Module] = []
        for i, o, stride in ((3, 32, 2), (32, 64, 1), (64, 96, 2), (96, 128, 2)):
            layers += [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, labels))

    def look(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> logits [B, Y]; images larger than 64 px are reduced to that."""
        x = images.to(self[-1].weight.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True) if x.shape[2] > 64 else x
        return self(x.contiguous(memory_format=torch.channels_last))


def train_judge(
    images, labels: Tensor, kind: str, seed: int, device: torch.device, steps: int, mirror: bool = True
) -> tuple[Judge, float]:
    """Train a Judge on nine tenths of the real images; returns it with its accuracy on the last tenth.

    images: uint8 [N, S, S, 3], array or memory-map. steps: of 64 images, AdamW with one cycle of the learning rate.
    mirror: show half of the batches left to right; False where a label depends on the side.
    """
    draw = np.random.default_rng([seed, 3])
    loss_of = F.cross_entropy if kind == "one-hot" else F.binary_cross_entropy_with_logits
    held, kept = np.split(draw.permutation(len(labels)), [max(1, len(labels) // 10)])
    held = np.sort(held[:2000])
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        judge = Judge(labels.shape[1]).to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in tqdm(range(steps), desc="independent judge", unit="step", leave=False, dynamic_ncols=True):
            rows = np.sort(draw.choice(kept, min(64, len(kept)), replace=False))
            x = torch.from_numpy(images[rows])
            loss = loss_of(judge.look(x.flip(2) if mirror and draw.random() < 0.5 else x), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    judge.eval().requires_grad_(False)
    parts = np.array_split(held, -(-len(held) // 256))
    logits = torch.cat([judge.look(torch.from_numpy(images[rows])).cpu() for rows in parts])
    y = labels[held]
    right = logits.argmax(1) == y.argmax(1) if kind == "one-hot" else (logits > 0) == (y > 0.5)
    return judge, right.float().mean().item()


def measure_accuracy(run, n: int, seed: int, steps: int) -> dict:
    """Attribute control accuracy of n generated images by the run's classifier and by an independent judge."""
    published, balance = run.protocol == "paper", run.net.balance
    y, asked = questions(run.kind, run.real, max(2, n // len(run.names) // 2 * 2), seed, published)
    labels, results, judge = run.labels("train"), {"accuracy_n": len(y)}, None
    if labels is not None:
        judge, results["judge_real"] = load_judge(run, labels, seed, steps)

    def logits(images: Tensor) -> Tensor:
        """[B, 1 or 2, Y]: by the run's classifier and by the judge. The images are generated once for both."""
        own = run.features.classifier(run.features.embed(images))
        return torch.stack([own, judge.look(images)] if judge else [own], 1)

    own, *judged = run.look(run.generated(len(y), seed, y), logits).unbind(1)
    found = control_accuracy(own, y, asked, run.kind, run.names, balance, published)
    results |= {f"accuracy_{key}".removesuffix("_accuracy"): value for key, value in found.items()}
    for scores in judged:
        found = control_accuracy(scores, y, asked, run.kind, run.names)
        results |= {"accuracy_judge": found["accuracy"], "accuracy_judge_labels": found["labels"]}
    return results


def load_judge(run, labels: Tensor, seed: int, steps: int) -> tuple[Judge, float]:
    """The run's independent judge and its accuracy, from judge.pt beside the run, or trained now and kept there."""
    which = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
    key = f"{run.train.fingerprint} {run.train.size} {which} {seed} {steps}"
    path, state = run.folder / "judge.pt", {}

    def prepare() -> None:
        with contextlib.suppress(OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            state.update(torch.load(path, map_location="cpu", weights_only=True))
        if state.get("key") != key:
            judge, accuracy = train_judge(run.train.images, labels, run.kind, seed, run.world.device, steps)
            state.update(key=key, model={k: v.cpu() for k, v in judge.state_dict().items()}, accuracy=accuracy)
            with contextlib.suppress(OSError), training.atomic(path) as temporary:  # keeping it only saves time
                torch.save(state, temporary)

    run.world.first(prepare)
    state = run.world.gather(state)[0]
    judge = Judge(labels.shape[1])
    judge.load_state_dict(state["model"])
    return judge.to(run.world.device).eval().requires_grad_(False), state["accuracy"]


# ---------------------------------------------------------------------------------------------------------------------
# Diversity within one y.


def groups_of_one_y(labels: Tensor, each: int, most: int = 10) -> list[Tensor]:
    """Indices of up to `each` images for each of the `most` most frequent rows of labels that occur more than once."""
    _, inverse, counts = torch.unique(labels, dim=0, return_inverse=True, return_counts=True)
    often = counts.argsort(descending=True, stable=True)[:most]
    return [(inverse == i).nonzero()[:each, 0] for i in often if counts[i] > 1]


def spread(h: Tensor) -> float:
    """Mean distance between two different rows of h [N, D], N at least 2."""
    return (torch.cdist(h.double(), h.double()).sum() / (len(h) * (len(h) - 1))).item()


def measure_diversity(run, labels: Tensor, each: int, seed: int, notes: list[str]) -> dict:
    """Mean distance of encoder features within one y, of generated and real images, over the ten most frequent y's."""
    groups = groups_of_one_y(labels, each)
    if not groups:
        notes.append("no diversity: no two training images have the same y")
        return {}
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

    source = run.generated(n, seed)
    results = {"h_y_bits": h_y, "mi_generated_bits": bits(source, source.y), "information_n": n}
    labels = run.labels("val")
    if labels is not None:
        index = np.arange(len(labels))[:n]
        results["mi_real_bits"] = bits(run.real_images("val", index), labels[index])
    logged = {"mi_encoder_bits": run.logged("encoder", "mi_bits"), "jsd_bits": run.logged("gan", "jsd_bound")}
    return results | {key: value for key, value in logged.items() if value is not None}
