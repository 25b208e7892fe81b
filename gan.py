"""Stage 3: trains the decoder (mapper and EigenGAN generator) against a discriminator and, every n-th iteration, through
the frozen encoder and classifier of stages 1 and 2.

    python gan.py --data afhq --disc patch --loss lsgan --reg-every 4
    torchrun --nproc-per-node 8 gan.py --data afhq

From top to bottom: decoder, discriminators, augmentation, losses, the four updates and the iteration that calls them,
`load` for a trained run, the command. With `ops/`, `training.py` and `checkpoints.py` beside it, this file builds, trains and
runs the networks in any project; `load` also needs encoder.py and classifier.py, the command all that reads data:
dataset.py, layouts.py, files.py, critters.py, download.py.

Symbols as in the paper: y attributes, eps = r(y, noise) the code given to the generator, z = (z_1..z_k) one small
vector per generator layer, phi = U (L * z_i) + mu the subspace of layer i, x images in [-1, 1].
"""

import contextlib
import copy
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import checkpoints
import training
from ops import CaptureError, Graphs, bias_lrelu, conv2d, conv_transpose2d, freeze, no_weight_gradients, subspace_lrelu

# As published:
NOISE = 512  # width of the mapper's noise and of eps
BASIS = 6  # basis vectors of a subspace
BETA2 = 0.99  # of both Adams
ORTH = 100.0  # weight of the penalty that keeps the bases orthonormal
EMA_HALF_LIFE = 10_000  # images

BEFORE = dict(blur=False, reg_stretch=1.0, tanh_slope=0.0)  # for checkpoints from before these options

LOG_EVERY = 2_000  # images: a minute on a CPU, a second on a GPU

# Defaults by preset; '' is all other data. None: `set_by_size` sets it. squash and train_on_all
# count only where there is no encoder.pt.
# Why defaults are not the published settings (figures are of small images, most of one seed):
# lr_decay: 1,266 icons had FD 141 with it and 223 without, both under a longer average over weights: colours come and go.
# projection: where the classifier is often wrong, the regularisation alone does not make images follow y.
# reg_clip: on critters its gradient was 4 to 200 times the adversarial one's, whose steps by the same Adam then shrank.
# reg_stretch: icons ceased to follow y where that gradient fell to 0.6 of reg_clip's limit; beyond 2, FD got worse.
# draw_y, reg_over: eq. 4 has the labels' own distribution and a sum over attributes.
# reg_augment: control under a judge was 57.9 % with crops and 53.6 % with shifts (icons, 64 px, one seed).
# blur: without it, icons at 64 px had 13 and 33 times the real power at the Nyquist frequencies, with it 0.3 times.
# tanh_slope: without it, half of all pixels of icons were saturated after 512 images; with 0.05, 3 % after 2,560.
PRESETS = {
    "":              dict(width=None, batch=None, lr=None, lr_decay=0.5, beta1=None, kimg=None, snap=None, projection=True, r1=None,
                          augment="color,translation,cutout", reg_every=2, reg_clip=True, reg_stretch=2.0, penalty=None,
                          penalty_every=None, draw_y="data", reg_over="sum", reg_augment="crop", blur=True, tanh_slope=0.05,
                          start="he", squash=False, train_on_all=False),
    # 12,000 images and more: augmentation is for few. Without blur, critters have 0.9 to 1.0 times the real power at
    # the Nyquist frequencies.
    "critters":      dict(augment="none", reg_augment="none", reg_stretch=1.0, blur=False, tanh_slope=0.0),
    "fashion-mnist": dict(augment="none", reg_augment="none", reg_stretch=1.0, blur=False, tanh_slope=0.0),
}  # fmt: skip

