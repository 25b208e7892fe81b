"""Latents of a trained network: drawn, read, moved along a dimension, found for a picture; what each dimension does.

A latent is a row of standard normal numbers: 512 of noise, from which the mapper makes eps = r(y, noise), then z, 6 for
each layer of the generator. A tensor of them is float32 [B, width], and its labels y are float32 [B, Y], or None where
the network is unconditional. Layers and dimensions count from 1 in everything that a user reads or writes.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL.PngImagePlugin import PngInfo
from scipy.interpolate import CubicSpline
from torch import Tensor
from tqdm import tqdm

import checkpoints
import control
import gan
import training

RANGE = 4.5  # a traversal covers z in [-4.5, 4.5], as in EigenGAN
END = 2.0  # dimensions are measured from z = -2 to 2: 95 % of what the generator met in training lies there
MOST = 1000  # seeds of a range, images of a strip, frames from seed to seed: more is probably a typo
BATCH = 32  # images at once where rounding does not matter


# ---------------------------------------------------------------------------------------------------------------------
# What the command line says.


def parse_seeds(text: str) -> list[int]:
    """'0-7' or '1,5,9-11' -> the seeds it lists. Raises click.UsageError."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            chosen = range(int(first), int(last if dash else first) + 1)
            # Below 2^32, as on the page. Checked as a range: the list of a typo could fill the memory.
            if not 0 <= chosen.start < chosen.stop <= min(2**32, chosen.start + MOST):
                raise ValueError
            seeds += chosen
    except ValueError:
        raise click.UsageError(
            f"--seeds {text}: give numbers below 2^32 and ranges of at most {MOST}, as in 0-7 or 1,5,9-11"
        ) from None
    return seeds


def find_label(network: gan.Network, text: str) -> str | None:
    """The label that `text` names; tables print spaces for underscores, and case does not matter where it is clear."""

    def plain(name: str) -> str:
        return name.strip().replace("_", " ").casefold()

    # Exactly first: two names may differ in nothing but case or underscores.
    if text in network.label_names:
        return text
    alike = [name for name in network.label_names if plain(name) == plain(text)]
    return alike[0] if len(alike) == 1 else None  # of several, nobody knows which was meant


def parse_y(network: gan.Network, texts: Sequence[str]) -> tuple[Tensor | None, list[str]]:
    """Each text, a class or a comma list of attributes to turn on ('none': all off) -> y [rows, Y] and the row names.

    Without texts: every class, or every attribute alone. Raises click.UsageError naming what does not exist.
    """
    names, one_hot = network.label_names, network.label_kind == "one-hot"
    if network.label_kind == "none":
        if texts:
            raise click.UsageError("--y: this network is unconditional, it takes no labels")
        return None, [""]
    rows, titles = [], []
    for text in texts or names:
        whole = find_label(network, text)  # classes may have commas, attributes have none
        # "none" is for attributes: of classes exactly one is on, and one may be called "none".
        parts = [] if text == "none" and not one_hot else [text] if whole else text.split(",")
        found = [find_label(network, part) for part in parts]
        if None in found:
            kind = "classes" if one_hot else "attributes"
            raise click.UsageError(f"--y {parts[found.index(None)]}: the {kind} here are {', '.join(names)}")
        if one_hot and len(found) != 1:
            raise click.UsageError(f"--y {text}: an image has one class here; repeat --y for more rows")
        rows.append([float(name in found) for name in names])
        titles.append(", ".join(found) or "none")
    return torch.tensor(rows), titles


def all_dimensions(network: gan.Network) -> list[tuple[int, int]]:
    """Every (layer, dimension) that there is."""
    return [(layer + 1, dim + 1) for layer in range(len(network.generator.blocks)) for dim in range(gan.BASIS)]


def parse_dimensions(network: gan.Network, text: str) -> list[tuple[int, int]]:
    """'3.2,1' (dimension 2 of layer 3 and all of layer 1) or 'all' -> (layer, dimension)s. Raises click.UsageError."""
    known, found = all_dimensions(network), []
    for part in [] if text == "all" else text.split(","):
        chosen = [d for d in known if part.strip() in (f"{d[0]}.{d[1]}", f"{d[0]}")]
        if not chosen:
            raise click.UsageError(
                f"--dims {part}: this network has layers 1 to {known[-1][0]}, each with dimensions 1 to {gan.BASIS}: "
                "give 3.2 for one, 3 for all of a layer, or all"
            )
        found += [d for d in chosen if d not in found]  # once each, in the order asked for
    return found or known


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of latents.


