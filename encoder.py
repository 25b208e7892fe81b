"""Stage 1: trains the contrastive encoder E. The classifier and the generator's regularisation look through it.

    python encoder.py --data critters
    python encoder.py --data afhq --backbone resnet50 --epochs 100
    torchrun --nproc-per-node 8 encoder.py --data celeba

Two random views of every image go through a ResNet and a small projection; the loss pulls the two views of an image
together. SimCLR pushes all other images away, which maximises the InfoNCE lower bound on I(X;E), equation (1) of the
paper; BYOL predicts a slowly moving copy of itself; Barlow Twins decorrelates the features. The projection serves
training alone: the features h are the layer before it. The results are `encoder.pt` and `encoder.json`.

From top to bottom: network, augmentation, losses, evaluation, the training loop, the command. With `training.py`
and `checkpoints.py` beside it, this file is all that the network, the losses and the loop need.
"""

import copy
import functools
import json
import math
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from tqdm import tqdm

import checkpoints
import training

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # for pixels in [0, 1]
EVALUATED = 20_000  # most images of a split that the evaluation looks at: its logistic regression takes seconds then

# Settings by data, '' for any. area: smallest crop; strength: of the colour jitter; grey: probability of a grey view;
# tau: BYOL's momentum at the start; cpu_images: most images that a run without --epochs sees on a CPU (a few minutes);
# half_cosine: epochs in which the published schedule would fall to 0.
PRESETS = {
    # Gentle views: small crops and strong colours hide glasses and hats, which an untrained network then tells better.
    # Drawn faces, 20,000 images seen: a linear readout has 69 % balanced accuracy, with strong views 55, untrained 67.
    # Faces, 40,000 seen: with the published lr, temperature and area, I(X;E) half-way was 0.5 bits in place of 1.3.
    # tau 0.99 is BYOL's for runs of 100 to 300 epochs. half_cosine counts for --schedule published alone: about AFHQ's.
    "": dict(backbone="resnet18", schedule="cosine", epochs=200.0, batch=64, lr=1e-3, weight_decay=1e-4, temperature=0.1,
             area=0.6, strength=0.4, grey=0.2, tau=0.99, stem="auto", cpu_images=40_000, squash=False, train_on_all=False,
             half_cosine=400),
    # Found by trying. tau 0.9: the target averages about ten steps, of the hundreds that such a run has.
    "critters": dict(epochs=5.0, temperature=0.2, area=0.3, strength=1.0, grey=0.75, tau=0.9, stem="imagenet", cpu_images=None),
    # Half an epoch is 30,000 images. They are grey already.
    "fashion-mnist": dict(epochs=0.5, grey=0.0, tau=0.9, stem="imagenet"),
}  # fmt: skip

