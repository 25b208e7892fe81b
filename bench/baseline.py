"""The plain baseline: the networks and updates of stage 3, written the usual way, and both sides built to compare.

The same functions as gan.py's, with nothing done for speed: NCHW, a convolution of phi for each image of the batch,
standard modules and optimisers, nothing frozen or folded, all gradients kept. Benchmarks time it; the tests take it for
the reference. Weights, labels and random numbers come from a gan.Trainer, so both sides compute the same numbers.
"""

import itertools

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import encoder
import gan
import training

NOISE, BASIS = 512, 6  # widths of the mapper's noise and of a subspace (the paper's)
R1_EVERY = 16  # iterations between penalties, as published
EMA_HALF_LIFE = 10_000  # images, as published

# ---------------------------------------------------------------------------------------------------------------------
# Networks.


class PlainSubspace(nn.Module):
    """phi = U (L * z) + mu, flattened: z [B, 6] -> [B, C * r * r]."""

    def __init__(self, width: int):
        super().__init__()
        # Left uninitialised: `take` brings the weights of our side.
        self.U, self.L = nn.Parameter(torch.empty(BASIS, width)), nn.Parameter(torch.empty(BASIS))
        self.mu = nn.Parameter(torch.empty(width))

    def forward(self, z: Tensor) -> Tensor:
        return (self.L * z) @ self.U + self.mu


class PlainBlock(nn.Module):
    """A generator layer: h [B, C, r, r], z [B, 6] -> [B, C', 2r, 2r]."""

    def __init__(self, C: int, wider: int, resolution: int):
        super().__init__()
        up = dict(kernel_size=3, stride=2, padding=1, output_padding=1)
        self.shape = C, resolution, resolution
        self.subspace = PlainSubspace(C * resolution**2)
        self.subspace_conv1 = nn.Conv2d(C, C, 1)
        self.feature_conv1 = nn.ConvTranspose2d(C, wider, **up)
        self.subspace_conv2 = nn.ConvTranspose2d(C, wider, **up)
        self.feature_conv2 = nn.Conv2d(wider, wider, 3, padding=1)
        self.act = nn.LeakyReLU(0.2)  # EigenGAN's slope

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        phi = self.subspace(z).view(-1, *self.shape)
        h = self.feature_conv1(self.act(h + self.subspace_conv1(phi)))
        return self.feature_conv2(self.act(h + self.subspace_conv2(phi)))


# Options of our side that make it train what the plain side trains.
# It has nothing of what our defaults add to the published settings, so these switch that off.
PLAIN = dict(
    width=16, projection=False, lr_decay=0.0, beta1=0.5, reg_clip=False, penalty="r1", reg_augment="none", blur=False,
    tanh_slope=0.0,
)  # fmt: skip