def generate(network: gan.Network, y: Tensor | None, latents: Tensor, batch: int = 1) -> Tensor:
    """Decode latents with progress: x float32 [B, 3, size, size] in [-1, 1], on the CPU.

    batch 1: matrix products of other sizes round differently, so only alone does a latent always give the same bytes.
    """
    parts = []
    with tqdm(total=len(latents), desc="images", unit="img", leave=False, dynamic_ncols=True) as bar:
        for i in range(0, len(latents), batch):
            # To the CPU at once, so that the device holds one batch alone.
            parts.append(network.decode(None if y is None else y[i : i + batch], latents[i : i + batch]).cpu())
            bar.update(len(parts[-1]))
    return torch.cat(parts)


def notes_of(network: gan.Network, **notes: object) -> dict[str, str]:
    """What a picture says of itself: the hash of the network's weights, and whatever else it was made from."""
    return {"network": checkpoints.fingerprint(network.decoder.state_dict())} | {k: str(v) for k, v in notes.items()}


def png_info(notes: dict[str, str]) -> PngInfo:
    """Notes as the text chunks of a PNG, in UTF-8."""
    info = PngInfo()
    for key, value in notes.items():
        info.add_itxt(key, value)  # plain tEXt knows Latin-1 alone
    return info


def exploration(
    network: gan.Network, y: Tensor | None, seeds: Sequence[int], vary: str
) -> tuple[Tensor | None, Tensor]:
    """One of the paper's four explorations: y and latents of a grid. Whatever is held is that of the first seed.

    vary 'eps,z', 'eps' or 'z': a row for each y, in it every seed. 'y': a row for each seed, in it every y.
    """
    if vary not in ("eps,z", "eps", "z", "y"):
        raise ValueError(f"no exploration {vary!r}")
    latents, rows = network.latents(seeds), 1 if y is None else len(y)
    noise, z = latents[:, : gan.NOISE], latents[:, gan.NOISE :]
    if vary == "eps":
        latents = torch.cat((noise, z[:1].expand_as(z)), 1)
    if vary == "z":
        latents = torch.cat((noise[:1].expand_as(noise), z), 1)
    # The noise is held. eps still changes, because the mapper sees y.
    if vary == "y":
        return y.repeat(len(seeds), 1), latents.repeat_interleave(rows, 0)
    return None if y is None else y.repeat_interleave(len(seeds), 0), latents.repeat(rows, 1)


def column(layer: int, dim: int) -> int:
    """Where a latent holds the z of a dimension; layer and dim count from 1, else ValueError."""
    if layer < 1 or not 1 <= dim <= gan.BASIS:
        raise ValueError(f"no dimension {layer}.{dim}: layers count from 1, dimensions from 1 to {gan.BASIS}")
    # The noise comes first, then the z of layer 1, of layer 2, and so on.
    return gan.NOISE + (layer - 1) * gan.BASIS + dim - 1


def move(latents: Tensor, layer: int, dim: int, value: Tensor | float) -> Tensor:
    """A copy of `latents` in which the z of one dimension is `value` (a number, or one for each row)."""
    moved = latents.clone()
    moved[:, column(layer, dim)] = value
    return moved


def strips(
    network: gan.Network, y: Tensor | None, latent: Tensor, dims: Sequence[tuple[int, int]], values: Tensor
) -> Tensor:
    """One latent [1, width] and its y [1, Y], with the z of each dimension in turn at each of `values` [N].

    Returns [len(dims), N, 3, size, size] in [-1, 1].
    """
    moved = torch.cat([move(latent.expand(len(values), -1), *d, values) for d in dims])
    # In batches: they change the last bit, which cannot be seen in a strip.
    images = generate(network, None if y is None else y.expand(len(moved), -1), moved, BATCH)
    return images.unflatten(0, (len(dims), len(values)))


def spread(images: Tensor) -> float:
    """How much a strip [N, 3, H, W] in [-1, 1] changes: the mean deviation of its pixels from their mean, of [0, 1]."""
    return (images - images.mean(0)).abs().mean().item() / 2  # [-1, 1] is 2 wide