# --protocol paper: the published settings. half_cosine is the number of batches in an epoch of the published runs, on
# 80 % of the images. Those were the first 80 % of the files; of AFHQ it is the train split here: val stays unseen.
PAPER = {
    "": dict(backbone="resnet50", stem="imagenet", schedule="published", epochs=200.0, batch=32, lr=3e-4, weight_decay=1e-4,
             temperature=0.5, area=0.08, strength=1.0, grey=0.2, cpu_images=None),
    "afhq": dict(half_cosine=403),
    # squash, train_on_all: all 202,599 images, their 178x218 pixels made square without a crop.
    "celeba": dict(batch=128, half_cosine=1266, squash=True, train_on_all=True),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Network.


class Encoder(nn.Module):
    """ResNet without its last layer, h = E(x), and the projection that training puts on h.

    backbone: 'resnet18', 'resnet34' or 'resnet50'.  stem: 'imagenet' (conv 7x7 stride 2, max-pool: works at a quarter of
    the size) or 'small' (conv 3x3 stride 1: full size, about 15 times the work).  mean, std: of the three channels, for
    inputs in [-1, 1]; the first layer sees (x - mean) / std.  norm_layer: `training.BatchNorm` to train in several processes.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        stem: str = "small",
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        norm_layer=nn.BatchNorm2d,
    ):
        super().__init__()
        if backbone not in ("resnet18", "resnet34", "resnet50"):  # a file may name anything else in torchvision
            raise ValueError(f"no backbone {backbone!r:.40}")
        self.config = dict(backbone=backbone, stem=stem, mean=tuple(mean), std=tuple(std))
        # On the CPU, whatever the default is: `checkpoints.rebuild` makes all else without memory.
        self.register_buffer("mean", torch.tensor(mean, device="cpu").view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, device="cpu").view(3, 1, 1), persistent=False)
        self.backbone = getattr(torchvision.models, backbone)(norm_layer=norm_layer)
        self.features = self.backbone.fc.in_features
        # h comes before the projection, which drops colours and the like to please the loss (SimCLR, section 4.2).
        self.backbone.fc = nn.Identity()
        if stem == "small":
            # SimCLR's first layers for CIFAR-10: with ImageNet's, images of 32 px end in maps of a single pixel.
            self.backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            # Its first weights as those of torchvision's other convolutions.
            nn.init.kaiming_normal_(self.backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.backbone.maxpool = nn.Identity()
        # SimCLR's two layers; 128 outputs as published.
        self.projection = nn.Sequential(
            nn.Linear(self.features, self.features), nn.ReLU(), nn.Linear(self.features, 128)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, 3, S, S] float in [-1, 1] -> h [B, features], not negative."""
        return self.backbone((x - self.mean) / self.std)


def build(checkpoint: dict) -> Encoder:
    """The frozen encoder in eval mode, from the content of `encoder.pt`, with its weights' `fingerprint`."""
    encoder = checkpoints.rebuild(lambda: Encoder(**checkpoint["config"]), checkpoint["model"])
    if not ((encoder.mean.abs() <= 1).all() and (encoder.std > 0).all() and (encoder.std <= 1).all()):
        raise ValueError("its mean and std are no scale of images")
    encoder.fingerprint = checkpoints.fingerprint(checkpoint["model"])
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def embed(encoder: nn.Module, batches: Iterable[torch.Tensor], total: int, run: training.Run) -> torch.Tensor:
    """h of every image, in order: float32 [total, features] on the CPU.

    batches: uint8 [B, S, S, 3] tensors, `total` images in all. Shows progress.
    """
    encoder, parts = encoder.eval(), []
    with tqdm(total=total, desc="embed", unit="img", dynamic_ncols=True, leave=False) as bar:
        for images in batches:
            with run.autocast():
                # fp32 in any case: NumPy, which evaluates them, has no bf16.
                parts.append(encoder(training.to_float(images.to(run.device))).float())
            bar.update(len(images))
    return torch.cat(parts).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation, as SimCLR's, for a whole batch at once.


@functools.cache  # made once: a copy from the host would be waited for at every step
def colour_matrices(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[3, 3] each: the identity, RGB to luminance in all channels, and the generator of turns about the grey axis."""
    # ITU-R BT.601's weights, as torchvision takes them for grey and saturation.
    luma = torch.tensor([0.299, 0.587, 0.114], device=device).expand(3, 3)
    # The cross product with (1, 1, 1) / sqrt(3), as a matrix.
    axis = 3**-0.5 * torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=device)
    return torch.eye(3, device=device), luma, axis


def augment(x: torch.Tensor, area: float = 0.08, strength: float = 1.0, grey: float = 0.2) -> torch.Tensor:
    """One random view of each image; each draws its own parameters, on its device.

    x: float32 [B, 3, S, S] in [-1, 1]; so is the result.  area: smallest area of `training.random_crop`.  strength: 1
    jitters brightness, contrast and saturation by up to 0.8, hue by up to 0.2 turns, with probability 0.8.  grey:
    probability of it.

    The colour changes are linear (hue: a turn about the grey axis), so together one 3x3 matrix.
    """
    b, _, s, _ = x.shape

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(b, 1, 1, device=x.device) * (high - low) + low

    # It blurs too, which SimCLR does after the colours. Both are linear, so the order hardly matters.
    x = training.random_crop(x, area)

    # Colour: brightness and contrast scale pixels (in [0, 1]) and shift them by the mean; the rest is a matrix that
    # keeps grey.
    # The probability of 0.8 and the ranges, 0.8 and for the hue 0.2, are SimCLR's.
    jitter = (uniform(0, 1) < 0.8) * strength
    brightness, contrast, saturation = (1 + jitter * uniform(-0.8, 0.8) for _ in range(3))
    angle = 2 * math.pi * jitter * uniform(-0.2, 0.2)
    saturation = torch.where(uniform(0, 1) < grey, 0.0, saturation)  # grey is saturation 0
    one, luma, axis = colour_matrices(x.device)
    turn = angle.cos() * one + (1 - angle.cos()) / 3 + angle.sin() * axis  # Rodrigues' formula about (1, 1, 1)
    colour = (saturation * one + (1 - saturation) * luma) @ turn
    x = ((x + 1) / 2).flatten(2)
    # Contrast is about the mean luminance. It acts before hue and saturation, which leave that grey as it is.
    mean = luma[:1] @ x.mean(2, keepdim=True)
    x = contrast * brightness * (colour @ x) + (1 - contrast) * brightness * mean
    return (2 * x.clamp(0, 1) - 1).view(b, 3, s, s).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------
# Losses. z1, z2: float32 [B, 128], the projections of the two views of each image.


def nt_xent(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> torch.Tensor:
    """NT-Xent, equation 1 of SimCLR (Chen et al. 2020): mean over the 2B views of the cross-entropy of finding the other
    view of the same image among the 2B - 1 other views, by cosine similarity / temperature."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-torch.inf)  # a view is not among its own candidates
    # The other view of row i is B rows on, or B rows back.
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device).roll(len(z1)))


