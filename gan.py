"""Stage 3: the decoder (mapper and EigenGAN generator), trained against a discriminator and, every n-th iteration,
through the frozen encoder and classifier of stages 1 and 2.

    python gan.py --data afhq --disc patch --loss lsgan --reg-every 4
    torchrun --nproc-per-node 8 gan.py --data afhq

From top to bottom: networks, augmentation, losses, one function per update, the loop, the command, `load`.
With `ops/` beside it this file builds and runs the networks on its own.

Symbols as in the paper: y attributes, eps = r(y, noise) the code given to the generator, z = (z_1..z_k) one small
vector per generator layer, phi = U (L * z_i) + mu the subspace of layer i, x images in [-1, 1].
"""

import copy
import functools
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ops import bias_lrelu, conv2d, conv_transpose2d, no_weight_gradients, subspace_lrelu

NOISE = 512  # width of the mapper's noise and of eps
BASIS = 6  # basis vectors of a subspace
R1_EVERY = 16  # iterations
EMA_HALF_LIFE = 10_000  # images
LOG_EVERY = 2_000  # images

# Published: AFHQ at 256 px and CelebA at 128 px, 200,000 iterations. The row '' serves any other data.
# r1 None: 10 (size / 256)^1/2, for patches 10 (size / 256)^2: at 10 the discriminators of small images are flat, the
# global one learns slowly, the patches' does not hold the generator back from saturated colours.
PRESETS = {
    "":              dict(batch=32, lr=1e-4, kimg=200.0,   snap=50.0,  augment="color,translation,cutout", r1=None, reg_clip=True),
    "critters":      dict(batch=16, lr=5e-4, kimg=60.0,    snap=10.0,  augment="none"),
    "fashion-mnist": dict(batch=16, lr=5e-4, kimg=60.0,    snap=10.0,  augment="none"),
    "afhq":          dict(kimg=6400.0,  snap=200.0, r1=10.0, reg_clip=False),
    "celeba":        dict(batch=64, kimg=12800.0, snap=200.0, r1=10.0, reg_clip=False),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Decoder: mapper r(eps | y, noise), then generator G(eps, z).


def channels_at(size: int, resolution: int) -> int:
    """Channels of a map: 16 at full size, doubling toward 4x4, at most 512."""
    return min(16 * size // resolution, 512)


def full(x: Tensor) -> Tensor:
    """x in at least single precision: out of an autocast network, before tanh and the losses."""
    return x if x.dtype == torch.float64 else x.float()


def he_init(network: nn.Module) -> None:
    """Start every convolution and linear layer at He et al.'s scale, biases at 0, so that signals keep their size.

    From torch's default scale a generator's first images are hundreds of times fainter, and stay so for many steps.
    A transposed convolution (3x3, stride 2) starts as bilinear upsampling, so that the first images are smooth.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            up = isinstance(layer, nn.ConvTranspose2d)
            inputs = layer.in_channels if up else layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=(2 / 1.04 / inputs) ** 0.5)
            if up:
                tent = torch.tensor([0.5, 1.0, 0.5])
                layer.weight.data = layer.weight.data[:, :, :1, :1] * tent[:, None] * tent
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Subspace(nn.Module):
    """phi = U (L * z) + mu (EigenGAN, eq. 1): `basis` orthonormal maps U [basis, r, r, C], importances L, origin mu.

    U starts smooth (no finer than 4x4), random and orthonormal.

    orthonormal: keep U orthonormal by construction (Gram-Schmidt, differentiable) instead of by a penalty.
    """

    def __init__(self, channels: int, resolution: int, basis: int = BASIS, orthonormal: bool = False):
        super().__init__()
        self.U = nn.Parameter(torch.empty(basis, resolution, resolution, channels))  # NHWC: maps come out channels_last
        self.L = nn.Parameter(3.0 * torch.arange(basis, 0, -1))
        self.mu = nn.Parameter(torch.zeros(resolution, resolution, channels))
        self.orthonormal = orthonormal
        smooth = F.interpolate(torch.randn(basis, channels, 4, 4), size=resolution, mode="bilinear")
        U = torch.linalg.qr(smooth.permute(0, 2, 3, 1).flatten(1).T)[0].T
        self.U.data.copy_(U.reshape(self.U.shape))

    def basis(self) -> Tensor:
        """U as it is used: [basis, r, r, C], in full precision."""
        if not self.orthonormal:
            return self.U
        with torch.autocast(self.U.device.type, enabled=False):
            U = self.U.flatten(1)
            R = torch.linalg.cholesky_ex(U @ U.T).L  # cholesky would wait for the device to check
            return torch.linalg.solve_triangular(R, U, upper=False).view_as(self.U)

    def gram(self) -> Tensor:
        """U U^T [basis, basis], in full precision."""
        with torch.autocast(self.U.device.type, enabled=False):
            U = self.basis().flatten(1)
            return U @ U.T

    def maps(self) -> Tensor:
        """The scaled basis and the origin, [basis + 1, C, r, r]: phi of z is their sum weighted by (z, 1)."""
        return torch.cat((self.L.view(-1, 1, 1, 1) * self.basis(), self.mu[None])).permute(0, 3, 1, 2)


class EigenBlock(nn.Module):
    """One generator layer: [B, C, r, r] -> [B, C', 2r, 2r], adding its subspace phi before and after upsampling.

    Both convolutions of phi are linear, so they are applied to the basis (7 maps) instead of to the batch, and
    `subspace_lrelu` mixes their results.
    """

    def __init__(self, in_channels: int, out_channels: int, resolution: int, orthonormal: bool = False):
        super().__init__()
        self.up = up = dict(stride=2, padding=1, output_padding=1)
        self.subspace = Subspace(in_channels, resolution, orthonormal=orthonormal)
        self.subspace_conv1 = nn.Conv2d(in_channels, in_channels, 1)
        self.feature_conv1 = nn.ConvTranspose2d(in_channels, out_channels, 3, **up)
        self.subspace_conv2 = nn.ConvTranspose2d(in_channels, out_channels, 3, **up)
        self.feature_conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def convolve(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Both subspace convolutions without bias: [K, C, r, r] -> [K, C, r, r], [K, C', 2r, 2r]."""
        return F.conv2d(maps, self.subspace_conv1.weight), conv_transpose2d(maps, self.subspace_conv2.weight, **self.up)

    def forward(
        self, h: Tensor, bias: Tensor | float, z: Tensor, convolved: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """h [B, C, r, r] (written over) yet without its bias [C] or 0, z [B, 6] -> [B, C', 2r, 2r] without its bias.

        convolved: the maps of `convolve`, if kept. Biases go into the fused op: one pass less each way.
        """
        coef = F.pad(z, (0, 1), value=1.0)
        if convolved is None:
            maps = self.subspace.maps()
            if len(z) < len(maps):  # a small batch: fewer phi than basis maps
                maps = torch.einsum("bk,kchw->bchw", coef, maps).contiguous(memory_format=torch.channels_last)
                coef = torch.eye(len(z), dtype=z.dtype, device=z.device)
            convolved = self.convolve(maps)
        h = subspace_lrelu(h, coef, convolved[0], self.subspace_conv1.bias + bias, inplace=True)
        h = conv_transpose2d(h, self.feature_conv1.weight, **self.up)
        h = subspace_lrelu(h, coef, convolved[1], self.subspace_conv2.bias + self.feature_conv1.bias, inplace=True)
        return conv2d(h, self.feature_conv2.weight, padding=1)


class Generator(nn.Module):
    """G(eps [B, 512], z [B, layers, 6]) -> x [B, 3, size, size] float32 in [-1, 1] (EigenGAN, He et al. 2021)."""

    def __init__(self, size: int, orthonormal: bool = False):
        super().__init__()
        self.size = size
        resolutions = [4 * 2**i for i in range(int(math.log2(size)) - 2)]
        self.first = nn.Linear(NOISE, 16 * channels_at(size, 4))
        self.blocks = nn.ModuleList(
            EigenBlock(channels_at(size, r), channels_at(size, 2 * r), r, orthonormal) for r in resolutions
        )
        self.blocks[-1].feature_conv2.register_parameter("bias", None)  # goes into the fused op instead
        self.last_bias = nn.Parameter(torch.zeros(channels_at(size, size)))
        self.last = nn.Conv2d(channels_at(size, size), 3, 7, padding=3)

    def convolved(self) -> list[tuple[Tensor, Tensor]]:
        """The convolved basis maps of every layer: they depend on the weights alone, so generation keeps them."""
        return [block.convolve(block.subspace.maps()) for block in self.blocks]

    def forward(self, eps: Tensor, z: Tensor, convolved: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        h = self.first(eps).view(len(eps), 4, 4, -1).permute(0, 3, 1, 2).clone()  # no view: the blocks write over it
        bias = 0.0
        for i, block in enumerate(self.blocks):
            h = block(h, bias, z[:, i], convolved[i] if convolved else None)
            bias = block.feature_conv2.bias
        h = bias_lrelu(h, self.last_bias, inplace=True)
        # As the transpose of a convolution of images: conv_transpose2d knows how to fill vectors with three channels.
        x = conv_transpose2d(h, self.last.weight.flip(2, 3).transpose(0, 1), self.last.bias, padding=3)
        return torch.tanh(full(x))


class Decoder(nn.Module):
    """Mapper r(eps | y, noise) and generator G(eps, z); labels=0 is the vanilla EigenGAN, eps = noise."""

    def __init__(self, size: int, labels: int, orthonormal: bool = False):
        super().__init__()
        self.embed = nn.Linear(labels, labels) if labels else None
        self.mapper = nn.Linear(labels + NOISE, NOISE) if labels else None
        self.generator = Generator(size, orthonormal)
        he_init(self)
        self.generator.last.weight.data.mul_(0.5)  # keeps tanh out of saturation

    @property
    def latent_width(self) -> int:
        """Standard normal numbers that one image takes: its noise, then its z of every layer."""
        return NOISE + len(self.generator.blocks) * BASIS

    def forward(self, y: Tensor | None, latents: Tensor, convolved: list | None = None) -> Tensor:
        """y [B, labels] float (None if labels=0), latents [B, latent_width] -> x [B, 3, size, size] in [-1, 1]."""
        eps, z = latents.split((NOISE, self.latent_width - NOISE), dim=1)
        if self.mapper is not None:
            eps = self.mapper(torch.cat((self.embed(y), eps), dim=1))
        return self.generator(eps, z.unflatten(1, (-1, BASIS)), convolved)

    def orthogonality(self) -> Tensor:
        """Mean over layers of mean((U U^T - I)^2): 0 where every basis is orthonormal."""
        eye = torch.eye(BASIS, device=self.generator.last_bias.device)
        return torch.stack([(b.subspace.gram() - eye).square().mean() for b in self.generator.blocks]).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Discriminators. Each has `batch_statistics`: whether an image's score depends on the others of its batch.


def by_ops(network: nn.Module) -> nn.Module:
    """The network, its usual convolutions computed by `conv2d`."""
    for layer in network.modules():
        if type(layer) is nn.Conv2d:
            options = dict(weight=layer.weight, bias=layer.bias, stride=layer.stride[0], padding=layer.padding[0])
            layer.forward = functools.partial(conv2d, **options)
    return network


class ConvLrelu(nn.Conv2d):
    """Convolution whose bias goes into the fused bias + leaky ReLU (slope 0.2)."""

    def forward(self, x: Tensor) -> Tensor:
        x = conv2d(x, self.weight, None, self.stride[0], self.padding[0])
        return bias_lrelu(x, self.bias, inplace=True)


class ConvNormLrelu(nn.Module):
    """Convolution 4x4, batch norm, leaky ReLU; the norm's shift goes into the fused bias + leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 4, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        x = conv2d(x, self.conv.weight, None, self.conv.stride[0], padding=1)
        x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, None, n.training, n.momentum, n.eps)
        return bias_lrelu(x, n.bias, inplace=True)


class GlobalDiscriminator(nn.Module):
    """x [B, 3, size, size] -> one logit an image, [B, 1]. Convolutions down to 4x4, as in EigenGAN."""

    batch_statistics = False

    def __init__(self, size: int):
        super().__init__()
        widths = [min(16 * 2**i, 512) for i in range(int(math.log2(size)) - 1)]
        layers: list[nn.Module] = [ConvLrelu(3, widths[0], 7, padding=3)]
        for C, wider in itertools.pairwise(widths):
            layers += [ConvLrelu(C, C, 3, padding=1), ConvLrelu(C, wider, 3, 2, padding=1)]
        self.features = nn.Sequential(*layers, ConvLrelu(widths[-1], widths[-1], 3, padding=1))
        self.hidden = nn.Linear(widths[-1] * 16, widths[-1], bias=False)
        self.hidden_bias = nn.Parameter(torch.zeros(widths[-1]))
        self.score = nn.Linear(widths[-1], 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.hidden(self.features(x).flatten(1))
        return full(self.score(bias_lrelu(h, self.hidden_bias, inplace=True)))


class PatchDiscriminator(nn.Module):
    """x [B, 3, size, size] -> a logit for each overlapping 70x70 patch, [B, 1, h, w] (pix2pix, Isola et al. 2017)."""

    batch_statistics = True

    def __init__(self, size: int):
        super().__init__()
        if size < 32:
            raise click.UsageError(f"--disc patch needs images of at least 32 px, not {size}: use --disc global")
        self.layers = nn.Sequential(
            ConvLrelu(3, 64, 4, 2, padding=1),
            ConvNormLrelu(64, 128, stride=2),
            ConvNormLrelu(128, 256, stride=2),
            ConvNormLrelu(256, 512, stride=1),
            nn.Conv2d(512, 1, 4, 1, 1),
        )

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return full(self.layers(x))


class PerClass(nn.Module):
    """D(x | y) of section 2.3: one discriminator for each class; y one-hot [B, classes] chooses who scores an image."""

    def __init__(self, discriminators: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(discriminators)
        self.batch_statistics = self.members[0].batch_statistics

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        rows = [mask.nonzero().squeeze(1) for mask in y.bool().unbind(1)]
        scores = [D(x[r]) for D, r in zip(self.members, rows, strict=True) if len(r)]
        return torch.cat(scores)[torch.cat(rows).argsort()]


def build_discriminator(kind: str, size: int, classes: int = 0) -> nn.Module:
    """kind 'global' or 'patch'; classes > 0: one discriminator a class."""
    make = {"global": GlobalDiscriminator, "patch": PatchDiscriminator}[kind]
    D = PerClass([make(size) for _ in range(classes)]) if classes else make(size)
    he_init(D)
    return D


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation of the discriminator's inputs (Zhao et al. 2020, "Differentiable augmentation"), in fp32.


def augment(x: Tensor, policy: str, p: float = 0.6) -> Tensor:
    """Brightness, saturation, contrast, translation by up to 1/8 and a cutout of 1/2, differentiable to any order.

    x [B, 3, H, W] in [-1, 1] (colours may leave it) -> same shape, contiguous or channels_last.
    policy: comma list of color, translation, cutout, or 'none'.
    Each of the five is applied to the whole batch or not, with probability p; its strength is drawn for each image.
    """
    names = [] if policy == "none" else policy.split(",")
    B, _, H, W = x.shape
    coins = (torch.rand(5) < p).tolist()  # on the CPU: no synchronisation
    u = torch.rand(7, B, 1, 1, 1, device=x.device, dtype=x.dtype)
    if "color" in names:
        if coins[0]:
            x = x + (u[0] - 0.5)
        if coins[1]:
            grey = x.mean(dim=1, keepdim=True)
            x = (x - grey) * (2 * u[1]) + grey
        if coins[2]:
            mean = x.mean(dim=(1, 2, 3), keepdim=True)
            x = (x - mean) * (u[2] + 0.5) + mean
    rows = torch.arange(H, device=x.device)
    columns = torch.arange(W, device=x.device)
    if "translation" in names and coins[3]:
        # A shift is a product with a 0/1 matrix: exact, batched, and its gradient needs no scatter.
        down, right = (((2 * (s // 8) + 1) * u).floor() - s // 8 for s, u in ((H, u[3]), (W, u[4])))
        shift_rows = (rows - down == rows[:, None]).to(x.dtype).transpose(2, 3)
        shift_columns = (columns - right == columns[:, None]).to(x.dtype)
        x = shift_rows @ x @ shift_columns
    if "cutout" in names and coins[4]:
        top = ((H + 1 - H // 2 % 2) * u[5]).floor() - H // 4
        left = ((W + 1 - W // 2 % 2) * u[6]).floor() - W // 4
        inside = ((rows >= top) & (rows < top + H // 2)).transpose(2, 3) & (columns >= left) & (columns < left + W // 2)
        x = x * ~inside
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Losses. Scores are logits of any shape; every loss is a mean.


def loss_d(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator loss: hinge (Lim & Ye 2017), ns (Goodfellow et al. 2014) or lsgan (Mao et al. 2017, a=0, b=1)."""
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "ns":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    return 0.5 * (real - 1).square().mean() + 0.5 * fake.square().mean()


def loss_g(kind: str, fake: Tensor) -> Tensor:
    """Generator loss that goes with `loss_d` (lsgan: c=1)."""
    if kind == "hinge":
        return -fake.mean()
    if kind == "ns":
        return F.softplus(-fake).mean()
    return 0.5 * (fake - 1).square().mean()


def loss_y(kind: str, logits: Tensor, y: Tensor) -> Tensor:
    """H(Y | E) of eq. 5 in nats, mean over images: cross-entropy, or the sum of an image's binary cross-entropies."""
    if kind == "one-hot":
        return F.cross_entropy(full(logits), y)
    return F.binary_cross_entropy_with_logits(full(logits), y, reduction="sum") / len(y)


def entropy_bits(labels: Tensor) -> float:
    """H(Y) in bits of the empirical joint distribution of the rows of `labels` [N, Y]."""
    p = torch.unique(labels, dim=0, return_counts=True)[1].double() / len(labels)
    return float(-(p * p.log2()).sum())


# ---------------------------------------------------------------------------------------------------------------------
# The updates of one iteration. Each returns its loss; the loop steps the optimisers.


def r1_penalty(D: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
    """E ||grad_x sum D(x)||^2 on the (augmented) real images x (Mescheder et al. 2018, without their 1/2)."""
    x = x.detach().requires_grad_()
    with no_weight_gradients():
        (gradient,) = torch.autograd.grad(D(x, y).sum(), x, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def scores_real_fake(D: nn.Module, real: Tensor, fake: Tensor, y_real: Tensor, y_fake: Tensor) -> tuple[Tensor, Tensor]:
    """D on both: in one pass, unless batch statistics would then mix them."""
    # In the weights' format: the first convolution's gradient by its weights would else turn that of its whole output.
    real, fake = (x.contiguous(memory_format=torch.channels_last) for x in (real, fake))
    if D.batch_statistics:
        return D(real, y_real), D(fake, y_fake)
    y = None if y_real is None else torch.cat((y_real, y_fake))
    return D(torch.cat((real, fake)), y).chunk(2)


def gradient_norm(network: nn.Module) -> Tensor:
    """Euclidean norm of the gradient that the last backward left."""
    return torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])


class Trainer:
    """Networks, optimisers and label distribution of one run, and its four updates.

    `regularise`, `discriminate`, `penalise` (R1) and `generate` each draw their own latents, run forward and backward
    and step their optimiser; they return device scalars for the log and do not synchronise (but for
    --per-class, which must know whose images are whose).
    """

    def __init__(self, options: dict, run, labels: Tensor | None, kind: str, encoder=None, classifier=None):
        self.options, self.run, self.kind = options, run, kind
        self.encoder, self.classifier = encoder and by_ops(encoder), classifier
        self.labels = None if labels is None else labels.to(run.device)
        self.labels_mean = None if labels is None else self.labels.mean(dim=0)
        self.entropy = 0.0  # H(Y) of the y that are drawn, in bits
        if options["sample_y"] == "independent":
            p = self.labels_mean.double()
            self.entropy = float(torch.special.entr(torch.stack((p, 1 - p))).sum() / math.log(2))
        elif labels is not None:
            self.entropy = entropy_bits(labels)
        torch.manual_seed(run.seed)  # the same weights in every process
        width = 0 if labels is None else labels.shape[1]
        nets = (
            Decoder(options["size"], width, options["orth"] == "exact"),
            build_discriminator(options["disc"], options["size"], width if options["per_class"] else 0),
        )
        self.decoder, self.D = (n.to(run.device, memory_format=torch.channels_last) for n in nets)
        if width and not self.D.batch_statistics:
            # From the start, eps follows y about as much as the 512 numbers of the noise. Not against patches: their
            # batch norm hides colours, which the regularisation would then drive into saturation.
            self.decoder.mapper.weight.data[:, :width].mul_((NOISE / 3) ** 0.5)
        self.ema = copy.deepcopy(self.decoder).requires_grad_(False).eval()
        adam = dict(lr=options["lr"], betas=(0.5, 0.99), fused=True)
        self.opt_g = torch.optim.Adam(self.decoder.parameters(), **adam)
        self.opt_d = torch.optim.Adam(self.D.parameters(), **adam)
        self.scaler_g, self.scaler_d = run.scaler(), run.scaler()
        self.batch = options["batch"] // run.world

    def draw_y(self, n: int) -> Tensor | None:
        """Labels to generate for: rows of the training labels, or each attribute on its own at its rate."""
        if self.labels is None:
            return None
        if self.options["sample_y"] == "independent":
            return (torch.rand(n, len(self.labels_mean), device=self.run.device) < self.labels_mean).float()
        return self.labels[torch.randint(len(self.labels), (n,), device=self.run.device)]

    def fake(self) -> tuple[Tensor, Tensor | None]:
        """A batch of generated images and the labels they were generated for."""
        y = self.draw_y(self.batch)
        latents = torch.randn(self.batch, self.decoder.latent_width, device=self.run.device)
        with self.run.autocast():
            return self.decoder(y, latents), y

    def drop_gradients(self) -> None:
        """Each update begins with it: the last one's gradients would lie beside its activations, where memory peaks."""
        self.opt_g.zero_grad(set_to_none=True)
        self.opt_d.zero_grad(set_to_none=True)

    def step(self, loss: Tensor, network: nn.Module, optimiser, scaler, limit: Tensor | None = None) -> None:
        """Backward and one step of the optimiser; a gradient of a norm above `limit` is scaled to it."""
        scaler.scale(loss).backward()
        self.run.average_gradients(network.parameters())
        scaler.unscale_(optimiser)
        if limit is not None:
            limit = limit.nan_to_num(0.0, 0.0).clamp(min=1e-12)  # fp16: an update that overflowed gives no measure
            torch.nn.utils.clip_grads_with_norm_(network.parameters(), 1.0, gradient_norm(network) / limit)
        scaler.step(optimiser)
        scaler.update()

    def classify_loss(self, x: Tensor, y: Tensor) -> Tensor:
        with self.run.autocast():
            logits = self.classifier(self.encoder(x))
        return loss_y(self.kind, logits, y)

    def regularise(self, limit: Tensor | None = None) -> Tensor:
        """Classification regularisation, eqs. 4-5, as an update of its own; returns H(Y | E) in nats.

        limit: of the gradient's norm; with --reg-clip n times the adversarial gradient's, so that over n iterations the
        two weigh the same. The encoder's gradient can be a hundred times the discriminator's, and in the second moments
        of their common Adam it would all but stop the adversarial game.
        """
        self.drop_gradients()
        x, y = self.fake()
        loss = self.classify_loss(x, y)
        self.step(loss, self.decoder, self.opt_g, self.scaler_g, limit)
        return loss

    def discriminate(self, real: Tensor, y_real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """One update of D; returns its loss and its scores of real and fake."""
        self.drop_gradients()
        with torch.no_grad():
            fake, y_fake = self.fake()
        real, fake = augment(real, self.options["augment"]), augment(fake, self.options["augment"])
        with self.run.autocast():
            score_real, score_fake = scores_real_fake(self.D, real, fake, y_real, y_fake)
        loss = loss_d(self.options["loss"], score_real, score_fake)
        self.step(loss, self.D, self.opt_d, self.scaler_d)
        return loss, score_real.detach(), score_fake.detach()

    def penalise(self, real: Tensor, y_real: Tensor | None) -> Tensor:
        """Lazy R1: its own forward, in fp32, and its own step of D's optimiser; returns E ||grad D||^2."""
        self.drop_gradients()
        penalty = r1_penalty(self.D, augment(real, self.options["augment"]), y_real)
        self.step(self.options["r1"] * penalty, self.D, self.opt_d, self.scaler_d)
        return penalty

    def generate(self, joint: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """One update of the decoder; joint: with the classification term.

        Returns the adversarial loss, the penalty on U and the classification loss.
        """
        self.drop_gradients()
        self.D.requires_grad_(False)
        x, y = self.fake()
        augmented = augment(x, self.options["augment"])
        with self.run.autocast():
            score = self.D(augmented, y)
        adversarial = loss_g(self.options["loss"], score)
        orthogonality = self.decoder.orthogonality()
        classification = self.classify_loss(x, y) if joint else None
        loss = adversarial + (100 * orthogonality if self.options["orth"] == "penalty" else 0)
        self.step(loss + (classification if joint else 0), self.decoder, self.opt_g, self.scaler_g)
        self.D.requires_grad_(True)
        return adversarial, orthogonality, classification

    @torch.no_grad()
    def average(self, images: int) -> None:
        """Exponential moving average of the decoder's weights after `images` images.

        Its half-life is EMA_HALF_LIFE images, or a fortieth of those seen, so that short runs forget their start too.
        """
        decay = 0.5 ** (self.options["batch"] / min(EMA_HALF_LIFE, images / 40))
        update = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
        update(list(self.ema.parameters()), list(self.decoder.parameters()), None)

    def iteration(self, i: int, real: Tensor, y_real: Tensor | None) -> dict[str, Tensor]:
        """One iteration on a batch of real images in [-1, 1] and their labels; returns scalars for the log."""
        o = self.options
        regularised = self.labels is not None and o["reg_every"] > 0 and i % o["reg_every"] == 0
        stats = {}
        stats["loss_d"], score_real, score_fake = self.discriminate(real, y_real)
        if o["loss"] == "ns":  # eqs. 6-7: a discriminator bounds the Jensen-Shannon divergence from below, in bits
            stats["jsd_bound"] = 1 - loss_d("ns", score_real, score_fake) / 2 / math.log(2)
        stats["score_real"], stats["score_fake"] = score_real.mean(), score_fake.mean()
        if o["r1"] > 0 and i % R1_EVERY == 0:
            stats["r1"] = self.penalise(real, y_real)
        joint = regularised and o["reg_mode"] == "joint"
        stats["loss_g"], stats["orthogonality"], classification = self.generate(joint)
        if regularised and not joint:
            limit = gradient_norm(self.decoder) * o["reg_every"] if o["reg_clip"] else None
            classification = self.regularise(limit)
        if regularised:
            stats["H_y_given_e"] = classification
            # Eq. 4: a lower bound on I(Y; E) through the generated images, at most H(Y)
            stats["mi_bits"] = self.entropy - stats["H_y_given_e"] / math.log(2)
        self.average((i + 1) * o["batch"])
        return stats

    def state(self) -> dict:
        """Everything that changes in training."""
        names = "decoder", "D", "ema", "opt_g", "opt_d", "scaler_g", "scaler_d"
        return {name: getattr(self, name).state_dict() for name in names}

    def load_state(self, state: dict) -> None:
        """Go on from `state()`."""
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)


# ---------------------------------------------------------------------------------------------------------------------
# What metrics and pictures work with: a trained run, rebuilt from gan.pt alone.


@dataclass
class Network:
    """The averaged decoder of a run with its frozen encoder and classifier (None where the run had none)."""

    decoder: Decoder
    encoder: nn.Module | None
    classifier: nn.Module | None
    data: dict  # what the images were: source, size, label names and kind, splits
    label_names: list[str]
    label_kind: str  # 'one-hot', 'multi-label' or 'none'
    real_labels: Tensor | None  # float32 [N, Y]: the labels of the training images
    size: int
    images_seen: int
    options: dict
    convolved: list

    @property
    def labels(self) -> int:
        """Number of labels Y, 0 if unconditional."""
        return len(self.label_names)

    @property
    def generator(self) -> Generator:
        return self.decoder.generator

    def latents(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal latents [len(seeds), width], each drawn from its own seed alone, on the CPU."""
        width = self.decoder.latent_width
        return torch.stack([torch.randn(width, generator=torch.Generator().manual_seed(s)) for s in seeds])

    @torch.inference_mode()
    def decode(self, y: Tensor | None, latents: Tensor) -> Tensor:
        """y float [B, Y] or None, latents [B, width] -> x [B, 3, size, size] float32 in [-1, 1]."""
        device = self.generator.last_bias.device
        return self.decoder(None if y is None else y.to(device), latents.to(device), self.convolved)

    def generate(self, y: Tensor | None, seeds: Sequence[int], truncation: float = 1.0) -> Tensor:
        """Images for the rows of y [B, Y] (None if unconditional), each from its own seed and y only.

        truncation scales the latents: below 1 more typical, less varied. Returns [B, 3, size, size] in [-1, 1].
        """
        return self.decode(y, truncation * self.latents(seeds))


def load(path: str | Path, device: str | torch.device = "cpu") -> Network:
    """Rebuild a run's networks from its gan.pt, frozen and in eval mode, on `device`.

    Raises click.ClickException if the file is missing or is not one of gan.py's checkpoints.
    """
    import classifier as classifier_stage
    import encoder as encoder_stage
    import training

    device = training.choose_device(device)
    state = training.load(path, "gan")
    data, labels = state["data"], state["labels"]
    names = data["label_names"] if labels else []
    decoder = Decoder(data["size"], len(names), state["options"]["orth"] == "exact")
    decoder.load_state_dict(state["ema"])
    decoder.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    encoder = encoder_stage.build(state["encoder"]).to(device) if state["encoder"] else None
    classifier = classifier_stage.build(state["classifier"]).to(device) if state["classifier"] else None
    with torch.inference_mode():
        convolved = decoder.generator.convolved()
    return Network(
        decoder, encoder, classifier, data, names, data["label_kind"] if labels else "none",
        labels["rows"].float().repeat_interleave(labels["counts"], dim=0) if labels else None,
        data["size"], state["images_seen"], state["options"], convolved,
    )  # fmt: skip


def grid(images: Tensor, columns: int) -> np.ndarray:
    """x [N, 3, H, W] in [-1, 1] -> one uint8 picture [rows * H, columns * W, 3], filled row by row."""
    N, _, H, W = images.shape
    tiles = images.mul(127.5).add(128).clamp(0, 255).byte().cpu().permute(0, 2, 3, 1)
    tiles = torch.cat((tiles, tiles.new_full((-N % columns, H, W, 3), 255)))
    return tiles.view(-1, columns, H, W, 3).permute(0, 2, 1, 3, 4).reshape(-1, columns * W, 3).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def save_grid(trainer: Trainer, path: Path, y: Tensor | None, latents: Tensor) -> np.ndarray:
    """Write the averaged decoder's images for fixed labels and latents, 8 a row."""
    with torch.inference_mode():
        picture = grid(trainer.ema(y, latents), columns=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return picture


def grid_inputs(trainer: Trainer, seed: int) -> tuple[Tensor | None, Tensor]:
    """Labels and latents of the 64 images of the grid: a row has one label, a column one latent where y is one-hot."""
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randn(64, trainer.decoder.latent_width, generator=draw)
    y = None
    if trainer.kind == "one-hot":
        classes = trainer.labels.shape[1]
        rows = min(classes, 8)
        y, latents = torch.eye(classes)[:rows].repeat_interleave(8, dim=0), latents[:8].repeat(rows, 1)
    elif trainer.kind == "multi-label":
        rows = torch.randint(len(trainer.labels), (8,), generator=draw)
        y = trainer.labels.cpu()[rows].repeat_interleave(8, dim=0)
    return None if y is None else y.to(trainer.run.device), latents.to(trainer.run.device)


def earlier_stages(outdir: Path, needed: bool) -> tuple[dict | None, dict | None]:
    """The checkpoints of stages 1 and 2 in the run's folder, checked to belong together."""
    import training

    if not needed and not (outdir / "encoder.pt").exists():
        return None, None
    encoder = training.load(outdir / "encoder.pt", "encoder")
    if not needed:
        return encoder, None
    classifier = training.load(outdir / "classifier.pt", "classifier", finished=True)
    if classifier["encoder_hash"] != training.fingerprint(encoder["model"]):
        raise click.ClickException(
            f"{outdir}/classifier.pt belongs to another encoder than {outdir}/encoder.pt: run classifier.py again"
        )
    return encoder, classifier


# Options that a resumed run may change.
FREE = {"data", "kimg", "snap", "outdir", "precision", "device", "workers", "resume", "init", "dry_run"}


def train(options: dict) -> None:
    """Run stage 3 with the command's resolved options."""
    import classifier as classifier_stage
    import dataset
    import encoder as encoder_stage
    import training

    smoke = {"batch": 8, "kimg": 0.256, "snap": 0.128} if options["smoke"] else {}
    options |= {name: value for name, value in smoke.items() if options[name] is None}
    clip = options["reg_clip"]
    options = training.by_data(PRESETS, options["data"], options)
    for bad, why in (
        (options["per_class"] and options["unconditional"], "--per-class needs labels, --unconditional has none"),
        (options["unconditional"] and options["reg_mode"] == "joint", "--reg-mode joint needs labels"),
        (options["unconditional"] and options["sample_y"] == "independent", "--sample-y needs labels"),
        (clip and options["reg_mode"] == "joint", "--reg-clip limits a regularisation of its own, not a joint one"),
        (set(options["augment"].split(",")) - {"color", "translation", "cutout", "none"},
         f"--augment {options['augment']}: choose from color, translation, cutout, separated by commas, or none"),
    ):  # fmt: skip
        if bad:
            raise click.UsageError(why)
    outdir = training.out_folder(options)
    if options["dry_run"]:
        return click.echo(json.dumps(options, indent=2))

    # Set up the device, the earlier stages and the data.
    run = training.start(options["device"], options["precision"], options["seed"])
    if options["batch"] % run.world:
        raise click.UsageError(f"--batch {options['batch']} must be a multiple of the {run.world} processes")
    conditional = not options["unconditional"]
    stage1, stage2 = earlier_stages(outdir, conditional)
    size = options["size"] or (stage1["data"]["size"] if stage1 else None)
    attributes = stage2["data"]["attributes"] if stage2 else None
    internal = stage2 is not None and "assignments" in stage2
    data = dataset.open_dataset(options["data"], size, "train")
    remedy = "give the same --data and --size to all stages, or run the earlier stages again"
    for stage, file in ((stage1, "encoder.pt"), (stage2, "classifier.pt")):
        if stage:
            training.check_same(stage["data"], data.info(), ("fingerprint", "size"), outdir / file, remedy)
    if stage2:
        if internal:  # internal attributes: y is the cluster of an image's embedding
            clusters = stage2["data"]["label_names"]
            data.labels = np.eye(len(clusters), dtype=np.float32)[stage2["assignments"]["train"].numpy()]
            data.label_names, data.label_kind, data.attributes = clusters, "one-hot", attributes
        else:
            data = data.part("train", attributes)
    kind = data.label_kind if conditional else "none"
    if kind == "multi-label" and options["per_class"]:
        raise click.UsageError(
            "--per-class: images with several attributes belong to no single class; use one-hot labels"
        )
    if kind != "multi-label" and options["sample_y"] == "independent":
        raise click.UsageError("--sample-y independent needs several attributes; one-hot labels have one distribution")
    options |= {"size": data.size, "attributes": attributes}
    if options["r1"] is None:
        options["r1"] = 10 * (data.size / 256) ** (2 if options["disc"] == "patch" else 0.5)

    # Build the networks.
    encoder = encoder_stage.build(stage1).to(run.device, memory_format=torch.channels_last) if stage2 else None
    classifier = classifier_stage.build(stage2).to(run.device) if stage2 else None
    labels = torch.from_numpy(np.asarray(data.labels)) if conditional else None
    trainer = Trainer(options, run, labels, kind, encoder, classifier)

    # Take first weights from another run, or go on from this one's checkpoint.
    checkpoint, images, iteration = outdir / "gan.pt", 0, 0
    if options["init"]:
        start = training.load(options["init"], "gan")
        training.init_weights(trainer.decoder, start["ema"], options["init"])
        trainer.ema.load_state_dict(trainer.decoder.state_dict())
        same = all(start["options"][key] == options[key] for key in ("disc", "per_class"))
        if same and "trainer" in start:  # numbered snapshots leave the discriminator out
            training.init_weights(trainer.D, start["trainer"]["D"], options["init"])
    if options["resume"] and checkpoint.exists():
        state = training.load(checkpoint, "gan")
        remedy = "give the same options, or start over with --no-resume or another --outdir"
        keys = sorted(options.keys() - FREE) + ["init"] * bool(options["init"])
        training.check_same(state["options"], options, keys, checkpoint, remedy)
        training.check_same(state["data"], data.info(), ("fingerprint",), checkpoint, remedy)
        for name, stage in (("encoder", stage1), ("classifier", stage2)):
            theirs, ours = (s and training.fingerprint(s["model"]) for s in (state[name], stage))
            if theirs and ours and theirs != ours:
                raise click.ClickException(f"{checkpoint} was trained with another {name}.pt: {remedy}")
        trainer.load_state(state["trainer"])
        images, iteration = state["images_seen"], state["iteration"]
    total = max(1, round(1000 * options["kimg"]))
    if images >= total:
        if run.rank == 0:
            click.echo(f"{checkpoint} has seen {images} images already: more with --kimg, over again with --no-resume")
        return

    # Train.
    if run.rank == 0:
        training.make_folder(outdir)
    log = training.Log(outdir, "gan", total, images, rank=run.rank)
    if run.rank == 0:
        training.write_options(outdir / "gan.json", options)
    rows, counts = torch.unique(labels, dim=0, return_counts=True) if conditional else (None, None)
    frozen = {
        "stage": "gan", "data": data.info(), "options": options, "entropy_bits": trainer.entropy,
        "labels": {"rows": rows.byte(), "counts": counts} if conditional else None,
        "encoder": {key: stage1[key] for key in ("config", "model", "data")} if stage1 else None,
        "classifier": {key: stage2[key] for key in ("config", "model", "data")} if stage2 else None,
    }  # fmt: skip
    fixed = grid_inputs(trainer, options["seed"])
    snap = max(round(1000 * options["snap"]), options["batch"])
    run.reseed(images)
    batches = data.batches(trainer.batch, run.device, run.seed, images, run.rank, run.world, options["workers"])
    for real, y in batches:
        log.add(**trainer.iteration(iteration, dataset.to_float(real), y if conditional else None))
        before, images, iteration = images, images + options["batch"], iteration + 1
        log.step(options["batch"])
        done = images >= total
        if done or images // LOG_EVERY > before // LOG_EVERY:
            log.write(images)
        if done or images // snap > before // snap:
            if run.rank == 0:
                picture = save_grid(trainer, outdir / "samples" / f"{images:08d}.png", *fixed)
                log.picture("samples", picture, images)
                state = frozen | {"images_seen": images, "iteration": iteration, "ema": trainer.ema.state_dict()}
                training.save(outdir / "snapshots" / f"gan-{images:08d}.pt", state)
                training.save(checkpoint, state | {"trainer": trainer.state()})
            run.reseed(images)  # a run resumed here draws the same numbers
        if done:
            break
    batches.close()
    log.close()
    if run.rank == 0:
        click.echo(f"wrote {checkpoint} and {outdir / 'samples'}")


# fmt: off
OPTIONS = [
    click.option("--disc",          type=click.Choice(["global", "patch"]), default="global", help="Discriminator: a score an image, or one a patch."),
    click.option("--per-class",     is_flag=True, help="One discriminator for each class, D(x | y); one-hot labels only."),
    click.option("--loss",          type=click.Choice(["hinge", "ns", "lsgan"]), default="hinge", help="Adversarial loss; ns: non-saturating."),
    click.option("--reg-every",     metavar="N", type=click.IntRange(0), default=2, help="Iterations between classification regularisations; 0: never."),
    click.option("--reg-mode",      type=click.Choice(["separate", "joint"]), default="separate", help="Regularise by an update of its own, or in the adversarial one."),
    click.option("--reg-clip/--no-reg-clip", default=None, help="Limit a regularisation's gradient to N times the adversarial one's norm.  [default: by data]"),
    click.option("--orth",          type=click.Choice(["penalty", "exact", "none"]), default="penalty", help="How the bases U are kept orthonormal."),
    click.option("--r1",            metavar="W", type=click.FloatRange(0), help="Weight of the gradient penalty, every 16th iteration; 0: none.  [default: by data and --disc]"),
    click.option("--augment",       metavar="LIST|none", help="Of the discriminator's inputs: color,translation,cutout or some of them.  [default: by data]"),
    click.option("--sample-y",      type=click.Choice(["joint", "independent"]), default="joint", help="Draw y jointly as in the data, or each attribute on its own."),
    click.option("--unconditional", is_flag=True, help="Vanilla EigenGAN: no labels, no regularisation; needs no earlier stage."),
    click.option("--lr",            metavar="RATE", type=click.FloatRange(0, min_open=True), help="Learning rate of both Adams.  [default: by data]"),
    click.option("--kimg",          metavar="KIMG", type=click.FloatRange(0, min_open=True), help="Length in thousands of real images.  [default: by data]"),
    click.option("--snap",          metavar="KIMG", type=click.FloatRange(0, min_open=True), help="Thousands of images between snapshots.  [default: by data]"),
]
# fmt: on


def command() -> click.Command:
    """The command line; built on demand, so that the networks above need nothing but ops/."""
    import training

    @click.command(context_settings=dict(max_content_width=120, show_default=True))
    @training.with_options(OPTIONS)
    def main(**options):
        """Train the decoder (stage 3); needs encoder.pt and classifier.pt in the output folder unless --unconditional.

        Writes gan.pt (latest), snapshots/, samples/, stats.jsonl and tensorboard/ to the output folder. The same
        command again goes on where it stopped.
        """
        train(options)

    return main


if __name__ == "__main__":
    command()()