def loop(y: Tensor | None, latents: Tensor, frames: int, one_hot: bool) -> tuple[Tensor | None, Tensor]:
    """A smooth closed path through two or more latents and their y, `frames` from each to the next.

    A periodic cubic spline. Halfway between two draws it would pass near the mean, where pictures are dull, so each
    latent keeps a length between its neighbours'.
    """
    n = len(latents)
    at = np.arange(n * frames) / frames  # ends before n, where the first latent comes again

    def path(points: Tensor) -> Tensor:
        # A periodic spline needs the first point at its end too; then the loop closes without a corner.
        closed = torch.cat((points, points[:1])).double().numpy()
        return torch.from_numpy(CubicSpline(np.arange(n + 1), closed, bc_type="periodic")(at)).float()

    moving, length = path(latents), latents.norm(dim=1)
    length = np.interp(at, np.arange(n + 1), [*length.tolist(), length[0].item()])
    # At truncation 0 all is 0, and 0 / 0 would give black pictures.
    moving *= torch.from_numpy(length).float()[:, None] / moving.norm(dim=1, keepdim=True).clamp(min=1e-12)
    if y is not None:
        # A spline overshoots; the decoder knows y in [0, 1] only, and classes that add up to 1.
        y = path(y).clamp(0, 1)
        y = y / y.sum(1, keepdim=True) if one_hot else y
    return y, moving


# ---------------------------------------------------------------------------------------------------------------------
# A latent as JSON: what the page saves and `sample --latent` takes.


def to_json(network: gan.Network, y: Tensor | None, latent: Tensor) -> dict:
    """One latent [width] and its y [Y] as plain values; floats are written in full, so the picture stays the same."""
    z = latent[gan.NOISE :].view(-1, gan.BASIS)
    labels = {} if y is None else dict(zip(network.label_names, y.tolist(), strict=True))
    return {"y": labels, "noise": latent[: gan.NOISE].tolist(), "z": z.tolist()}


def read_json(network: gan.Network, path: str | Path) -> tuple[Tensor | None, Tensor]:
    """y [1, Y] (None if unconditional) and latent [1, width] of a file. Raises click.ClickException for a bad one."""

    def numbers(values: object, count: int, what: str) -> list[float]:
        if not isinstance(values, list) or len(values) != count:
            raise ValueError(f"{what} must be a list of {count}")
        # type(), because True is an int to isinstance(). 1000: far from any draw, but safe from overflow.
        if not all(type(v) in (int, float) and abs(v) <= 1000 for v in values):  # not NaN either
            raise ValueError(f"{what} must hold finite numbers of at most 1000")
        return [float(v) for v in values]

    names, layers = network.label_names, len(network.generator.blocks)
    try:
        # A pipe could keep open() waiting for ever; a folder gets open()'s own message.
        if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
            raise ValueError("it is no regular file")
        with open(path, "rb") as file:
            content = json.loads(file.read(2**20))  # a real one has 20 kB
        if not isinstance(content, dict) or not {"y", "noise", "z"} <= content.keys():
            raise ValueError("it needs the entries y, noise and z")
        if not isinstance(content["y"], dict) or sorted(content["y"]) != sorted(names):
            raise ValueError(f"y must have a number for each label of the network ({', '.join(names) or 'none'})")
        y = numbers([content["y"][name] for name in names], len(names), "y")
        noise = numbers(content["noise"], gan.NOISE, "noise")
        if not isinstance(content["z"], list) or len(content["z"]) != layers:
            raise ValueError(f"z must be a list of {layers} layers")
        z = [numbers(layer, gan.BASIS, "each layer of z") for layer in content["z"]]
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from None
    # RecursionError: lists nested deeper than Python goes.
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise click.ClickException(f"{path} is not a latent of this network: it is no JSON") from None
    except ValueError as error:
        raise click.ClickException(f"{path} is not a latent of this network: {error}") from None
    return torch.tensor([y]) if names else None, torch.tensor([[*noise, *itertools.chain(*z)]])


# ---------------------------------------------------------------------------------------------------------------------
# What each dimension does. Readers look at pictures with one z at both ends and everything else held.

LEAST = 0.5  # standard deviations: what can just be seen in strips of critters
AGREE = 0.8  # of the samples must move in the same direction: chance gives 64 samples that about once in a million
# The area is the part of pairs, one image with the label and one without, in their right order: chance is 0.5.
READABLE = 0.85  # least area under the ROC curve, on real images, with which the judge names dimensions by a label
NAMELESS = "no attribute"
VISIBLE = 1 / 255  # mean change of the picture: below one level of 8 bits a dimension does nothing