def infonce_bits(loss: torch.Tensor, images: int) -> torch.Tensor:
    """Lower bound on I(X;E) of equation (1) in bits, from NT-Xent over `images` images: log2(2B - 1) - loss / ln 2."""
    return math.log2(2 * images - 1) - loss / math.log(2)


def byol(p1: torch.Tensor, p2: torch.Tensor, t1: torch.Tensor, t2: torch.Tensor) -> torch.Tensor:
    """BYOL (Grill et al. 2020), equation 2, both ways: 2 - 2 cos between predictions p and the other view's target t."""
    return 4 - 2 * (F.cosine_similarity(p1, t2).mean() + F.cosine_similarity(p2, t1).mean())


def whiten(z: torch.Tensor, ridge: float = 0.1) -> torch.Tensor:
    """z [B, D] float32 with mean 0 and uncorrelated features of variance 1 over the batch, turned as little as possible
    (ZCA). ridge, as a part of their mean variance, is added to all variances: B need not exceed D."""
    z = z - z.mean(0)
    C = z.T @ z / len(z)
    values, vectors = torch.linalg.eigh(C + ridge * C.diagonal().mean() * torch.eye(len(C), device=z.device))
    # The clamp is for targets that have collapsed: they have no variance, and rounding may make it negative.
    return z @ (vectors * values.clamp(min=1e-12).rsqrt()) @ vectors.T


def standardise(z: torch.Tensor) -> torch.Tensor:
    """z [B, D] with mean 0 and variance 1 of each feature over the batch."""
    # The biased deviation, as in the batch norm by which Barlow Twins standardises.
    return (z - z.mean(0)) / (z.std(0, correction=0) + 1e-5)