class PlainDecoder(nn.Module):
    """Mapper and generator: y [B, labels], latents [B, NOISE + layers * BASIS] -> x [B, 3, size, size] in [-1, 1]."""

    def __init__(self, size: int, labels: int):
        super().__init__()
        self.embed, self.mapper = nn.Linear(labels, labels), nn.Linear(labels + NOISE, NOISE)
        # Resolutions from 4x4 up, each with its channels: 16 at full size, doubling toward 4x4, 512 at most.
        at = [(r, min(16 * size // r, 512)) for r in (4 * 2**i for i in range(size.bit_length() - 2))]
        self.first = nn.Linear(NOISE, 16 * at[0][1])
        self.blocks = nn.ModuleList(PlainBlock(C, at[i + 1][1], r) for i, (r, C) in enumerate(at[:-1]))
        self.last = nn.Conv2d(at[-1][1], 3, 7, padding=3)

    def forward(self, y: Tensor, latents: Tensor) -> Tensor:
        noise, z = latents[:, :NOISE], latents[:, NOISE:].unflatten(1, (-1, BASIS))
        h = self.first(self.mapper(torch.cat((self.embed(y), noise), 1))).view(len(y), -1, 4, 4)
        for i, block in enumerate(self.blocks):
            h = block(h, z[:, i])
        return torch.tanh(self.last(F.leaky_relu(h, 0.2)))

    def take(self, ours: gan.Decoder) -> None:
        """Copy the weights of a gan.Decoder, which stores the maps of the first layer and of the subspaces NHWC."""
        G = ours.generator
        own = {name: value for name, value in ours.state_dict().items() if not name.startswith("generator")}
        own |= {n: v for n, v in G.state_dict().items() if not n.startswith("first")}
        for i, block in enumerate(G.blocks):
            own[f"blocks.{i}.subspace.U"] = block.subspace.U.transpose(1, 2).flatten(1)
            own[f"blocks.{i}.subspace.mu"] = block.subspace.mu.permute(2, 0, 1).flatten()
        # 16 = 4 x 4 places. Ours puts them before the channels; `view` here wants them after.
        own["first.weight"] = G.first.weight.unflatten(0, (16, -1)).transpose(0, 1).flatten(0, 1)
        own["first.bias"] = G.first.bias.unflatten(0, (16, -1)).T.flatten()
        self.load_state_dict(own)

    def orthogonality(self) -> Tensor:
        """Mean over layers of mean((U U^T - I)^2)."""
        losses = []
        for block in self.blocks:
            U = block.subspace.U
            losses.append((U @ U.T - torch.eye(BASIS, device=U.device, dtype=U.dtype)).square().mean())
        return torch.stack(losses).mean()


def plain_discriminator(kind: str, size: int) -> nn.Sequential:
    """kind 'global': a logit per image, [B, 1]; 'patch': one per 70x70 patch, [B, 1, h, w]. size: of the images."""
    act = nn.LeakyReLU(0.2)
    if kind == "patch":
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 4, 2, 1), act]
        for C, stride in ((64, 2), (128, 2), (256, 1)):
            # No bias: batch norm shifts by one of its own.
            layers += [nn.Conv2d(C, 2 * C, 4, stride, 1, bias=False), nn.BatchNorm2d(2 * C), act]
        return nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 1, 1))
    widths = [min(16 * 2**i, 512) for i in range(size.bit_length() - 2)]  # down to 4x4
    layers = [nn.Conv2d(3, widths[0], 7, padding=3), act]
    for C, wider in itertools.pairwise(widths):
        layers += [nn.Conv2d(C, C, 3, padding=1), act, nn.Conv2d(C, wider, 3, 2, padding=1), act]
    C = widths[-1]
    layers += [nn.Conv2d(C, C, 3, padding=1), act, nn.Flatten(), nn.Linear(16 * C, C), act, nn.Linear(C, 1)]
    return nn.Sequential(*layers)


def take_discriminator(plain: nn.Sequential, ours: nn.Module) -> None:
    """Copy the weights of gan.py's discriminator of the same kind, layer by layer."""

    def layers(network: nn.Module) -> list[nn.Module]:
        return [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]

    for to, source in zip(layers(plain), layers(ours), strict=True):
        state = source.state_dict()
        if to.bias is not None and source.bias is None:  # that of the hidden layer is an argument of the fused op
            state["bias"] = ours.hidden_bias
        to.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation and losses.