@dataclass
class Reader:
    """Reads labels off pictures. look: uint8 [B, S, S, 3] -> logits [B, names]; scale [names]: the standard deviation
    of the logits over real images, in which changes are counted."""

    names: list[str]
    look: Callable[[Tensor], Tensor]
    scale: Tensor


def reader(names: list[str], look: Callable[[Tensor], Tensor], real: Iterable[Tensor]) -> Reader:
    """A Reader whose scale comes from batches of real images, uint8 [B, S, S, 3]."""
    return Reader(names, look, torch.cat([look(images).cpu() for images in real]).std(0))


def log_odds(logits: Tensor, kind: str) -> Tensor:
    """Logits [B, Y] of each label against all else: of a softmax ('one-hot') or of sigmoids ('multi-label')."""
    if kind != "one-hot":
        return logits
    # log p - log(1 - p), in float64: in float32 a sure answer has 1 - p = 0. 1e-12 keeps it finite.
    log_p = logits.double().log_softmax(1)
    return (log_p - (-log_p.expm1()).clamp(min=1e-12).log()).float()


def measure(network: gan.Network, y: Tensor | None, latents: Tensor, readers: dict[str, Reader]) -> list[dict]:
    """What every dimension does to the pictures of `latents`, those that change the picture most first.

    For each: `layer`, `dim`, `name` ('Eyeglasses +0.9', or 'no attribute'), `also` (what else moves), `change` (the
    mean over pixels, in [0, 1], of the difference between z = -2 and 2) and `labels`, by label and reader: the mean
    change of its `logit`, the same in standard deviations (`effect`), and the part of the latents that move in its
    direction (`consistency`).
    """
    found = []
    for layer, dim in tqdm(all_dimensions(network), desc="dimensions", unit="dim", leave=False, dynamic_ncols=True):
        change, moved = 0.0, {who: [] for who in readers}
        for i in range(0, len(latents), BATCH):
            part, its = latents[i : i + BATCH], None if y is None else y[i : i + BATCH]
            # In 8 bits, as the readers were trained and as pictures are saved.
            ends = [training.to_uint8(network.decode(its, move(part, layer, dim, z))) for z in (-END, END)]
            # As int: differences of uint8 wrap around.
            change += (ends[1].int() - ends[0].int()).abs().sum().item()
            for who, r in readers.items():
                moved[who].append((r.look(ends[1]) - r.look(ends[0])).float().cpu())
        labels: dict[str, dict] = {}
        for who, r in readers.items():
            for name, logit, scale in zip(r.names, torch.cat(moved[who]).T, r.scale.tolist(), strict=True):
                mean = logit.mean().item()
                # 1e-6: a reader that says the same of all real images has no scale.
                values = {"logit": mean, "effect": mean / max(scale, 1e-6)}
                # A logit that stays has the sign 0 and counts against it.
                values["consistency"] = (logit.sign() == math.copysign(1, mean)).float().mean().item()
                labels.setdefault(name, {})[who] = values
        names = [f"{name} {effect:+.1f}" for name, effect in names_of(labels)]
        change /= len(latents) * 3 * network.size**2 * 255
        found.append(dict(layer=layer, dim=dim, name=(names or [NAMELESS])[0], also=names[1:], change=change,
                          labels=labels))  # fmt: skip
    return sorted(found, key=lambda d: -d["change"])


def names_of(labels: dict[str, dict]) -> list[tuple[str, float]]:
    """The labels that a dimension moves, most first, with how far in standard deviations.

    Every reader that knows a label must see it move, in the same direction and in most pictures; the judge, which the
    generator was not trained to please, must be one of them. The number is that of the reader who saw least.
    """
    found = {}
    for name, by in labels.items():
        effects = [r["effect"] for r in by.values()]
        agree = all(r["consistency"] >= AGREE for r in by.values()) and len({e > 0 for e in effects}) == 1
        if "judge" in by and agree and min(map(abs, effects)) >= LEAST:
            found[name] = min(effects, key=abs)
    return sorted(found.items(), key=lambda item: -abs(item[1]))