def barlow(z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    """Barlow Twins (Zbontar et al. 2021), equation 1: sum (1 - C_ii)^2 + lambda sum C_ij^2, C the cross-correlation over
    the batch of the two views' features; lambda = 1 / features, so that both sums weigh alike at any width."""
    b, d = z1.shape
    c = standardise(z1).T @ standardise(z2) / b
    on = c.diagonal()
    # Their lambda is 0.005, found by a search at 8,192 features; here there are 128.
    return (1 - on).square().sum() + (c.square().sum() - on.square().sum()) / d


def gather(z: torch.Tensor) -> torch.Tensor:
    """[V, B, D] of this process -> [V, world * B, D] of all, in the order of the ranks, in one message.

    Gradient flows into this process's own rows. Each process computes the loss of the whole batch from them, so the
    sum (not the mean) of the processes' gradients is the gradient of that loss.
    """
    if not dist.is_initialized():
        return z
    rank, parts = dist.get_rank(), z.new_empty(dist.get_world_size(), *z.shape)
    gather_one = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.14
    # A gather passes no gradient back; the rows that get one are put in below.
    gather_one(parts.flatten(0, 1), z.detach().contiguous())
    return torch.cat((*parts[:rank], z, *parts[rank + 1 :]), dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: what the embedding says about the labels, which it has not seen.


def knn(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int = 20) -> np.ndarray:
    """Share of each label among the k nearest of `bank` [N, F] by cosine: [Q, Y] in [0, 1]. labels: 0 or 1 [N, Y]."""
    from sklearn.neighbors import NearestNeighbors  # slow to import, and not needed for --help

    # By cosine, as NT-Xent and BYOL compare. k = 20 is what DINO (Caron et al. 2021) found best.
    neighbours = NearestNeighbors(n_neighbors=min(k, len(bank)), metric="cosine").fit(bank)
    return labels[neighbours.kneighbors(queries, return_distance=False)].mean(1)


def linear_probe(h: np.ndarray, labels: np.ndarray, queries: np.ndarray, one_hot: bool) -> np.ndarray:
    """Scores [Q, Y] of logistic regression on standardised features h [N, F]; attributes each on their own, balanced."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fit(y: np.ndarray, **options) -> np.ndarray:
        # C makes it the same penalty per image, 1e-3 |w|^2, whatever their number.
        # Standardised: a penalty on |w|^2 would hold features of small scale back.
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=500 / len(h), max_iter=200, **options))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is a measure, and 200 iterations tell enough
            return probe.fit(h, y).decision_function(queries)

    scores = np.zeros((len(queries), labels.shape[1]))
    if one_hot:
        present = np.flatnonzero(labels.any(0))  # it cannot learn a class without images, nor from one class alone
        if len(present) > 1:
            found = fit(labels.argmax(1))
            scores -= 1e9  # no class without images may win the argmax
            # Of two classes scikit-learn gives only the score of the second.
            scores[:, present] = found if found.ndim == 2 else np.stack([-found, found], 1)
    else:
        # An attribute that all images have, or none, cannot be learnt: its scores stay 0.
        for i in np.flatnonzero(labels.any(0) & ~labels.all(0)):
            # Balanced, as its accuracy is: else a rare attribute is always guessed 'off'.
            scores[:, i] = fit(labels[:, i], class_weight="balanced")
    return scores


def score(scores: np.ndarray, labels: np.ndarray, one_hot: bool, threshold: np.ndarray | float = 0.0) -> float:
    """Accuracy of the highest score; for attributes the balanced accuracy at `threshold`, averaged over those that occur
    both on and off in `labels` [Q, Y]."""
    if one_hot:
        return float((scores.argmax(1) == labels.argmax(1)).mean())
    on, off = labels == 1, labels == 0
    both = on.any(0) & off.any(0)
    if not both.any():
        return math.nan
    guess, on, off = (scores > threshold)[:, both], on[:, both], off[:, both]
    return float(((guess & on).sum(0) / on.sum(0) + (~guess & off).sum(0) / off.sum(0)).mean() / 2)


def effective_rank(h: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred h [N, F] (Roy and Vetterli 2007); 1 is collapse."""
    p = torch.linalg.svdvals(h - h.mean(0))
    # The clamp makes it 1 where all images have one embedding, and all singular values are 0.
    p = p / p.sum().clamp(min=1e-12)
    return torch.special.entr(p).sum().exp().item()


def evaluate(encoder: Encoder, train, val, run: training.Run, limit: int = EVALUATED) -> dict:
    """What the embedding is worth, on at most `limit` images of each split; train, val: Datasets.

    Returns accuracies in [0, 1]: on h by 20 nearest neighbours and by a linear probe, on raw pixels (reduced to 32 px) by
    nearest neighbours, for the labels and for the hidden ones if there are any; and the effective rank of h.
    """
    h, pixels, labels = {}, {}, {}
    for split, ds in (("train", train), ("val", val)):
        # Spread over the split: images may lie sorted by class.
        index = np.linspace(0, len(ds) - 1, min(limit, len(ds))).astype(int)
        parts = np.array_split(index, max(1, len(index) // 256))  # batches of about 256 images, to bound the memory
        images = (torch.from_numpy(ds.images[part]) for part in parts)
        h[split] = embed(encoder, images, len(index), run).numpy()
        images = (torch.from_numpy(ds.images[part]).permute(0, 3, 1, 2).float() for part in parts)
        # Pixels are what an embedding must beat. At 32 px 20,000 images take 0.25 GB, at 256 px they would take 16.
        pixels[split] = torch.cat([F.adaptive_avg_pool2d(x, min(32, ds.size)).flatten(1) for x in images]).numpy()
        labels[split] = {"": np.asarray(ds.labels)[index]}
        # Hidden labels are known but given to no stage, such as the kinds of wild animals in critters.
        labels[split] |= {name: np.eye(len(names))[value[index]] for name, (value, names) in ds.hidden.items()}
    results = {"images": len(h["train"]), "val_images": len(h["val"])}
    results["rank"] = effective_rank(torch.from_numpy(h["val"]))
    # Centred: pixels are never negative, so without this the cosine of any two images would be near 1.
    centre = pixels["train"].mean(0)
    for name, y in labels["train"].items():
        one_hot, asked, key = train.label_kind == "one-hot" or name != "", labels["val"][name], name and name + "_"
        rate = y.mean(0)  # a rare attribute is guessed 'on' where it is more frequent among the neighbours than overall
        results[key + "knn"] = score(knn(h["train"], y, h["val"]), asked, one_hot, rate)
        results[key + "linear"] = score(linear_probe(h["train"], y, h["val"], one_hot), asked, one_hot)
        nearest = knn(pixels["train"] - centre, y, pixels["val"] - centre)
        results[key + "pixel_knn"] = score(nearest, asked, one_hot, rate)
    return results


def report(results: dict, label_kind: str) -> None:
    """Print the evaluation."""
    rank, n, m = results["rank"], results["images"], results["val_images"]
    print(f"Embedding of {m:,} validation images, neighbours among {n:,} training images: effective rank {rank:.1f}")
    print(f"{'accuracy %':24s}{'kNN (k=20)':>12s}{'linear':>10s}{'kNN on pixels':>16s}")
    for key in (k.removesuffix("linear") for k in results if k.endswith("linear")):
        name = key.strip("_") or ("label" if label_kind == "one-hot" else "labels, balanced, mean")
        values = [100 * results[key + what] for what in ("knn", "linear", "pixel_knn")]
        print(f"{name:24s}{values[0]:12.2f}{values[1]:10.2f}{values[2]:16.2f}")
    readers = {"nearest neighbours": "knn", "a linear probe": "linear"}
    worse = [name for name, key in readers.items() if results[key] < results["pixel_knn"]]
    if worse:
        print(
            f"Warning: {' and '.join(worse)} tell the labels worse from this embedding than neighbours do from raw pixels. "
            "Stages 2 and 3 see images through it alone: the regularisation will push the generator by a poor classifier, "
            "and control accuracy will say little. Train longer (--epochs), or try another --method."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Training.


def rate(schedule: str, images: int, total: int, epoch: int, half_cosine: int) -> float:
    """Learning rate after `images` images of `total`, as a part of the full one. epoch: images in one.

    cosine: a linear warm-up over the first twentieth of the run, times half a cosine to 0 over all of it. published: the
    full rate for ten epochs, then one step each epoch along half a cosine that `half_cosine` steps would bring to 0. A
    run of 200 epochs ends long before, at 0.54 (AFHQ) and 0.95 (CelebA) of the full rate; beyond that many steps it rises
    again, as published.
    """
    if schedule == "published":
        return 0.5 * (1 + math.cos(math.pi * max(0, images // epoch - 9) / half_cosine))
    return min(1.0, 20 * images / total) * 0.5 * (1 + math.cos(math.pi * min(1.0, images / total)))


def train(
    encoder: Encoder, ds, run: training.Run, options: dict, state: dict, total: int, log: training.Log, save: Callable
) -> tuple[int, dict]:
    """Train `encoder` in place until `total` images are seen, from images_seen = state['images_seen'].

    Returns how many were seen, and what further training needs beside the encoder.

    `save(images_seen, extra, must)` is called at most about 50 times a run, at least about 5,000 images apart, and at the end;
    must: it may not fail, since a signal asked for the end. All random numbers follow from the images seen, so that a
    run resumed from any save does what an unbroken one would. Raises training.Stopped, after a save, where a signal
    asked for the end.
    """
    encoder.train()  # before BYOL's target is copied from it

    # Build what training needs beside the encoder, and take its state from the checkpoint.
    method, batch = options["method"], options["batch"]
    seen, own = state.get("images_seen", 0), batch // run.world
    modules = {"encoder": encoder}
    if method == "byol":
        torch.manual_seed(run.seed)  # the same weights in every process, whatever was drawn before
        # BYOL collapses without a predictor: both sides would agree on a constant.
        modules["predictor"] = nn.Sequential(
            training.BatchNorm(128), nn.Linear(128, 512), training.BatchNorm(512), nn.ReLU(), nn.Linear(512, 128)
        ).to(run.device)
        # The target's weights follow the encoder's, further below; no gradient may reach them (BYOL's stop-gradient).
        modules["target"] = copy.deepcopy(encoder).requires_grad_(False)
    # BYOL learns from a predictor that keeps up with the encoder: it takes 5 times the learning rate (found by trying).
    groups = [
        dict(params=[*m.parameters()], speed=5 if n == "predictor" else 1) for n, m in modules.items() if n != "target"
    ]
    optimizer = torch.optim.Adam(groups, lr=options["lr"], weight_decay=options["weight_decay"], fused=True)
    stepper = training.Stepper(run, optimizer)
    stateful = {"stepper": stepper} | {k: m for k, m in modules.items() if k != "encoder"}
    if state:
        with checkpoints.reading("encoder.pt"):
            for name, value in stateful.items():
                value.load_state_dict(state["training"][name])

    def extra() -> dict:
        return {name: value.state_dict() for name, value in stateful.items()}

    every = batch * max(1, max(total // 50, 2 * batch if options["smoke"] else 5_000) // batch)
    tick = max(1, total // batch // 200)  # some 200 lines in the log
    for images, _ in ds.batches(own, run.device, run.seed, seen, run.rank, run.world, options["workers"]):
        # Set the learning rate, draw two views of each image, and project them.
        run.reseed(seen)
        # The rate in the middle of the batch: that at its start is 0 in the first step.
        part = rate(options["schedule"], seen + batch // 2, total, len(ds), options["half_cosine"])
        stepper.set_rate(options["lr"] * part)
        x = training.to_float(images)
        views = torch.cat([augment(x, options["area"], options["strength"], options["grey"]) for _ in range(2)])
        # Both views in one pass: their batch norms have the same statistics.
        with run.autocast():
            z = encoder.projection(encoder(views))
            p = modules["predictor"](z) if method == "byol" else None
            with torch.no_grad():
                # In training mode, as the encoder is: norms use the batch's statistics, so only weights need averaging.
                t = modules["target"].projection(modules["target"](views)) if method == "byol" else None

        # Compute the loss of the whole batch, over all processes, in fp32.
        outputs = torch.cat((z, t, p)) if method == "byol" else z
        z1, z2, *rest = gather(outputs.float().view(-1, own, z.shape[1]))
        # The log has this bound for all methods; only SimCLR learns from it.
        with torch.set_grad_enabled(method == "simclr"):
            contrast = nt_xent(z1, z2, options["temperature"])
        if method == "simclr":
            loss = contrast
        elif method == "barlow":
            loss = barlow(z1, z2)
        else:
            # White targets: from raw ones the embedding learns only the directions that vary most.
            t1, t2, p1, p2 = rest
            # Nearest neighbours on critters after 48,000 images: 91.0 %, with standardised targets 88.3 %.
            loss = byol(p1, p2, *whiten(torch.cat((t1, t2))).split(batch))

        # Update the weights. The sum of the processes' gradients is wanted, and the stepper takes their mean.
        optimizer.zero_grad(set_to_none=True)
        stepper.step(loss * run.world)
        if method == "byol":
            # BYOL's schedule: the momentum rises to 1, so that the target stands still at the end.
            tau = 1 - (1 - options["tau"]) * 0.5 * (1 + math.cos(math.pi * min(1.0, seen / total)))
            with torch.no_grad():  # else every step hangs another node on the target's weights
                torch._foreach_lerp_(list(modules["target"].parameters()), list(encoder.parameters()), 1 - tau)

        # Count, log, save.
        seen += batch
        log.step(batch)
        log.add(loss=loss, mi_bits=infonce_bits(contrast, batch))
        if seen // batch % tick == 0 or seen >= total:
            log.write(seen, epoch=seen / len(ds), lr=optimizer.param_groups[0]["lr"])
            # Only here: it waits for the device, as the line in the log does.
            training.check_finite([stepper], seen, options)
        stopping = run.stopping(seen // batch)
        if seen // every != (seen - batch) // every or seen >= total or stopping:
            save(seen, extra(), bool(stopping))
            run.wait()
        if stopping:
            raise training.Stopped(stopping, f"stopped and saved at {seen:,} images")
        if seen >= total:
            return seen, extra()


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def first_weights(file: str, options: dict) -> tuple[dict, dict]:
    """Constructor arguments and weights from --init FILE: an `encoder.pt`, or torchvision's ImageNet weights of a ResNet.

    Raises click.ClickException if the file is neither.
    """
    if not Path(file).is_file():
        raise click.ClickException(f"--init {file}: no such file")
    try:
        # A map of a zip: a plain load reads beyond parts that are shorter than their tensors. Old weights are no zips.
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # whatever a damaged or foreign file may provoke
        raise click.ClickException(f"--init {file} cannot be read as weights ({type(error).__name__})") from None
    if isinstance(weights, dict) and "stage" in weights:
        state = checkpoints.load(file, "encoder")
        # Its mean and std stay; a backbone or stem that does not fit is refused where its weights are loaded.
        stem = state["config"]["stem"] if options["stem"] == "auto" else options["stem"]
        return state["config"] | dict(backbone=options["backbone"], stem=stem), state["model"]
    if (
        not isinstance(weights, dict)
        or "conv1.weight" not in weights
        or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) and checkpoints.all_finite(v) for k, v in weights.items()
        )
    ):
        raise click.ClickException(
            f"--init {file} holds neither an encoder.pt nor torchvision's weights of a ResNet, all finite"
        )
    stem = "imagenet" if options["stem"] == "auto" else options["stem"]
    config = dict(backbone=options["backbone"], stem=stem)
    # ImageNet's scale is of pixels in [0, 1]; these networks see [-1, 1].
    config.update(mean=tuple(2 * m - 1 for m in IMAGENET_MEAN), std=tuple(2 * s for s in IMAGENET_STD))
    # The projection, and the batch counters that old files lack, stay our own.
    own = {k: v for k, v in Encoder(**config).state_dict().items() if "projection." in k or "num_batches" in k}
    return config, own | {f"backbone.{k}": v for k, v in weights.items() if not k.startswith("fc.")}


# fmt: off
OPTIONS = [
    click.option("--method",   type=click.Choice(["simclr", "byol", "barlow"]), default="simclr", help="Loss: SimCLR's NT-Xent, BYOL, Barlow Twins."),
    click.option("--backbone", type=click.Choice(["resnet18", "resnet34", "resnet50"]), help="Network.  [default: resnet18; --protocol paper: resnet50]"),
    click.option("--schedule", type=click.Choice(["cosine", "published"]), help="Of the learning rate: a cosine to 0 after a warm-up, or the published one, which ends high.  [default: cosine; --protocol paper: published]"),
    click.option("--stem",     type=click.Choice(["auto", "imagenet", "small"]), help="First layers; imagenet works at a quarter of the image's size, small at the full size "
                 "(15 times the work); auto: small below 64 px on a GPU, else imagenet.  [default: auto; critters, fashion-mnist, --protocol paper: imagenet]"),
    click.option("--lr",       metavar="RATE", type=click.FloatRange(0, 1e6, min_open=True), help="Learning rate of Adam at its highest.  [default: 1e-3; --protocol paper: 3e-4]"),
    click.option("--epochs",   metavar="N", type=click.FloatRange(0, 1e6, min_open=True), help="Passes over the training images.  [default: 200; critters 5; fashion-mnist 0.5; "
                 "other data on a CPU: at most 40,000 images; --protocol paper: always 200]"),
    click.option("--squash/--crop", default=None, help="Squash images to squares without antialiasing, or crop their centre and resize it with antialiasing.  [default: crop; celeba under --protocol paper: squash]"),
    click.option("--train-on-all/--train-on-train", default=None, help="Train on the images of all splits, or of train.  [default: train; celeba under --protocol paper: all]"),
]
# fmt: on


@click.command(cls=training.OneLine, context_settings=dict(max_content_width=120, show_default=True))
@training.with_options(OPTIONS)
def main(**options):
    """Train the encoder (stage 1).

    Writes encoder.pt, encoder.json, stats.jsonl and tensorboard/ to the output folder. The same command again goes on
    where it stopped.
    """
    # Here, not at the top: the network, the losses and the loop need none of these files.
    import dataset
    import layouts
    import ops

    # Resolve the options.
    given = {"epochs": options["epochs"], "batch": options["batch"]}
    preset = layouts.preset_of(options["data"], options["preset"])
    options = training.resolve(PRESETS, PAPER, preset, options)
    if options["smoke"]:
        options["batch"] = given["batch"] or 8
    options["size"] = options["size"] or layouts.DATASETS.get(preset)
    if options["dry_run"]:
        if options["smoke"]:
            options["epochs"] = given["epochs"]  # else four batches, whatever part of the data that is
        print(json.dumps(options, indent=2))
        return

    # Start the device and the processes, open the data.
    run = training.start(options["device"], options["precision"], options["seed"], options["tf32"])
    if options["batch"] % run.world:
        raise click.UsageError(f"--batch {options['batch']} cannot be shared by {run.world} processes: give a multiple")
    outdir = training.out_folder(options)
    path = outdir / "encoder.pt"
    run.first(lambda: checkpoints.check_size(path, "encoder", options))
    how = {name: options[name] for name in ("preset", "squash", "train_on_all")}
    ds = dataset.open_dataset(options["data"], options["size"], most=dataset.most_by_default(run.device), **how)
    val = ds.part("val")
    options["size"] = ds.size
    if len(ds) < options["batch"]:
        if given["batch"]:
            raise click.UsageError(
                f"--batch {options['batch']} is more than the {len(ds)} training images of {options['data']}"
            )
        # Fewer images than a batch: a batch of all of them, as far as the processes can share it evenly.
        options["batch"] = len(ds) // run.world * run.world
    total = max(1, round(options["epochs"] * len(ds)))
    if given["epochs"] is None and run.device.type == "cpu" and options["cpu_images"]:
        total = min(total, options["cpu_images"])
    if options["smoke"] and given["epochs"] is None:
        total = 4 * options["batch"]  # two saves of two batches
    options["epochs"] = total / len(ds)

    # Go on from a checkpoint, or build the network.
    config, weights = dict(backbone=options["backbone"], stem=options["stem"]), None
    if options["init"]:
        config, weights = run.first(lambda: first_weights(options["init"], options))
    if config["stem"] == "auto":
        # small takes too long on a CPU. From 64 px on ImageNet's stem leaves last maps of at least 2x2 pixels.
        config["stem"] = "small" if ds.size < 64 and run.device.type == "cuda" else "imagenet"
    options["stem"] = config["stem"]
    if run.dtype and run.device.type == "cpu":
        if options["precision"] == "auto" and ds.size < 64:
            run.dtype = None  # no slower, and better: 94.5 % by nearest neighbours on critters, against 92.2 in bf16
        elif ds.size < 32 and config["stem"] == "imagenet":
            # The last maps have one pixel, where oneDNN 3.12 leaves a strided 3x3 kernel's 16-bit gradient unset.
            raise click.UsageError(
                f"--stem imagenet on {ds.size} px needs --precision fp32 on a CPU, or take --stem small"
            )
    # A resumed run may be longer or on another device, but these decide what the saved state means.
    keys = ("size", "smoke", "method", "backbone", "stem", "schedule", "lr", "batch", "seed", "preset", "protocol")
    state = run.first(lambda: checkpoints.resume(path, "encoder", options, ds, keys))
    run.agree({"images": ds.fingerprint, "options": {name: options[name] for name in keys}})
    if state:
        with checkpoints.reading(path):
            encoder = Encoder(**state["config"], norm_layer=training.BatchNorm)
            encoder.load_state_dict(state["model"])
    else:
        # Norms over all processes: those of its own images alone would tell a process which views belong together.
        encoder = Encoder(**config, norm_layer=training.BatchNorm)
        if weights:
            checkpoints.init_weights(encoder, weights, options["init"])
    done = state.get("images_seen", 0)
    if done >= total and "results" in state:
        if run.rank == 0:
            print(f"{path} is finished: {done:,} images seen. --epochs for more, --no-resume to start over.")
        return
    if state and not isinstance(state.get("training"), dict):
        raise click.ClickException(f"{path} has no entry 'training' to go on from: {checkpoints.RESUME_REMEDY}")
    encoder.to(run.device, memory_format=torch.channels_last)
    if run.dtype is None:  # in bf16, PyTorch's own are the faster ones
        ops.use_conv2d(encoder)

    def save(seen: int, extra: dict, must: bool = False, **more) -> None:
        if run.rank == 0:
            content = dict(stage="encoder", config=encoder.config, model=encoder.state_dict(), data=ds.info())
            content |= dict(options=options, images_seen=seen, training=extra) | more
            checkpoints.save(path, content, must=must or seen >= total)

    with training.lock(outdir, "encoder", run.rank):
        # Train.
        with training.signals(run):
            if run.rank == 0:
                training.write_options(outdir / "encoder.json", options)
                print(
                    f"{'Resuming' if done else 'Training'} {options['method']} {options['backbone']} on {len(ds):,} images "
                    f"of {ds.size} px, to {total:,} images seen ({total / len(ds):.3g} epochs)",
                    flush=True,  # ahead of the bar, also where both go to a file
                )
            # A run that was stopped between its last save and its evaluation has only that left to do.
            extra = state.get("training")
            with training.Log(outdir, "encoder", total, done, rank=run.rank) as log:
                if done < total:
                    done, extra = train(encoder, ds, run, options, state, total, log, save)

        # Evaluate.
        if run.rank == 0:
            results = evaluate(encoder, ds, val, run, 200 if options["smoke"] else EVALUATED)
            save(done, extra, results=results)
            training.write_options(outdir / "encoder.json", options | {"results": results})
    if run.rank == 0:
        report(results, ds.label_kind)
        print(f"Wrote {path} and {outdir / 'encoder.json'}")


if __name__ == "__main__":
    main()