def plain_augment(x: Tensor, policy: str, p: float = 0.6) -> Tensor:  # p: as published
    """Differentiable augmentation with index tensors, from the same random numbers as gan.augment.

    policy: 'none', or all of color, translation and cutout.
    """
    B, _, H, W = x.shape
    # All drawn at once, used or not, as gan.augment does: so both sides meet the same numbers next.
    coins = (torch.rand(5) < p).tolist()
    u = torch.rand(7, B, 1, 1, 1, device=x.device, dtype=x.dtype)
    if policy == "none":
        return x
    # Ranges of Zhao et al. 2020: brightness +-0.5, saturation times 0 to 2, contrast times 0.5 to 1.5.
    if coins[0]:
        x = x + (u[0] - 0.5)
    if coins[1]:
        grey = x.mean(dim=1, keepdim=True)
        x = (x - grey) * (2 * u[1]) + grey
    if coins[2]:
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = (x - mean) * (u[2] + 0.5) + mean
    batch, rows, columns = torch.meshgrid(torch.arange(B), torch.arange(H), torch.arange(W), indexing="ij")
    # Shifts by up to an eighth of a side.
    if coins[3]:
        down, right = (
            ((2 * (s // 8) + 1) * v).floor().long().view(B, 1, 1) - s // 8 for s, v in ((H, u[3]), (W, u[4]))
        )
        padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # what moves in from outside is this border
        r, c = (rows - down + 1).clamp(0, H + 1), (columns - right + 1).clamp(0, W + 1)
        x = padded[batch, r, c].permute(0, 3, 1, 2).contiguous()
    # A hole of half a side, whose centre is anywhere: a part of it may lie outside.
    if coins[4]:
        top, left = ((s + 1 - s // 2 % 2) * v for s, v in ((H, u[5]), (W, u[6])))
        top, left = (v.floor().long().view(B, 1, 1) - s // 4 for s, v in ((H, top), (W, left)))
        batch, rows, columns = batch[:, : H // 2, : W // 2], rows[:, : H // 2, : W // 2], columns[:, : H // 2, : W // 2]
        inside = (
            ((rows + top >= 0) & (rows + top < H) & (columns + left >= 0) & (columns + left < W)).nonzero().unbind(1)
        )
        mask = torch.ones(B, H, W, dtype=x.dtype)
        mask[batch[inside], (rows + top)[inside], (columns + left)[inside]] = 0
        x = x * mask.unsqueeze(1)
    return x


def plain_loss_d(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: hinge, ns (non-saturating) or lsgan with targets 1 and 0."""
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "ns":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    return (F.mse_loss(real, torch.ones_like(real)) + F.mse_loss(fake, torch.zeros_like(fake))) / 2


def plain_loss_g(kind: str, fake: Tensor) -> Tensor:
    """The generator's loss that goes with it."""
    if kind == "hinge":
        return -fake.mean()
    return F.softplus(-fake).mean() if kind == "ns" else F.mse_loss(fake, torch.ones_like(fake)) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Updates.


class PlainTrainer:
    """The four updates in the usual way, with the weights and the random numbers of a gan.Trainer, for one-hot labels.

    encoder, classifier: in eval mode. Updates return their loss, R1 and orthogonality with their weights.
    """

    def __init__(self, ours: gan.Trainer, encoder: nn.Module, classifier: nn.Module):
        self.options, self.batch, self.labels = ours.options, ours.batch, ours.labels
        self.latent_width = ours.decoder.latent_width
        self.encoder, self.classifier = encoder, classifier
        dtype, size, labels = next(ours.decoder.parameters()).dtype, self.options["size"], self.labels.shape[1]
        # The dtype of our side: tests compare the two in float64.
        self.decoder, self.ema = (PlainDecoder(size, labels).to(dtype) for _ in range(2))
        self.D = plain_discriminator(self.options["disc"], size).to(dtype)
        self.take(ours)
        adam = dict(lr=self.options["lr"], betas=(0.5, 0.99))  # as published
        self.opt_g = torch.optim.Adam(self.decoder.parameters(), **adam)
        self.opt_d = torch.optim.Adam(self.D.parameters(), **adam)

    def take(self, ours: gan.Trainer) -> None:
        """Copy the weights of all three networks."""
        self.decoder.take(ours.decoder)
        self.ema.take(ours.decoder)
        take_discriminator(self.D, ours.D)

    def fake(self) -> tuple[Tensor, Tensor]:
        """A batch of generated images and the labels they were generated for."""
        # Labels first, then latents: gan.Trainer draws in this order.
        y = self.labels[torch.randint(len(self.labels), (self.batch,))]
        latents = torch.randn(self.batch, self.latent_width, dtype=y.dtype)
        return self.decoder(y, latents), y

    def step(self, loss: Tensor, optimiser: torch.optim.Optimizer) -> Tensor:
        for network in (self.decoder, self.D, self.encoder, self.classifier):
            network.zero_grad()  # all of them, because nothing is frozen
        loss.backward()
        optimiser.step()
        return loss.detach()

    def regularise(self) -> Tensor:
        x, y = self.fake()
        return self.step(F.cross_entropy(self.classifier(self.encoder(x)), y), self.opt_g)

    def discriminate(self, real: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            fake, _ = self.fake()
        real, fake = (plain_augment(x, self.options["augment"]) for x in (real, fake))
        return self.step(plain_loss_d(self.options["loss"], self.D(real), self.D(fake)), self.opt_d)

    def penalise(self, real: Tensor, y: Tensor) -> Tensor:
        # As published: through the augmentation, without the usual 1/2, in a step of its own.
        x = real.clone().requires_grad_()
        score = self.D(plain_augment(x, self.options["augment"]))
        (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        return self.step(self.options["r1"] * gradient.square().sum(dim=(1, 2, 3)).mean(), self.opt_d)

    def generate(self) -> Tensor:
        x, _ = self.fake()
        score = self.D(plain_augment(x, self.options["augment"]))
        # 100: the published weight of the orthogonality penalty.
        return self.step(plain_loss_g(self.options["loss"], score) + 100 * self.decoder.orthogonality(), self.opt_g)

    def average(self, images: int) -> None:
        """The moving average of the decoder's weights after `images` images."""
        # images / 40, as in gan.py: else short runs would keep their start.
        decay = 0.5 ** (self.options["batch"] / min(EMA_HALF_LIFE, images / 40))
        with torch.no_grad():
            for p, q in zip(self.ema.parameters(), self.decoder.parameters(), strict=True):
                p.mul_(decay).add_(q, alpha=1 - decay)

    def iteration(self, i: int, real: Tensor, y: Tensor) -> None:
        # First, as in the published code; gan.py does it last. The work is the same.
        if i % self.options["reg_every"] == 0:
            self.regularise()
        self.discriminate(real, y)
        if i % R1_EVERY == 0:
            self.penalise(real, y)
        self.generate()
        self.average((i + 1) * self.options["batch"])


# ---------------------------------------------------------------------------------------------------------------------
# Both sides, with the same weights.


def build(side: str, size: int, batch: int, disc: str, backbone: str, loss: str = "lsgan"):
    """The trainer of one side: 'ours' and 'plain' in fp32, 'bf16' ours in mixed precision.

    disc: 'global' or 'patch'. backbone: of the frozen encoder, with an ImageNet stem and random weights.
    """
    layers = 3 if disc == "patch" else None  # pix2pix's discriminator, as `plain_discriminator` has it
    options = gan.default_options(size, batch=batch, disc=disc, disc_layers=layers, loss=loss, **PLAIN)
    # Any seed, but the same for both sides.
    torch.manual_seed(0)
    resnet = getattr(torchvision.models, backbone)()
    features, resnet.fc = resnet.fc.in_features, nn.Identity()
    classifier = nn.Linear(features, 3)
    run = training.Run(torch.device("cpu"), torch.bfloat16 if side == "bf16" else None, 0)
    if side == "plain":
        return PlainTrainer(gan.Trainer(options, run, torch.eye(3), "one-hot"), resnet.eval(), classifier)
    theirs = resnet.state_dict()
    state = encoder.Encoder(backbone, "imagenet").state_dict()
    # mean 0 and std 1: torchvision's network normalises nothing either.
    config = dict(backbone=backbone, stem="imagenet", mean=(0.0,) * 3, std=(1.0,) * 3)
    # The projection has no counterpart there; it keeps its own weights, which nothing uses.
    model = {name: theirs.get(name.removeprefix("backbone."), value) for name, value in state.items()}
    frozen = gan.frozen_encoder(encoder.build({"config": config, "model": model}), size, run.device, run.dtype)
    return gan.Trainer(options, run, torch.eye(3), "one-hot", frozen, classifier.requires_grad_(False))


def both_losses(sides: tuple, update: str, arguments: tuple) -> list[float]:
    """The loss of one update on each side, from the same random numbers."""
    losses = []
    for side in sides:
        torch.manual_seed(5)  # any seed, but the same for both
        loss = getattr(side, update)(*arguments)
        losses.append((next(iter(loss.values())) if isinstance(loss, dict) else loss).item())
    return losses