# What critters.py drew, by what a person would call it. light is the logarithm of red, green and blue light.
# Colours are (hue, lightness, saturation). Hues stay out: they go round, so they have no ranks.
FACTORS: dict[str, dict[str, Callable[[dict], float]]] = {
    "pose": {
        "yaw": lambda f: f["yaw"],
        "roll": lambda f: f["roll"],
        "pitch": lambda f: f["pitch"],
        "shift right": lambda f: f["x"],
        "shift down": lambda f: f["y"],
    },
    "size": {
        "head size": lambda f: f["scale"],
        "head width": lambda f: f["width"],
        "ear size": lambda f: f["ears"],
        "eye size": lambda f: f["eyes"],
    },
    "colour": {
        "light": lambda f: sum(f["light"]),
        "red-blue light": lambda f: f["light"][0] - f["light"][2],
        "green light": lambda f: f["light"][1] - (f["light"][0] + f["light"][2]) / 2,
        "fur lightness": lambda f: f["fur"][1],
        "fur saturation": lambda f: f["fur"][2],
        "background lightness": lambda f: f["background"][1],
        "haze": lambda f: f["haze"][0],
    },
}


def known_labels(run, split: str) -> tuple[list[str], Tensor]:
    """Everything that is known of the real images of a split: names, and float32 [N, names] in [0, 1].

    run: a TrainedRun. That is y, the other classes and attributes of the data, and for critters the factors of the
    drawing, each by its rank: 0 the least, 1 the most.
    """
    import critters

    data, columns = run.images[split], {}
    for _, names, y in control.known_labels(run, split):
        columns |= dict(zip(names, y.T, strict=True))
    # --train-on-all joins the splits: an image's place no longer tells what it was drawn from.
    if data.data == "critters" and not data.train_on_all:
        # 0 is the seed of the data set.
        drawn = [critters.factors(0, critters.OFFSETS[split] + i) for i in range(len(data))]
        for name, value in [item for group in FACTORS.values() for item in group.items()]:
            # Two argsorts give ranks: labels that fill [0, 1] evenly, whatever the factor's unit.
            ranks = np.argsort(np.argsort([value(f) for f in drawn]))
            columns[name] = torch.from_numpy(ranks / (len(ranks) - 1)).float()
    if not columns:
        raise click.ClickException("the images have no labels to name dimensions by")
    return list(columns), torch.stack(list(columns.values()), 1)