# --protocol paper: the published settings, for AFHQ at 256 px and CelebA at 128 px; 200,000 iterations each.
# kimg: 200,000 times the batch. reg_every is not here, since PRESETS has its published value, 2.
PAPER = {
    "":       dict(width=16, batch=32, lr=1e-4, lr_decay=0.0, beta1=0.5, kimg=6400.0, snap=200.0, projection=False,
                   augment="color,translation,cutout", reg_clip=False, reg_stretch=1.0, penalty="r1", draw_y="uniform",
                   reg_over="mean", reg_augment="none", blur=False, tanh_slope=0.0, start="torch"),
    "celeba": dict(batch=64, kimg=12800.0, squash=True, train_on_all=True),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Decoder: mapper r(eps | y, noise), then generator G(eps, z).


def channels_at(size: int, resolution: int, width: int = 16) -> int:
    """Channels of a map: `width` at full size, doubling toward 4x4, at most 512. 16 is the published width."""
    return min(width * size // resolution, 512)


def he_init(network: nn.Module) -> None:
    """Start every convolution and linear layer at He et al.'s scale for leaky ReLU of slope 0.2, biases at 0.

    From torch's default scale a generator's first images are hundreds of times fainter, and stay so for many steps.
    A transposed convolution (3x3, stride 2) starts as bilinear upsampling, so that the first images are smooth.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            up = isinstance(layer, nn.ConvTranspose2d)
            # The bilinear weights that meet in one pixel sum to 1, so only the channels add to a result's variance.
            inputs = layer.in_channels if up else layer.weight[0].numel()
            # A leaky ReLU of slope s passes (1 + s^2) / 2 of the power; this scale makes up for it.
            nn.init.normal_(layer.weight, std=(2 / (1 + 0.2**2) / inputs) ** 0.5)
            if up:
                tent = torch.tensor([0.5, 1.0, 0.5])  # bilinear upsampling at stride 2
                layer.weight.data = layer.weight.data[:, :, :1, :1] * tent[:, None] * tent
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Subspace(nn.Module):
    """phi = U (L * z) + mu (EigenGAN, eq. 1): BASIS orthonormal maps U of [r * r, C], importances L, origin mu.

    U starts random, orthonormal and smooth (no finer than 4x4). orthonormal: keep U orthonormal by construction
    (Gram-Schmidt, differentiable) instead of by a penalty.
    """

    def __init__(self, channels: int, resolution: int, orthonormal: bool = False):
        super().__init__()
        # Channels last in memory. Not four dimensions: .to(memory_format=channels_last) would change their order.
        self.U = nn.Parameter(torch.empty(BASIS, resolution**2, channels))
        self.L = nn.Parameter(3.0 * torch.arange(BASIS, 0, -1))  # 18, 15, .. 3, as published
        self.mu = nn.Parameter(torch.zeros(resolution, resolution, channels))  # from 0, as published
        self.orthonormal = orthonormal
        # From white noise, as published, the first images would be grainy.
        smooth = F.interpolate(torch.randn(BASIS, channels, 4, 4), size=resolution, mode="bilinear")
        # QR makes columns orthonormal, hence the transposes; the penalty then has nothing to undo at the start.
        U = torch.linalg.qr(smooth.permute(0, 2, 3, 1).flatten(1).T)[0].T
        self.U.data.copy_(U.reshape(self.U.shape))

    def basis(self) -> Tensor:
        """U as it is used: [basis, r * r, C], in full precision."""
        if not self.orthonormal:
            return self.U
        # U U^T = R R^T, so the rows of R^-1 U are orthonormal. 16 bits have no Cholesky factorisation.
        with torch.autocast(self.U.device.type, enabled=False):
            U = self.U.flatten(1)
            R = torch.linalg.cholesky_ex(U @ U.T).L  # cholesky() would wait for the device to check its result
            return torch.linalg.solve_triangular(R, U, upper=False).view_as(self.U)

    def gram(self) -> Tensor:
        """U U^T [basis, basis], in full precision."""
        # U U^T is nearly I, so in 16 bits its difference from I would be nothing but rounding.
        with torch.autocast(self.U.device.type, enabled=False):
            U = self.basis().flatten(1)
            return U @ U.T

    def maps(self) -> Tensor:
        """The scaled basis and the origin, [basis + 1, C, r, r]: phi of z is their sum weighted by (z, 1)."""
        scaled = (self.L.view(-1, 1, 1) * self.basis()).view(-1, *self.mu.shape)
        # U has its channels last in memory, so this is channels_last without a copy.
        return torch.cat((scaled, self.mu[None])).permute(0, 3, 1, 2)


class Upsample(nn.ConvTranspose2d):
    """[B, C, r, r] -> [B, C', 2r, 2r] by a transposed convolution 3x3, as published. The bias is left to the caller.

    One to four of its weights meet in a pixel, by turns, and where images are few, training leaves a pattern of dots.
    blurred: [1, 2, 1] / 4 along both axes comes after it, which lets nothing of period 2 through (as in StyleGAN).
    """

    def __init__(self, in_channels: int, out_channels: int, blurred: bool):
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1)  # to 2r, not 2r - 1
        tent = torch.tensor([0.25, 0.5, 0.25], device="cpu")  # `checkpoints.rebuild` makes all else without memory
        # Its sum is 1, so flat areas keep their value.
        blur = (tent[:, None] * tent).expand(out_channels, 1, 3, 3).contiguous() if blurred else None
        self.register_buffer("blur", blur, persistent=False)  # a constant, which checkpoints need not hold

    def forward(self, x: Tensor) -> Tensor:
        x = conv_transpose2d(x, self.weight, stride=2, padding=1, output_padding=1)
        # Zeros beyond the border leave a line at the right and the bottom. Two shorter runs whose maps went on there
        # followed y less.
        return x if self.blur is None else F.conv2d(x, self.blur, padding=1, groups=len(self.blur))


class EigenBlock(nn.Module):
    """One generator layer: [B, C, r, r] -> [B, C', 2r, 2r], adding its subspace phi before and after upsampling.

    Both convolutions of phi are linear, so they are applied to the 7 basis maps instead of to the batch, and
    `subspace_lrelu` mixes their results. last: the bias of feature_conv2 is left to the caller, which adds it by
    `bias_lrelu` in one pass; between blocks the next subspace is added first.
    """

    def __init__(
        self, in_channels: int, out_channels: int, resolution: int, orthonormal: bool, blurred: bool, last: bool
    ):
        super().__init__()
        self.last = last
        # As published: phi goes through 1x1 and through 3x3 transposed, h through 3x3 transposed, then 3x3.
        self.subspace = Subspace(in_channels, resolution, orthonormal=orthonormal)
        self.subspace_conv1 = nn.Conv2d(in_channels, in_channels, 1)
        self.feature_conv1 = Upsample(in_channels, out_channels, blurred)
        self.subspace_conv2 = Upsample(in_channels, out_channels, blurred)
        self.feature_conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def convolve(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Both subspace convolutions, without bias: [K, C, r, r] -> [K, C, r, r], [K, C', 2r, 2r]."""
        # Without bias: mixing the maps would multiply it by the sum of their coefficients.
        return conv2d(maps, self.subspace_conv1.weight), self.subspace_conv2(maps)

    def forward(self, h: Tensor, z: Tensor, convolved: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """h [B, C, r, r] (written over), z [B, 6] -> [B, C', 2r, 2r]. convolved: the result of `convolve`, if kept."""
        coef = F.pad(z, (0, 1), value=1.0)  # mu has the coefficient 1
        if convolved is None:
            maps = self.subspace.maps()
            if len(z) < len(maps):  # a small batch: fewer phi than basis maps
                # einsum may choose another memory order, and conv2d's CPU kernels take channels_last alone.
                maps = torch.einsum("bk,kchw->bchw", coef, maps).contiguous(memory_format=torch.channels_last)
                coef = torch.eye(len(z), dtype=z.dtype, device=z.device)  # each phi now belongs to one image
            convolved = self.convolve(maps)
        # In place: a convolution's gradient does not need its result, so h can be written over.
        h = subspace_lrelu(h, coef, convolved[0], self.subspace_conv1.bias, inplace=True)
        h = self.feature_conv1(h)
        bias = self.feature_conv1.bias + self.subspace_conv2.bias  # both are added at the same place
        h = subspace_lrelu(h, coef, convolved[1], bias, inplace=True)
        return conv2d(h, self.feature_conv2.weight, None if self.last else self.feature_conv2.bias, padding=1)


class TanhWithFloor(torch.autograd.Function):
    """tanh whose backward pass takes a slope of at least `slope`, but only where the step leads out of saturation.

    In saturation, tanh's own slope is nearly 0 both ways: pixels that the regularisation drove to black or to a full
    colour stay there, whatever D says.
    """

    @staticmethod
    def forward(ctx, a: Tensor, slope: float) -> Tensor:
        x = torch.tanh(a)
        ctx.save_for_backward(x)  # all that the slope needs: 1 - x^2
        ctx.slope = slope
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        # Descent moves a by -grad: toward 0, out of saturation, where grad and x have the same sign.
        return grad * torch.maximum(1 - x * x, ctx.slope * (grad * x > 0)), None


class Generator(nn.Module):
    """G(eps [B, 512], z [B, layers, 6]) -> x [B, 3, size, size] float32 in [-1, 1] (EigenGAN, He et al. 2021).

    size: a power of two, 8 or more, else ValueError.
    """

    tanh_slope = 0.0  # least slope of tanh in its gradient; `Trainer` sets it

    def __init__(self, size: int, orthonormal: bool = False, width: int = 16, blurred: bool = False):
        super().__init__()
        if size < 8 or size & (size - 1):
            raise ValueError(f"images of {size} px: give a power of two, 8 or more")
        self.size = size
        # A block for each of 4, 8, .. size / 2, which doubles it. The last entry, the full size, has no block.
        resolutions = [4 * 2**i for i in range(int(math.log2(size)) - 1)]
        channels = [channels_at(size, r, width) for r in resolutions]
        self.first = nn.Linear(NOISE, 16 * channels[0])  # 16: the places of a 4x4 map
        self.blocks = nn.ModuleList(
            EigenBlock(C, narrower, r, orthonormal, blurred, last=2 * r == size)
            for r, (C, narrower) in zip(resolutions, itertools.pairwise(channels), strict=False)
        )
        self.last = nn.Conv2d(channels[-1], 3, 7, padding=3)

    def convolved(self) -> list[tuple[Tensor, Tensor]]:
        """The convolved basis maps of every layer: they depend on the weights alone, so generation keeps them."""
        return [block.convolve(block.subspace.maps()) for block in self.blocks]

    def forward(self, eps: Tensor, z: Tensor, convolved: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        # The linear layer gives the channels last, so that the map is channels_last without a copy.
        h = self.first(eps).view(len(eps), 4, 4, -1).permute(0, 3, 1, 2)
        h = h.clone()  # the blocks write over their input, which a view of a layer's output does not allow
        for i, block in enumerate(self.blocks):
            h = block(h, z[:, i], convolved[i] if convolved else None)
        h = bias_lrelu(h, self.blocks[-1].feature_conv2.bias, inplace=True)
        # From here in fp32: near 1, a step of bf16 is half a level of an 8-bit image.
        a = training.full(conv2d(h, self.last.weight, self.last.bias, padding=3))
        # At 0 it is torch.tanh itself, whose gradient is then the published one bit for bit.
        return TanhWithFloor.apply(a, self.tanh_slope) if self.tanh_slope else torch.tanh(a)


class Decoder(nn.Module):
    """Mapper r(eps | y, noise) and generator G(eps, z); labels=0 is the vanilla EigenGAN, eps = noise."""

    def __init__(self, size: int, labels: int, orthonormal: bool = False, width: int = 16, blurred: bool = False):
        super().__init__()
        # As published: two linear layers and no activation.
        self.embed = nn.Linear(labels, labels) if labels else None
        self.mapper = nn.Linear(labels + NOISE, NOISE) if labels else None
        self.generator = Generator(size, orthonormal, width, blurred)

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
        eye = torch.eye(BASIS, device=self.generator.last.weight.device)
        return torch.stack([(b.subspace.gram() - eye).square().mean() for b in self.generator.blocks]).mean()


def build_decoder(options: dict, size: int, labels: int) -> Decoder:
    """The decoder that the options of a run describe."""
    options = BEFORE | options
    return Decoder(size, labels, options["orth"] == "exact", options["width"], options["blur"])


def start_decoder(decoder: Decoder, start: str, disc: str) -> None:
    """The decoder's first weights by --start: 'torch' as published, 'he' at He et al.'s scale."""
    G = decoder.generator
    if start == "torch":
        for block in G.blocks:
            nn.init.orthogonal_(block.subspace.U.data.flatten(1))  # white, not smooth
        return  # all other layers keep PyTorch's own first weights, as published
    he_init(decoder)
    G.last.weight.data.mul_(0.5)  # keeps the first images out of tanh's saturation
    if disc == "patch":  # its batch norm hides colours, which the regularisation would drive into saturation
        return
    if decoder.embed is not None:  # eps follows y about as much as the 512 numbers of the noise; 3: found by trying
        decoder.mapper.weight.data[:, : decoder.embed.in_features].mul_((NOISE / 3) ** 0.5)
    # eps fainter than the first subspace: else that layer's z has nothing to say and dies. 0.3: found by trying.
    G.first.weight.data.mul_(0.3)


# ---------------------------------------------------------------------------------------------------------------------
# Discriminators. Each has `batch_statistics`: whether an image's score depends on the others of its batch.


class ConvLrelu(nn.Conv2d):
    """Convolution whose bias goes into the fused bias + leaky ReLU (slope 0.2)."""

    def forward(self, x: Tensor) -> Tensor:
        x = conv2d(x, self.weight, None, self.stride[0], self.padding[0])
        return bias_lrelu(x, self.bias, inplace=True)


class ConvNormLrelu(nn.Module):
    """Convolution 4x4, batch norm, leaky ReLU; the norm's shift goes into the fused bias + leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        # No bias: the norm would subtract it again.
        self.conv = nn.Conv2d(in_channels, out_channels, 4, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = conv2d(x, self.conv.weight, None, self.conv.stride[0], padding=1)
        return bias_lrelu(training.batch_norm(x, self.norm, None), self.norm.bias, inplace=True)


class GlobalDiscriminator(nn.Module):
    """x [B, 3, size, size] -> one logit per image, [B, 1]. Convolutions down to 4x4, as in EigenGAN.

    width: channels at full size. labels > 0: conditioned on y [B, labels] by the projection <V y, h> of the last features h
    (Miyato and Koyama 2018), which is D(x | y) with a shared trunk.
    """

    batch_statistics = False

    def __init__(self, size: int, width: int = 16, labels: int = 0):
        super().__init__()
        widths = [channels_at(size, size >> i, width) for i in range(int(math.log2(size)) - 1)]
        # The generator's layers in reverse: 7x7 at full size, then two 3x3 for each halving.
        layers: list[nn.Module] = [ConvLrelu(3, widths[0], 7, padding=3)]
        for C, wider in itertools.pairwise(widths):
            layers += [ConvLrelu(C, C, 3, padding=1), ConvLrelu(C, wider, 3, 2, padding=1)]
        self.features = nn.Sequential(*layers, ConvLrelu(widths[-1], widths[-1], 3, padding=1))
        self.hidden = nn.Linear(widths[-1] * 16, widths[-1], bias=False)
        # Apart from the layer, for the fused op. The published one starts at PyTorch's random bias.
        self.hidden_bias = nn.Parameter(torch.zeros(widths[-1]))
        self.score = nn.Linear(widths[-1], 1)
        # From 0: with random rows, D asks for the label before it knows the images, and classes collapse to one look.
        self.projection = nn.Parameter(torch.zeros(labels, widths[-1])) if labels else None

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.hidden(self.features(x).flatten(1))
        h = bias_lrelu(h, self.hidden_bias, inplace=True)
        score = training.full(self.score(h))
        if self.projection is None:
            return score
        # Divided by the root of the number of features: a wide network must not give y more weight than a narrow one.
        by_label = training.full(F.linear(h, self.projection)) / h.shape[1] ** 0.5  # [B, labels]
        return score + (by_label * y).sum(1, keepdim=True)


class PatchDiscriminator(nn.Module):
    """x [B, 3, size, size] -> a logit for each of overlapping patches, [B, 1, h, w] (pix2pix, Isola et al. 2017).

    `layers` convolutions halve the image, two more follow; patches are 70 px wide for 3 layers and 574 px for 6, the
    published number for 256 px images, whose scores are then 2x2. Channels: 64 times 2^i, at most 512.
    """

    batch_statistics = True

    def __init__(self, layers: int):
        super().__init__()
        # pix2pix's: 4x4 kernels, 64 to 512 channels, no norm in the first and the last layer, stride 1 in the last two.
        widths = [64 * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [ConvLrelu(3, widths[0], 4, 2, padding=1)]
        for i, (C, wider) in enumerate(itertools.pairwise(widths), 1):
            blocks.append(ConvNormLrelu(C, wider, stride=2 if i < layers else 1))
        self.layers = nn.Sequential(*blocks)
        self.score = nn.Conv2d(widths[-1], 1, 4, 1, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return training.full(conv2d(self.layers(x), self.score.weight, self.score.bias, padding=1))


class PerClass(nn.Module):
    """D(x | y) of section 2.3: one discriminator for each class; y one-hot [B, classes] chooses who scores an image."""

    def __init__(self, discriminators: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(discriminators)
        self.batch_statistics = self.members[0].batch_statistics

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        order = y.argmax(1).argsort(stable=True)  # images of the same class side by side
        own = everywhere = y.sum(0)
        if dist.is_initialized():  # a discriminator with images in any process runs in all: they share its gradients
            everywhere = own.clone()
            dist.all_reduce(everywhere)
        own, everywhere = torch.stack((own, everywhere)).long().tolist()  # the one wait for the device
        parts = x[order].split(own)
        scores = [D(part) for D, part, n in zip(self.members, parts, everywhere, strict=True) if n]
        return torch.cat(scores)[order.argsort()]  # back in the order of x


def patch_layers(size: int) -> int:
    """The most layers of a PatchDiscriminator that leave at least 2x2 scores of images of `size`: 6 for 256 px."""
    return int(math.log2(size)) - 2


def build_discriminator(
    kind: str, size: int, layers: int | None = None, classes: int = 0, width: int = 16, labels: int = 0
) -> nn.Module:
    """kind 'patch' of `layers`, by default `patch_layers`, or 'global' of `width` with the projection of `labels`.

    classes > 0: one discriminator per class, which needs no projection. Raises ValueError for another kind.
    """
    if kind not in ("patch", "global"):
        raise ValueError(f"no discriminator {kind!r}")

    def make() -> nn.Module:
        if kind == "patch":
            return PatchDiscriminator(layers or patch_layers(size))
        return GlobalDiscriminator(size, width, 0 if classes else labels)

    return PerClass([make() for _ in range(classes)]) if classes else make()


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation of what the discriminator and the encoder see (Zhao et al. 2020, "Differentiable augmentation"), in fp32.

AUGMENTATIONS = {"color", "translation", "cutout", "crop"}


def augment(x: Tensor, policy: str, p: float = 0.6) -> Tensor:
    """Brightness, saturation, contrast, translation by up to 1/8 and a cutout of 1/2, differentiable to any order.

    x [B, 3, H, W] in [-1, 1] (colours may leave it) -> same shape, contiguous or channels_last.
    policy: comma list of color, translation, cutout, crop (for which H = W), or 'none'; else ValueError.
    Each of the five is applied to the whole batch or not, with probability p (0.6 as published); its strength is drawn
    for each image.
    crop: `training.random_crop` of at least 0.6 of the area comes first, always.
    On a GPU all five run, with no effect where the coin says so: the host need not know, and a CUDA graph can do it.
    """
    names = [] if policy == "none" else policy.split(",")
    if other := set(names) - AUGMENTATIONS:
        raise ValueError(f"no augmentation {', '.join(other)}")
    if "crop" in names:
        x = training.random_crop(x, 0.6)  # as the encoder's own views, where the data have no preset
    B, _, H, W = x.shape
    coins = torch.rand(5, device=x.device) < p  # on the device: a CUDA graph must draw them anew
    # For brightness, saturation, contrast, shift down and right, top and left of the cutout; ranges as Zhao et al.'s.
    u = torch.rand(7, B, 1, 1, 1, device=x.device, dtype=x.dtype)
    runs = coins.tolist() if x.device.type == "cpu" else [True] * 5
    if "color" in names:
        if runs[0]:
            x = x + torch.where(coins[0], u[0] - 0.5, 0.0)
        if runs[1]:
            grey = x.mean(dim=1, keepdim=True)
            x = (x - grey) * torch.where(coins[1], 2 * u[1], 1.0) + grey
        if runs[2]:
            mean = x.mean(dim=(1, 2, 3), keepdim=True)
            x = (x - mean) * torch.where(coins[2], u[2] + 0.5, 1.0) + mean
    rows = torch.arange(H, device=x.device)
    columns = torch.arange(W, device=x.device)
    if "translation" in names and runs[3]:
        # A shift is a product with a 0/1 matrix: exact, batched, and its gradient needs no scatter.
        # floor: all whole shifts from -s / 8 to s / 8 are equally likely. A shift of 0 is the identity matrix.
        down, right = (coins[3] * (((2 * (s // 8) + 1) * u).floor() - s // 8) for s, u in ((H, u[3]), (W, u[4])))
        shift_rows = (rows - down == rows[:, None]).to(x.dtype).transpose(2, 3)
        shift_columns = (columns - right == columns[:, None]).to(x.dtype)
        x = shift_rows @ x @ shift_columns
    if "cutout" in names and runs[4]:
        # The centre may be any pixel, so a part of the hole can lie outside the image, as in Zhao et al.'s code.
        top = ((H + 1 - H // 2 % 2) * u[5]).floor() - H // 4
        left = ((W + 1 - W // 2 % 2) * u[6]).floor() - W // 4
        inside = ((rows >= top) & (rows < top + H // 2)).transpose(2, 3) & (columns >= left) & (columns < left + W // 2)
        x = x * ~(inside & coins[4])  # 0 is mid-grey
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Losses. Scores are logits of any shape; every loss is a mean.


LOSSES = ("hinge", "hinge-v1", "ns", "lsgan", "lsgan-published")


def loss_d(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator loss: hinge (Lim & Ye 2017), ns (Goodfellow et al. 2014) or lsgan (Mao et al. 2017, a=0, b=1).

    hinge-v1 has the hinge loss here; lsgan-published squares twice, as the published code does. Raises ValueError for
    another kind.
    """
    if kind not in LOSSES:
        raise ValueError(f"no loss {kind!r}")
    if kind in ("hinge", "hinge-v1"):
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "ns":
        return F.softplus(-real).mean() + F.softplus(fake).mean()  # softplus(-v) = -log sigmoid(v), but stable
    if kind == "lsgan-published":
        return (real - 1).pow(4).mean() + fake.pow(4).mean()
    return 0.5 * (real - 1).square().mean() + 0.5 * fake.square().mean()


def loss_g(kind: str, fake: Tensor) -> Tensor:
    """Generator loss that goes with `loss_d` (lsgan: c=1); hinge-v1 stops where D is fooled, as EigenGAN's default."""
    if kind not in LOSSES:
        raise ValueError(f"no loss {kind!r}")
    if kind == "hinge":
        return -fake.mean()
    if kind == "hinge-v1":
        return F.relu(1 - fake).mean()
    if kind == "ns":
        return F.softplus(-fake).mean()
    if kind == "lsgan-published":
        return (fake - 1).pow(4).mean()
    return 0.5 * (fake - 1).square().mean()


def loss_y(kind: str, logits: Tensor, y: Tensor) -> Tensor:
    """H(Y | E) of eq. 5 in nats, mean over images: cross-entropy, or the sum of an image's binary cross-entropies."""
    if kind == "one-hot":
        return F.cross_entropy(training.full(logits), y)
    return F.binary_cross_entropy_with_logits(training.full(logits), y, reduction="sum") / len(y)


def gradient_penalty(scores: Tensor, *images: Tensor) -> list[Tensor]:
    """E ||grad_x sum D(x)||^2 at each of `images` [B, 3, H, W], from which `scores` were computed. Differentiable.

    R1 at real images, R2 at generated ones (Mescheder et al. 2018, without their 1/2). Compute the scores within
    `ops.no_weight_gradients()` too: on GPUs the convolutions then take the derivatives that this asks for.
    """
    with no_weight_gradients():
        # One pass for all images: where no score depends on another image, the sum's gradient has each image's own.
        gradients = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return [g.square().sum(dim=(1, 2, 3)).mean() for g in gradients]


# ---------------------------------------------------------------------------------------------------------------------
# Training: four updates, and the iteration that calls them.


def scores_real_fake(D: nn.Module, real: Tensor, fake: Tensor, y_real: Tensor, y_fake: Tensor) -> tuple[Tensor, Tensor]:
    """D on both: in one pass, unless batch statistics would then mix them."""
    # channels_last, as the weights: else the first convolution's backward pass copies its whole output to that format.
    real, fake = (x.contiguous(memory_format=torch.channels_last) for x in (real, fake))
    if D.batch_statistics:
        return D(real, y_real), D(fake, y_fake)
    y = None if y_real is None else torch.cat((y_real, y_fake))
    return D(torch.cat((real, fake)), y).chunk(2)


class Trainer:
    """Networks, optimisers and labels of one run, and its four updates.

    Each of `discriminate`, `penalise` (R1), `generate` and `regularise` runs forward and backward and steps its
    optimiser. All but `penalise` draw latents of their own. They return device scalars for the log and do not
    synchronise (but for --per-class, which must know whose images are whose).

    labels: float [N, Y] of the training images, from which y is drawn; None is unconditional. kind: 'one-hot',
    'multi-label' or 'none'. encoder, classifier: frozen.
    """

    STATEFUL = ("decoder", "D", "step_g", "step_d")  # what changes in training, beside the average

    def __init__(
        self, options: dict, run: training.Run, labels: Tensor | None, kind: str, encoder=None, classifier=None
    ):
        self.options, self.run, self.kind = options, run, kind
        self.encoder, self.classifier = encoder, classifier
        self.labels = None if labels is None else labels.to(run.device)  # y is then drawn without a transfer
        self.entropy = 0.0 if labels is None else training.entropy_bits(self.labels)  # H(Y)
        torch.manual_seed(run.seed)  # the same weights in every process
        width, classes = (0, 0) if labels is None else (labels.shape[1], labels.shape[1] * options["per_class"])
        decoder = build_decoder(options, options["size"], width)
        decoder.generator.tanh_slope = options["tanh_slope"]
        start_decoder(decoder, options["start"], options["disc"])
        projected = width * options["projection"]
        D = build_discriminator(
            options["disc"], options["size"], options["disc_layers"], classes, options["width"], projected
        )
        if options["start"] == "he":
            he_init(D)
        self.decoder, self.D = (n.to(run.device, memory_format=torch.channels_last) for n in (decoder, D))
        # Pictures and metrics use this average: the weights of single steps jump about.
        self.ema = copy.deepcopy(self.decoder).requires_grad_(False).eval()
        one_gpu = run.device.type == "cuda" and run.world == 1
        # One discriminator per class waits for the device to learn whose images are whose, which no graph can.
        possible = one_gpu and run.dtype is not torch.float16 and not options["per_class"]
        self.graphs = Graphs(possible and options["graph"] == "auto")
        # fused: it can skip a gradient that is not finite without asking the device first, see `training.Stepper`.
        adam = dict(lr=options["lr"], betas=(options["beta1"], BETA2), fused=True)
        if self.graphs.on:
            # A rate that is a Python number would be frozen into the graph; Adam's count of steps likewise.
            adam |= dict(lr=torch.tensor(adam["lr"], device=run.device), capturable=True)
        self.step_g = training.Stepper(run, torch.optim.Adam(self.decoder.parameters(), **adam))
        self.step_d = training.Stepper(run, torch.optim.Adam(self.D.parameters(), **adam))
        self.batch = options["batch"] // run.world  # this process's share

    def draw_y(self, how: str) -> Tensor | None:
        """Labels to generate for. 'data': rows of the training labels; 'uniform': classes alike, fair coins."""
        if self.labels is None:
            return None
        n, Y, device = self.batch, self.labels.shape[1], self.run.device
        if how == "data":
            return self.labels[torch.randint(len(self.labels), (n,), device=device)]
        # As published: every class or attribute as often as the others, however rare it is.
        if self.kind == "one-hot":
            return torch.eye(Y, device=device)[torch.randint(Y, (n,), device=device)]
        return torch.randint(2, (n, Y), device=device).float()

    def fake(self, how: str | None = None) -> tuple[Tensor, Tensor | None]:
        """A batch of generated images, and the labels they were generated for, by default as --draw-y says.

        how: in place of --draw-y; what regularises gives 'data', since eq. 4 has the real distribution of y.
        """
        y = self.draw_y(how or self.options["draw_y"])
        latents = torch.randn(self.batch, self.decoder.latent_width, device=self.run.device)
        with self.run.autocast():
            return self.decoder(y, latents), y

    def drop_gradients(self) -> None:
        """Every update begins with this, so that the last one's gradients are freed before its activations need room."""
        self.step_g.optimizer.zero_grad(set_to_none=True)
        self.step_d.optimizer.zero_grad(set_to_none=True)

    def discriminate(self, real: Tensor, y_real: Tensor | None, penalised: bool = False) -> dict[str, Tensor]:
        """One step of D on real and generated images, eqs. 6-7; penalised: with R1 and R2 at what D sees."""
        self.drop_gradients()
        with torch.no_grad():
            fake, y_fake = self.fake()
        # detach: without augmentation x is the caller's own batch, which must not start to require gradients.
        images = [augment(x, self.options["augment"]).detach().requires_grad_(penalised) for x in (real, fake)]
        # In bf16 the penalties too: the step's gradient then had a cosine of 0.9999 with the one in fp32 (1,266 icons,
        # after 27,000 images). fp16 has too small a range for them.
        exact = penalised and self.run.dtype is torch.float16
        precision = contextlib.nullcontext() if exact else self.run.autocast()
        with precision, no_weight_gradients() if penalised else contextlib.nullcontext():
            score_real, score_fake = scores_real_fake(self.D, *images, y_real, y_fake)
        # The log gets the loss alone, by which runs with and without penalties compare.
        loss = total = loss_d(self.options["loss"], score_real, score_fake)
        stats = {"loss_d": loss, "score_real": score_real.detach().mean(), "score_fake": score_fake.detach().mean()}
        if penalised:
            r1, r2 = gradient_penalty(torch.cat((score_real, score_fake)), *images)
            # Times the steps from one penalty to the next, as StyleGAN2: in sum, the weight does not depend on them.
            total = loss + self.options["penalty_every"] * self.options["r1"] * (r1 + r2)
            stats |= {"r1": r1, "r2": r2}
        self.step_d.step(total)
        if self.options["loss"] == "ns":  # its discriminator bounds the Jensen-Shannon divergence from below, in bits
            # The best D has a loss of 2 ln 2 - 2 JSD (Goodfellow et al. 2014), any other a higher one.
            stats["jsd_bound"] = 1 - loss.detach() / 2 / math.log(2)
        return stats

    def penalise(self, real: Tensor, y_real: Tensor | None) -> dict[str, Tensor]:
        """Lazy R1, as published: through the augmentation to the real images, in fp32, and its own step of D's optimiser."""
        self.drop_gradients()
        x = real.detach().requires_grad_()
        with no_weight_gradients():
            score = self.D(augment(x, self.options["augment"]), y_real)
        (r1,) = gradient_penalty(score, x)
        # StyleGAN2 multiplies a lazy penalty by the iterations between two of them; the published code does not.
        self.step_d.step(self.options["r1"] * r1)
        return {"r1": r1}

    def generate(self, joint: bool = False) -> dict[str, Tensor]:
        """One adversarial step of the decoder, eqs. 6-7, with the orthogonality penalty; joint: with eqs. 4-5 too."""
        self.drop_gradients()
        x, y = self.fake("data" if joint else None)
        # As in D's step: D judges only augmented images well, and plain ones teach the decoder little (Zhao et al.).
        augmented = augment(x, self.options["augment"])
        # Otherwise gradients of D's weights would be computed and thrown away.
        self.D.requires_grad_(False)
        with self.run.autocast():
            score = self.D(augmented, y)
        adversarial = loss_g(self.options["loss"], score)
        orthogonality = self.decoder.orthogonality()
        loss = adversarial + (ORTH * orthogonality if self.options["orth"] == "penalty" else 0)
        stats = {"loss_g": adversarial, "orthogonality": orthogonality}
        if joint:
            # For comparison: the paper updates by the two losses separately.
            classification, more = self.classification(x, y)
            loss, stats = loss + classification, stats | more
        stats["norm_g"] = self.step_g.step(loss)  # of its gradient: what `regularise` is limited by
        self.D.requires_grad_(True)
        return stats

    def regularise(self, norm: Tensor | None = None) -> dict[str, Tensor]:
        """Classification regularisation, eqs. 4-5, as an update of the decoder of its own.

        norm: what its gradient is scaled to: down by any factor, up by at most --reg-stretch. With --reg-clip it is n
        times the norm of the decoder's last adversarial step, orthogonality penalty included, so that over n iterations
        the two count the same. The encoder's
        gradient can be a hundred times the discriminator's, and through their common Adam it would all but stop the
        adversarial game. It can also become too small, and then images stop following y.
        """
        self.drop_gradients()
        loss, stats = self.classification(*self.fake("data"))
        # By the same Adam as the adversarial step, as published.
        self.step_g.step(loss, norm, self.options["reg_stretch"])
        return stats

    def classification(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of eq. 5 for generated images under the frozen encoder and classifier, and what the log gets.

        The loss is H(Y | E) in nats; --reg-over mean divides it by the number of attributes. --reg-augment: of random
        views of the images, which patterns that please only the encoder do not survive. Where stage 2 balanced the
        labels, so does the loss. The log gets H(Y | E) without that balance, and the lower bound of eq. 4 on I(Y; E) in
        bits, at most H(Y).
        """
        x = augment(x, self.options["reg_augment"])
        with self.run.autocast():
            logits = self.classifier(self.encoder(x))
        loss = loss_y(self.kind, logits, y)
        # getattr: any module may be the classifier, also one without a balance.
        h = loss_y(self.kind, logits.detach() - getattr(self.classifier, "balance", 0), y)
        mean = self.kind == "multi-label" and self.options["reg_over"] == "mean"
        loss = loss / self.labels.shape[1] if mean else loss
        return loss, {"H_y_given_e": h, "mi_bits": self.entropy - h / math.log(2)}

    @torch.no_grad()
    def average(self, images: int) -> None:
        """Exponential moving average of the decoder's weights after `images` images.

        Its half-life is EMA_HALF_LIFE images, or 1/40 of those seen if that is less, so that short runs forget their start.
        """
        # A ramp as StyleGAN2-ADA's, which takes 1/20 of the images seen. With 1/10, 1,266 icons
        # had FD 141, not 88 (one seed): greyer, since colours come and go in training.
        decay = 0.5 ** (self.options["batch"] / min(EMA_HALF_LIFE, images / 40))
        # Parameters are all: the decoder has no batch norm, so no running statistics to average.
        update = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
        update(list(self.ema.parameters()), list(self.decoder.parameters()), None)

    def decay(self, i: int) -> float:
        """What the learning rate is multiplied by in iteration i: 1, falling to 0 over the last part of the run."""
        left = 1 - i * self.options["batch"] / (1000 * self.options["kimg"])
        return max(0.0, min(1.0, left / self.options["lr_decay"])) if self.options["lr_decay"] else 1.0

    def iteration(self, i: int, real: Tensor, y_real: Tensor | None) -> dict[str, Tensor]:
        """Iteration i on a batch of real images in [-1, 1] and their labels; returns scalars for the log."""
        o = self.options
        for step in (self.step_g, self.step_d):
            step.set_rate(o["lr"] * self.decay(i))
        regularised = self.labels is not None and o["reg_every"] > 0 and i % o["reg_every"] == 0
        joint = regularised and o["reg_mode"] == "joint"
        penalised = o["r1"] > 0 and i % o["penalty_every"] == 0

        # Train D to tell real from generated images, with penalties on its gradient at both.
        stats = self.graphs(self.discriminate, real, y_real, penalised=penalised and o["penalty"] == "r1r2")

        # Or penalise its gradient at real images in an update of its own.
        if penalised and o["penalty"] == "r1":
            stats |= self.graphs(self.penalise, real, y_real)

        # Train the decoder to pass for real.
        stats |= self.graphs(self.generate, joint=joint)
        norm = stats.pop("norm_g")

        # Every n-th iteration, train it to show what the labels say.
        # The published code does this first. Here it comes last: reg_clip needs the norm of this iteration's step.
        if regularised and not joint:
            stats |= self.graphs(self.regularise, norm * o["reg_every"] if o["reg_clip"] else None)

        # Average its weights.
        self.average((i + 1) * o["batch"])
        return stats

    def state(self) -> dict:
        """Everything that changes in training but the averaged decoder, as plain values and tensors."""
        return {name: getattr(self, name).state_dict() for name in self.STATEFUL}

    def load_state(self, state: dict, ema: dict) -> None:
        """Go on from `state()` and the averaged decoder's weights."""
        self.ema.load_state_dict(ema)
        for name in self.STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        if not all(checkpoints.all_finite(value) for name in ("decoder", "D") for value in state[name].values()):
            raise ValueError("its weights are no finite numbers")
        self.graphs.forget()


# ---------------------------------------------------------------------------------------------------------------------
# A trained run, rebuilt from gan.pt alone: what metrics and pictures work with.


@dataclass
class Network:
    """The averaged decoder of a run with its frozen encoder and classifier (None where the run had none)."""

    decoder: Decoder
    encoder: nn.Module | None
    classifier: nn.Module | None
    balance: Tensor | None  # [Y], part of the classifier's logits that only makes up for how rare a label is
    data: dict  # what the images were: source, size, label names and kind, splits
    label_names: list[str]
    label_kind: str  # 'one-hot', 'multi-label' or 'none'
    real_labels: Tensor | None  # float32 [N, Y]: the labels of the training images
    size: int
    images_seen: int
    options: dict
    convolved: list  # the decoder's convolved basis maps
    dimensions: list | None = None  # in an export: what each dimension does, as `explore.py dimensions` found

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
        # A GPU's generator draws other numbers: with the CPU's, a seed is the same image everywhere.
        return torch.stack([torch.randn(width, generator=torch.Generator().manual_seed(s)) for s in seeds])

    @torch.inference_mode()
    def decode(self, y: Tensor | None, latents: Tensor) -> Tensor:
        """y float [B, Y] or None, latents [B, width] -> x [B, 3, size, size] float32 in [-1, 1]."""
        device = self.generator.last.weight.device
        return self.decoder(None if y is None else y.to(device), latents.to(device), self.convolved)

    def generate(self, y: Tensor | None, seeds: Sequence[int], truncation: float = 1.0) -> Tensor:
        """Images for the rows of y [B, Y] (None if unconditional), each from its own seed and y only.

        truncation scales the latents: below 1 more typical, less varied. Returns [B, 3, size, size] in [-1, 1].
        """
        return self.decode(y, truncation * self.latents(seeds))


def read(path: str | Path) -> dict:
    """The content of gan.pt. A snapshot is the decoder alone: the rest comes from its run's gan.pt."""
    path = Path(path).absolute()
    folder = checkpoints.run_folder(path)
    return (checkpoints.load(folder / "gan.pt", "gan") if folder != path.parent else {}) | checkpoints.load(path, "gan")


def load(path: str | Path, device: str | torch.device = "cpu") -> Network:
    """Rebuild a run's networks from its gan.pt, frozen and in eval mode, on `device`.

    Needs encoder.py and classifier.py beside this file. Raises click.ClickException if the file is missing or is not one
    of gan.py's checkpoints.
    """
    import classifier as stage2
    import encoder as stage1

    device, state = training.choose_device(device), read(path)
    data, labels = state["data"], state.get("labels")
    with checkpoints.reading(path):
        names = data["label_names"] if labels else []
        options = state["options"]
        decoder = checkpoints.rebuild(lambda: build_decoder(options, data["size"], len(names)), state["ema"])
        decoder.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        encoder = frozen_encoder(stage1.build(state["encoder"]), data["size"], device) if state.get("encoder") else None
        classifier = stage2.build(state["classifier"]).to(device) if state.get("classifier") else None
        balance = classifier.balance.cpu() if classifier else None
        if classifier and encoder and classifier.in_features != encoder.features:
            raise ValueError(f"a classifier of {classifier.in_features} features for an encoder of {encoder.features}")
        rows = None
        if labels:  # kept as distinct rows, and how often each of them occurs
            rows, counts = labels["rows"], labels["counts"]
            # Before they are repeated: a count in a damaged file may ask for any amount of memory.
            if counts.sum() != data["splits"]["train"]:
                raise ValueError("its labels are not those of its images")
            if not (rows.dtype == torch.uint8 and rows.max() <= 1 and counts.min() > 0):
                raise ValueError("its labels are not 0 and 1")
            if not rows.shape[1] == len(names) == (classifier.out_features if classifier else len(names)):
                raise ValueError(f"{len(names)} label names, but labels of {rows.shape[1]}")
            rows = rows.float().repeat_interleave(counts, dim=0)
        with torch.inference_mode():
            convolved = decoder.generator.convolved()
        kind = data["label_kind"] if labels else "none"
        return Network(
            decoder, encoder, classifier, balance, data, names, kind, rows, data["size"], state["images_seen"],
            options, convolved, state.get("dimensions"),
        )  # fmt: skip


def frozen_encoder(encoder: nn.Module, size: int, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """The encoder of stage 1 on `device`, rewritten for speed on images of `size`.

    It keeps `features`, their number, and the `fingerprint` of the weights as they were in the checkpoint.
    dtype: autocast's, where it runs under that alone: its weights are then converted once, and not at every update.
    """
    return freeze(encoder.to(device, memory_format=torch.channels_last), (3, size, size), dtype)


def grid(images: Tensor, columns: int) -> np.ndarray:
    """x [N, 3, H, W] in [-1, 1] -> one uint8 picture [rows * H, columns * W, 3], filled row by row."""
    tiles = training.to_uint8(images).cpu()
    N, H, W, _ = tiles.shape
    # White tiles fill the last row.
    tiles = torch.cat((tiles, tiles.new_full((-N % columns, H, W, 3), 255)))
    return tiles.view(-1, columns, H, W, 3).permute(0, 2, 1, 3, 4).reshape(-1, columns * W, 3).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def grid_inputs(trainer: Trainer, seed: int) -> tuple[Tensor | None, Tensor]:
    """Labels and latents of the grid, at most 64 images: a row has one label, a column one latent where y is one-hot.

    Of more than eight classes the first eight are drawn.
    """
    # A generator of its own: every snapshot has the same grid, and the random numbers of training stay as they are.
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randn(64, trainer.decoder.latent_width, generator=draw)
    y = None
    if trainer.kind == "one-hot":
        classes = trainer.labels.shape[1]
        rows = min(classes, 8)
        y, latents = torch.eye(classes)[:rows].repeat_interleave(8, dim=0), latents[:8].repeat(rows, 1)
    elif trainer.kind == "multi-label":
        # Rows of the data: fair coins would ask for combinations that no image has.
        rows = torch.randint(len(trainer.labels), (8,), generator=draw)
        y = trainer.labels.cpu()[rows].repeat_interleave(8, dim=0)
    return None if y is None else y.to(trainer.run.device), latents.to(trainer.run.device)


def save_grid(trainer: Trainer, path: Path, y: Tensor | None, latents: Tensor) -> np.ndarray:
    """Write the averaged decoder's images for fixed labels and latents, 8 in a row."""
    with torch.inference_mode():
        picture = grid(trainer.ema(y, latents), columns=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with checkpoints.atomic(path) as temporary:
        Image.fromarray(picture).save(temporary)
    return picture


@torch.inference_mode()
def logged_control(trainer: Trainer, n: int = 256) -> float:
    """Share of labels that the run's classifier finds as asked for, in n images of the averaged decoder.

    One-hot: share of images. The latents are the same each time.
    """
    # Of 256 images, a share near 1/2 has a standard error of 3 %. 64 at a time bounds the memory.
    draw = torch.Generator().manual_seed(0)
    y = trainer.labels[torch.randint(len(trainer.labels), (n,), generator=draw).to(trainer.run.device)]
    latents = torch.randn(n, trainer.decoder.latent_width, generator=draw).to(trainer.run.device)
    parts = []
    for some_y, some_latents in zip(y.split(64), latents.split(64), strict=True):
        x = trainer.ema(some_y, some_latents)
        with trainer.run.autocast():  # as in training, where the encoder may have weights of 16 bits
            parts.append(trainer.classifier(trainer.encoder(x)))
    logits = torch.cat(parts)
    right = logits.argmax(1) == y.argmax(1) if trainer.kind == "one-hot" else (logits > 0) == (y > 0.5)
    return right.float().mean().item()


def introduction(trainer: Trainer, data, images: int, total: int) -> str:
    """What is trained, on what, in two lines."""
    o, run = trainer.options, trainer.run
    names = ", ".join(data.label_names[:5]) + ", ..." * (len(data.label_names) > 5)
    labels = f"{len(data.label_names)} labels ({data.label_kind}: {names})" if trainer.kind != "none" else "no labels"
    millions = [f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M" for net in (trainer.decoder, trainer.D)]
    precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[run.dtype]
    return (
        f"{len(data):,} images of {data.size} px, {labels}; on {run.device} in {precision}, {run.world} process(es)\n"
        f"decoder {millions[0]}, {o['disc']} discriminator {millions[1]} parameters, loss {o['loss']}; "
        + (f"resuming at {images:,} images, " if images else "")
        + f"to {total:,} images"
    )


def lengths(options: dict, size: int) -> dict[str, int]:
    """Images that runs see by default and as published, for comparison with the length that is asked for."""
    named = {"the published": (PAPER[""] | PAPER.get(options["preset"], {}))["kimg"]}
    if options["protocol"] != "paper":
        named = {"the default": default_kimg(size)} | named
    return {f"{name} --kimg {kimg:g}": round(1000 * kimg) for name, kimg in named.items()}


def earlier_stages(outdir: Path, conditional: bool) -> tuple[dict | None, dict | None]:
    """The checkpoints of stages 1 and 2 in the run's folder, checked to belong together.

    An unconditional run takes the encoder along if there is a finished one, for its metrics.
    """
    if not conditional:
        encoder = checkpoints.load(outdir / "encoder.pt", "encoder") if (outdir / "encoder.pt").exists() else {}
        return encoder if "results" in encoder else None, None
    encoder = checkpoints.load(outdir / "encoder.pt", "encoder")
    classifier = checkpoints.load(outdir / "classifier.pt", "classifier", finished=True)
    # Features of another encoder have the same shape, and mean something else.
    if classifier["encoder_hash"] != checkpoints.fingerprint(encoder["model"]):
        raise click.ClickException(
            f"{outdir}/classifier.pt belongs to another encoder than {outdir}/encoder.pt: run classifier.py again"
        )
    return encoder, classifier


# fmt: off
OPTIONS = [
    click.option("--disc",          type=click.Choice(["global", "patch"]), default="global", help="Discriminator: one score per image, or one per patch."),
    click.option("--disc-layers",   metavar="N", type=click.IntRange(1, 8), help="Layers of --disc patch that halve the image.  [default: as many as leave 2x2 scores; 6 at 256 px]"),
    click.option("--per-class",     is_flag=True, help="One discriminator for each class, D(x | y); one-hot labels only."),
    click.option("--projection/--no-projection", default=None, help="Condition the global discriminator on y by projection: D(x | y) with a shared trunk.  [default: on; off with --per-class, --disc patch, --protocol paper]"),
    click.option("--width",         metavar="N", type=click.IntRange(1, 512), help="Channels of the decoder and the global discriminator at full size.  [default: 32 up to 32 px, then 16; --protocol paper: 16]"),
    click.option("--loss",          type=click.Choice(LOSSES), default="hinge", help="Adversarial loss; ns: non-saturating; hinge-v1, lsgan-published: as the published code has them."),
    click.option("--reg-every",     metavar="N", type=click.IntRange(0, 10**6), help="Iterations between classification regularisations; 0: never.  [default: 2]"),
    click.option("--reg-mode",      type=click.Choice(["separate", "joint"]), default="separate", help="Regularise by an update of its own, or in the adversarial one."),
    click.option("--reg-over",      type=click.Choice(["sum", "mean"]), help="Add up an image's attributes in the regularisation, or average them.  [default: sum; --protocol paper: mean]"),
    click.option("--reg-augment",   metavar="LIST|none", help="Augmentation of generated images before the encoder sees them: color,translation,cutout,crop or some of them.  [default: crop; none for critters, fashion-mnist and --protocol paper]"),
    click.option("--reg-clip/--no-reg-clip", default=None, help="Limit a regularisation's gradient to --reg-every times the adversarial one's norm.  [default: on; --protocol paper: off]"),
    click.option("--reg-stretch",   metavar="X", type=click.FloatRange(1, 1e6), help="Scale a smaller gradient up to --reg-clip's limit, X times at most.  [default: 2; 1 for critters, fashion-mnist and --protocol paper]"),
    click.option("--orth",          type=click.Choice(["penalty", "exact", "none"]), default="penalty", help="How the bases U are kept orthonormal."),
    click.option("--r1",            metavar="W", type=click.FloatRange(0, 1e6), help="Weight of the gradient penalty; 0: none.  [default: by --penalty; r1r2: 0.5 up to 32 px, then 0.25; r1: 10, for patches 10 (size/256)^2, but 10 under --protocol paper]"),
    click.option("--penalty",       type=click.Choice(["r1", "r1r2"]), help="Gradient penalty of D. r1: at real images, in an update of its own; r1r2: at real and generated images, in D's step.  [default: r1r2; --disc patch, --protocol paper: r1]"),
    click.option("--penalty-every", metavar="N", type=click.IntRange(1, 10**6), help="Iterations between gradient penalties; r1r2 counts N times then.  [default: r1r2: 4; r1: 16]"),
    click.option("--augment",       metavar="LIST|none", help="Augmentation of the discriminator's inputs: color,translation,cutout,crop or some of them.  [default: color,translation,cutout; none for critters and fashion-mnist, unless --protocol paper]"),
    click.option("--draw-y",        type=click.Choice(["data", "uniform"]), help="Labels of generated images in the adversarial game: as they occur in the data, or classes alike and fair coins. The regularisation always takes the data's.  [default: data; --protocol paper: uniform]"),
    click.option("--blur/--no-blur", default=None, help="Blur the decoder's maps where their size has doubled, against patterns of dots.  [default: on; off for critters, fashion-mnist and --protocol paper]"),
    click.option("--tanh-slope",    metavar="S", type=click.FloatRange(0, 1), help="In its gradient, count the slope of the decoder's tanh as at least S where that leads out of saturation; 0: its own.  [default: 0.05; 0 for critters, fashion-mnist and --protocol paper]"),
    click.option("--start",         type=click.Choice(["he", "torch"]), help="First weights: at He et al.'s scale, with smooth upsampling, or PyTorch's.  [default: he; --protocol paper: torch]"),
    click.option("--unconditional", is_flag=True, help="Vanilla EigenGAN: no labels, no regularisation; needs no earlier stage."),
    click.option("--lr",            metavar="RATE", type=click.FloatRange(0, 1e6, min_open=True), help="Learning rate of both Adams.  [default: 5e-4 up to 64 px, then 1e-4; --protocol paper: 1e-4]"),
    click.option("--beta1",         metavar="B", type=click.FloatRange(0, 1, max_open=True), help="Momentum of both Adams.  [default: 0; --disc patch, --protocol paper: 0.5]"),
    click.option("--lr-decay",      metavar="PART", type=click.FloatRange(0, 1), help="Over this last part of the run, the learning rate falls to 0.  [default: 0.5; --protocol paper: 0]"),
    click.option("--kimg",          metavar="KIMG", type=click.FloatRange(0, 1e6, min_open=True), help="Length in thousands of real images.  [default: 80 up to 64 px, then in proportion to the pixels; --protocol paper: 6400, celeba 12800]"),
    click.option("--graph",         type=click.Choice(["auto", "off"]), default="auto", help="Launch each update as one CUDA graph; auto: on one GPU, but not in fp16 or with --per-class."),
    click.option("--keep",          metavar="N", type=click.IntRange(1, 10**6), default=5, help="Snapshots to keep, the last ones, beside every tenth."),
    click.option("--snap",          metavar="KIMG", type=click.FloatRange(0, 1e6, min_open=True), help="Thousands of images between snapshots.  [default: a sixth of --kimg; --protocol paper: 200]"),
]
# fmt: on

# Options that a resumed run may change.
FREE = {
    "data", "kimg", "snap", "keep", "graph", "outdir", "precision", "tf32", "device", "workers", "resume", "init",
    "dry_run",
}  # fmt: skip


def default_kimg(size: int) -> float:
    """Thousands of images to train for by default: 80 up to 64 px, and in proportion to the pixels above.

    At 32 px, where CPUs train by default, all three stages then take less than half an hour on two cores.
    """
    return 80.0 * max(1, size / 64) ** 2


def set_by_size(options: dict) -> None:
    """Set the options whose default depends on others, and on the size of the images once that is known."""
    patch, size = options["disc"] == "patch", options["size"]
    # Patches take no y, one discriminator per class knows it already, and without labels there is none.
    if patch or options["per_class"] or options["unconditional"]:
        options["projection"] = False
    # Found by trying: with the global discriminator, both penalties and no momentum keep classes from collapsing; with
    # patches and their batch norm the pictures get worse.
    options["penalty"] = options["penalty"] or ("r1" if patch else "r1r2")
    # r1: 16 is published. r1r2: with 4, FD was 13 +- 14 above that with 1 after the same 15,000 images of critters (six
    # runs a side), in 0.75 of the time.
    options["penalty_every"] = options["penalty_every"] or (16 if options["penalty"] == "r1" else 4)
    if not size:
        return
    if patch and options["disc_layers"] is None:
        options["disc_layers"] = patch_layers(size)
    # r1r2: at 64 px, a weight of 2 made D blind, and 0.02 gave worse pictures than 0.2. r1: 10 is published; at 32 px
    # it kept the patch discriminator so flat that the decoder saturated, but not when scaled by area.
    r1 = 10 * (size / 256) ** 2 if patch and options["protocol"] != "paper" else 10.0
    if options["penalty"] == "r1r2":
        r1 = 0.5 if size <= 32 else 0.25
    # Small images take a higher rate, smaller batches and wider maps, found by trying at 32 px; else as published.
    batch, lr = (16, 5e-4) if size <= 64 else (32, 1e-4)
    kimg = options["kimg"] or default_kimg(size)
    # width: FD 265 with 32, 454 with the published 16 (critters, 15,000 images, three seeds). Above 32 px, 32 takes too
    # long on CPUs.
    # beta1 0: better pictures, of more kinds of animals (critters, 30,000 images, one seed); 0.5 is published.
    width, beta1 = 32 if size <= 32 else 16, 0.5 if patch else 0.0
    by_size = dict(width=width, batch=batch, lr=lr, beta1=beta1, r1=r1, kimg=kimg, snap=kimg / 6)
    options |= {name: value for name, value in by_size.items() if options[name] is None}


def default_options(size: int, **given) -> dict:
    """What `Trainer` takes, for images of `size`: the defaults of the command for any data, and the options given."""
    # By the command's own parser, so that the defaults stand in one place.
    options = click.Command.make_context(main, "gan.py", []).params | {"size": size} | given
    options = training.resolve(PRESETS, PAPER, "", options)
    set_by_size(options)
    return options


def check_options(options: dict, given: dict) -> None:
    """Raise click.UsageError for options that contradict each other; given: as the user gave them."""
    # As long as the size is not known, 8: the most layers for the largest images, 1024 px.
    size, most = options["size"], patch_layers(options["size"]) if options["size"] else 8
    patch, never = options["disc"] == "patch", options["unconditional"] or options["reg_every"] == 0
    for bad, why in (
        (patch and most < 3, f"--disc patch needs images of at least 32 px, not {size}: use --disc global"),
        (patch and (options["disc_layers"] or 1) > most, f"--disc-layers: images of {size} px are enough for {most}"),
        (options["disc_layers"] and not patch, "--disc-layers goes with --disc patch"),
        (given["projection"] and (patch or options["per_class"] or options["unconditional"]),
         "--projection goes with --disc global, without --per-class or --unconditional"),
        (options["per_class"] and options["unconditional"], "--per-class needs labels, --unconditional has none"),
        (given["penalty_every"] and options["r1"] == 0, "--penalty-every: with --r1 0 there is no penalty"),
        (options["unconditional"] and options["reg_mode"] == "joint", "--reg-mode joint needs labels"),
        *((options["unconditional"] and given[name], f"--{name.replace('_', '-')} needs labels, --unconditional has none")
          for name in ("draw_y", "reg_every")),
        (options["reg_every"] == 0 and options["reg_mode"] == "joint", "--reg-mode joint goes with --reg-every of at least 1"),
        *((never and given[name], f"--{name.replace('_', '-')} is for the regularisation: not with --unconditional or --reg-every 0")
          for name in ("reg_over", "reg_augment", "reg_clip", "reg_stretch")),
        (given["reg_clip"] and options["reg_mode"] == "joint", "--reg-clip limits a regularisation of its own, not a joint one"),
        (given["reg_stretch"] and (options["reg_mode"] == "joint" or not options["reg_clip"]),
         "--reg-stretch goes with --reg-clip and --reg-mode separate"),
        *((options[name] != "none" and set(options[name].split(",")) - AUGMENTATIONS,
           f"--{name.replace('_', '-')} {options[name]}: choose from color, translation, cutout, crop, separated by commas, or none")
          for name in ("augment", "reg_augment")),
    ):  # fmt: skip
        if bad:
            raise click.UsageError(why)


@click.command(cls=training.OneLine, context_settings=dict(max_content_width=120, show_default=True))
@training.with_options(OPTIONS)
def main(**options):
    """Train the decoder (stage 3); needs encoder.pt and classifier.pt in the output folder unless --unconditional.

    Writes gan.pt (latest), snapshots/, samples/, stats.jsonl and tensorboard/ to the output folder. The same command
    again goes on where it stopped.
    """
    # Here, not at the top: the networks and the updates need none of these files.
    import classifier as stage2
    import dataset
    import encoder as stage1
    import layouts

    # Resolve the options.
    # Eight iterations of eight images, and two snapshots.
    smoke = {"batch": 8, "width": 4, "kimg": 0.064, "snap": 0.032} if options["smoke"] else {}
    options |= {name: value for name, value in smoke.items() if options[name] is None}
    # Before the defaults are filled in: only what the user asked for can be a contradiction.
    given = dict(options)
    preset = layouts.preset_of(options["data"], options["preset"])
    options = training.resolve(PRESETS, PAPER, preset, options)
    outdir = training.out_folder(options)
    options["size"] = options["size"] or layouts.DATASETS.get(preset)
    check_options(options, given)
    if options["dry_run"]:
        set_by_size(options)
        constants = dict(noise=NOISE, basis=BASIS, beta2=BETA2, orth_weight=ORTH, ema_half_life=EMA_HALF_LIFE)
        return click.echo(json.dumps(options | constants, indent=2))

    # Set up the device, the earlier stages and the data.
    run = training.start(options["device"], options["precision"], options["seed"], options["tf32"])
    conditional = not options["unconditional"]
    encoder_pt, classifier_pt = run.first(lambda: earlier_stages(outdir, conditional))
    start = run.first(lambda: checkpoints.load_init(options["init"], "gan")) if options["init"] else None
    remedy = "give the same --data and --size to all stages, or run the earlier stages again"
    if encoder_pt and options["size"]:  # before images of another size are packed
        checkpoints.check_same(encoder_pt["data"], options, ("size",), outdir / "encoder.pt", remedy)
    run.first(lambda: checkpoints.check_size(outdir / "gan.pt", "gan", options))
    how = {"preset": options["preset"], "squash": options.pop("squash"), "train_on_all": options.pop("train_on_all")}
    if encoder_pt:  # all stages see the same images
        how = dataset.same_images(encoder_pt["data"]) | {"preset": options["preset"]}
    size = options["size"] or (encoder_pt["data"]["size"] if encoder_pt else None)
    attributes = classifier_pt["data"]["attributes"] if classifier_pt else None
    data = dataset.open_dataset(options["data"], size, "train", most=dataset.most_by_default(run.device), **how)
    for checkpoint, file in ((encoder_pt, "encoder.pt"), (classifier_pt, "classifier.pt")):
        if checkpoint:
            checkpoints.check_same(checkpoint["data"], data.info(), ("fingerprint", "size"), outdir / file, remedy)
    if classifier_pt and "assignments" in classifier_pt:  # internal attributes: y is the cluster of the embedding
        names = classifier_pt["data"]["label_names"]
        data.labels = np.eye(len(names), dtype=np.float32)[classifier_pt["assignments"]["train"].numpy()]
        data.label_names, data.label_kind, data.attributes = names, "one-hot", attributes
    elif classifier_pt:
        data = data.part("train", attributes)
    kind = data.label_kind if conditional else "none"
    if kind == "multi-label" and options["per_class"]:
        raise click.UsageError(
            "--per-class: images with several attributes belong to no single class; use one-hot labels"
        )
    if kind == "one-hot" and given["reg_over"]:
        raise click.UsageError("--reg-over is for several attributes that an image can have at once, not for classes")
    options |= {"size": data.size, "attributes": attributes}
    check_options(options, given)  # again, now that the size is known
    set_by_size(options)
    if options["batch"] % run.world:
        raise click.UsageError(f"--batch {options['batch']} must be a multiple of the {run.world} processes")

    # Build the networks.
    with checkpoints.reading(f"{outdir / 'encoder.pt'} or {outdir / 'classifier.pt'}"):
        encoder = None
        if classifier_pt:
            encoder = frozen_encoder(stage1.build(encoder_pt), data.size, run.device, run.dtype)
        classifier = stage2.build(classifier_pt).to(run.device) if classifier_pt else None
    labels = torch.from_numpy(np.asarray(data.labels)) if conditional else None
    trainer = Trainer(options, run, labels, kind, encoder, classifier)

    # Take first weights from another run, or go on from this one's checkpoint.
    checkpoint, images, iteration, anew = outdir / "gan.pt", 0, 0, ""
    if start:
        checkpoints.init_weights(trainer.decoder, start["ema"], options["init"])
        trainer.ema.load_state_dict(trainer.decoder.state_dict())  # the average starts from the same weights
        # Where one of these differs, D is another network, and cannot take the weights of the file.
        other = [k for k in ("disc", "disc_layers", "per_class", "projection") if start["options"].get(k) != options[k]]
        if "trainer" in start and not other:
            checkpoints.init_weights(trainer.D, start["trainer"]["D"], options["init"])
        else:  # snapshots and exports leave it out
            anew = f"has another --{other[0].replace('_', '-')}" if other else "holds none"
    keys = sorted(options.keys() - FREE)
    # Older checkpoints do not name penalty_every.
    older = BEFORE | {"penalty_every": 1 if options["penalty"] == "r1r2" else 16}
    state = run.first(lambda: checkpoints.resume(checkpoint, "gan", options, data, keys, older))
    run.agree({"images": data.fingerprint, "options": {name: options[name] for name in keys}})
    if anew and not state and run.rank == 0:
        click.echo(f"--init {options['init']} {anew}: the discriminator starts anew")
    if state:
        remedy = "start over with --no-resume, or give another --outdir"
        checkpoints.check_same(state["data"], data.info(), ("size", "label_kind", "label_names"), checkpoint, remedy)
        if "trainer" not in state:
            raise click.ClickException(f"{checkpoint} is a snapshot, without what training goes on from: {remedy}")
        with checkpoints.reading(checkpoint):
            for name, stage in (("encoder", encoder_pt), ("classifier", classifier_pt)):
                theirs, ours = (s and checkpoints.fingerprint(s["model"]) for s in (state.get(name), stage))
                if conditional and theirs and ours and theirs != ours:
                    raise click.ClickException(f"{checkpoint} was trained with another {name}.pt: {remedy}")
            trainer.load_state(state["trainer"], state["ema"])
            images, iteration = state["images_seen"], int(state["iteration"])
    total = max(1, round(1000 * options["kimg"]))
    if images >= total:
        if run.rank == 0:
            click.echo(
                f"{checkpoint} has seen {images} images already: --no-resume starts over; --kimg goes on"
                + ", at a learning rate that --lr-decay makes begin higher again" * (options["lr_decay"] > 0)
            )
        return

    # Train.
    rows, counts = torch.unique(labels, dim=0, return_counts=True) if conditional else (None, None)
    facts = {
        "stage": "gan", "data": data.info(), "options": options,
        "labels": {"rows": rows.byte(), "counts": counts} if conditional else None,
    }  # fmt: skip
    # gan.pt takes the earlier stages along, so that pictures and metrics need this one file.
    stages = {
        "encoder": {key: encoder_pt[key] for key in ("config", "model", "data")} if encoder_pt else state.get("encoder"),
        "classifier": {key: classifier_pt[key] for key in ("config", "model", "data", "balance")} if classifier_pt else None,
    }  # fmt: skip
    with (
        training.lock(outdir, "gan", run.rank),
        training.signals(run),
        training.Log(outdir, "gan", total, images, rank=run.rank, lengths=lengths(options, data.size)) as log,
    ):
        if run.rank == 0:
            training.write_options(outdir / "gan.json", options)
            click.echo(introduction(trainer, data, images, total))
        fixed = grid_inputs(trainer, options["seed"])
        snap = max(round(1000 * options["snap"]), options["batch"])  # an iteration saves at most once
        batches = data.batches(trainer.batch, run.device, run.seed, images, run.rank, run.world, options["workers"])
        for real, y in batches:
            # Train on one batch, count, log.
            run.reseed(images)  # a resumed run draws the same numbers
            try:
                stats = trainer.iteration(iteration, training.to_float(real), y if conditional else None)
            except CaptureError as error:
                raise click.ClickException(f"{error}: give --graph off") from error
            log.add(**stats)
            before, images, iteration = images, images + options["batch"], iteration + 1
            log.step(options["batch"])
            done, stopping = images >= total, run.stopping(iteration)
            # Whenever a multiple of `snap` has been passed: with most batches, images never hit one.
            due = done or images // snap > before // snap
            control = {"control": logged_control(trainer)} if due and run.rank == 0 and trainer.classifier else {}
            if due or stopping or images // LOG_EVERY > before // LOG_EVERY:
                log.write(images, **control)
                # Only beside a line of the log: both wait for the device.
                training.check_finite([trainer.step_g, trainer.step_d], images, options)

            # Save now and then a snapshot and a picture, then the networks: a run that is killed amid it does it again.
            if due or stopping:
                if run.rank == 0:
                    state = facts | {"images_seen": images, "iteration": iteration, "ema": trainer.ema.state_dict()}
                    if due:
                        snapshot = outdir / "snapshots" / f"gan-{images:08d}.pt"
                        # The decoder alone, so that many can be kept; every tenth stays for good.
                        checkpoints.save_snapshot(snapshot, state, options["keep"], 10 * snap)
                        with log.on_disk("a picture"):
                            picture = save_grid(trainer, outdir / "samples" / f"{images:08d}.png", *fixed)
                            log.picture("samples", picture, images)
                    state |= stages | {"trainer": trainer.state()}
                    # On a full disk a save in the middle is skipped with a warning; the last one raises an error.
                    checkpoints.save(checkpoint, state, must=bool(done or stopping))
                run.wait()
            if stopping and not done:
                raise training.Stopped(stopping, f"stopped and saved at {images:,} images")
            if done:
                break
        batches.close()  # ends the threads that prepare batches
    if run.rank == 0:
        click.echo(f"wrote {checkpoint} and {outdir / 'samples'}")


if __name__ == "__main__":
    main()