def readers_of(run, seed: int, steps: int) -> tuple[dict[str, Reader], dict[str, float]]:
    """Who names a run's dimensions, and how well the judge reads each of its labels (area under the ROC curve).

    run: a TrainedRun. The run's own classifier reads y; an independent judge, trained on the real images, reads all
    that is known of them, as far as it can.
    """
    from sklearn.metrics import roc_auc_score  # slow to import

    names, targets = known_labels(run, "train")
    # Classes too are asked for one by one, so that every label has a logit of its own.
    groups = [("multi-label", names, targets)]
    # No mirror images: in them yaw, roll and the shift to the right change their signs.
    judge, _ = control.kept_judge(run, groups, seed, steps, mirror=False)
    split, rows = "val", np.arange(len(run.images["val"]))
    if len(rows) < 100:  # too few to tell what the judge reads: those that it did not learn from
        # The same draw as in `control.train_judge`, so these are the images that it held out.
        split, rows = "train", np.sort(control.hold_out(np.random.default_rng([seed, 3]), len(targets))[0])
    data, (_, truth) = run.images[split], known_labels(run, split)
    # From 1,000 images the area is known to about 0.01.
    rows = rows[np.linspace(0, len(rows) - 1, min(1000, len(rows))).astype(int)]
    real = [torch.from_numpy(data.images[part]) for part in np.array_split(rows, -(-len(rows) // 64))]

    with torch.inference_mode():
        logits = torch.cat([judge.look(images).cpu() for images in real])
    quality = {}
    for name, logit, known in zip(names, logits.T, truth[rows].T, strict=True):
        if 0 < (known > 0.5).float().mean() < 1:  # a label that all or none have cannot be told
            quality[name] = float(roc_auc_score(known > 0.5, logit))
    kept = [i for i, name in enumerate(names) if quality.get(name, 0) >= READABLE]
    readers = {"judge": Reader([names[i] for i in kept], lambda x: judge.look(x)[:, kept], logits.std(0)[kept])}
    if run.features and run.features.classifier is not None and run.names:

        def classify(images: Tensor) -> Tensor:
            # Against all other classes: the logits of a softmax may all rise together.
            return log_odds(run.features.classifier(run.features.embed(images)), run.kind)

        readers = {"classifier": reader(run.names, classify, real)} | readers
    return readers, quality


def found_names(network: gan.Network, file: str | Path) -> list[dict]:
    """What `explore.py dimensions` found of this network: from its export, or from dimensions.json beside the file.

    Dictionaries with layer, dim, name and change, in order; [] where there is nothing, or only of other weights.
    """
    known, content = set(all_dimensions(network)), {"dimensions": network.dimensions}
    try:
        if network.dimensions is None:
            content = json.loads(Path(file).with_name("dimensions.json").read_text())
            # Names found for other weights would be wrong.
            if content["network"] != checkpoints.fingerprint(network.decoder.state_dict()):
                return []
        found = [dict(layer=d["layer"], dim=d["dim"], name=str(d["name"])[:200], change=float(d["change"]))
                 for d in content["dimensions"]]  # fmt: skip
        return [d for d in found if (d["layer"], d["dim"]) in known]
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError):  # not there, or no such file
        return []


# ---------------------------------------------------------------------------------------------------------------------
# Projection: the latent of a given picture.

STARTS = 4  # searches at once, of which the best is kept: one alone can stick
DRAWS = 256  # random latents that the searches start from the best of
RATE = 0.05  # of Adam, with one cycle; this and the weights below were found by trying, on pictures of critters
PRIOR = 1e-3  # weight of the mean square of the latent, which keeps it near what the generator met in training
FEATURES = 0.1  # weight of the distance of encoder features, relative to the picture's own


def project(network: gan.Network, image: Tensor, steps: int, seed: int = 0) -> tuple[Tensor | None, Tensor, Tensor]:
    """The y [1, Y], latent [1, width] and picture [3, size, size] that come closest to an image [3, size, size].

    Gradient descent on eps (through the mapper's noise), z and y: mean squared error of the pixels in [-1, 1], plus the
    squared distance of encoder features where the network has its encoder. y starts where the classifier sees it.
    """
    device = network.generator.last.weight.device
    target, encoder = image[None].to(device), network.encoder
    y = None
    if network.labels:
        logits = torch.zeros(1, network.labels, device=device)
        if encoder is not None and network.classifier is not None:
            logits = network.classifier(encoder(target)).clamp(-8, 8)  # sure, but still with a gradient
        # Logits may go anywhere, and `squash` keeps y where labels can be.
        y = logits.repeat(STARTS, 1).requires_grad_()
    h = None if encoder is None else encoder(target)
    squash = (lambda y: y.softmax(1)) if network.label_kind == "one-hot" else torch.sigmoid

    # Start from the draws that are nearest already, moved halfway to the mean.
    draws = network.latents(range(seed, seed + DRAWS))
    guess = None if y is None else squash(y.detach()[:1]).cpu()
    errors = [
        (network.decode(None if y is None else guess.expand(len(part), -1), part) - target).square().mean((1, 2, 3))
        for part in draws.split(BATCH)
    ]
    latents = (0.5 * draws[torch.cat(errors).cpu().topk(STARTS, largest=False).indices]).to(device).requires_grad_()

    parameters = [latents] if y is None else [latents, y]
    # 0.99 averages squares over 100 steps; PyTorch's 0.999 over 1,000, but a search has 300 by default.
    optimizer = torch.optim.Adam(parameters, RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    bar = tqdm(range(steps), desc="project", unit="step", leave=False, dynamic_ncols=True)
    for step in bar:
        # `network.decode` runs in inference mode, without gradients.
        x = network.decoder(None if y is None else squash(y), latents)
        error = (x - target).square().mean((1, 2, 3))
        loss = error + PRIOR * latents.square().mean(1)
        if h is not None:
            features = encoder(x.contiguous(memory_format=torch.channels_last))
            loss = loss + FEATURES * (features - h).square().sum(1) / h.square().sum()
        optimizer.zero_grad()
        loss.sum().backward()  # the searches share nothing, so each gets the gradient of its own loss
        optimizer.step()
        schedule.step()
        if step % 20 == 0:  # it waits for the device
            bar.set_postfix_str(f"PSNR {psnr(error.min().item()):.1f} dB", refresh=False)
    best = loss.argmin()  # of the last step but for one update at a rate near 0
    y = None if y is None else squash(y.detach()[best][None]).cpu()
    latent = latents.detach()[best][None].cpu()
    return y, latent, generate(network, y, latent)[0]  # alone, as `sample --latent` draws it


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error between pictures in [-1, 1]."""
    return 10 * math.log10(4 / max(error, 1e-12))  # 4: the square of the range; equal pictures have 126 dB
