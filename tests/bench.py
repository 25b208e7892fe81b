"""Time the ops, the training step, metrics and data loading against the usual ways; prints a table, saves JSON.

    make bench        or        python tests/bench.py --quick --out bench.json

Every comparison is made within this one run, its sides taking turns; figures are medians with their quartiles. The
training step is compared with a plain baseline that stands below: the same networks, losses and augmentation written
the usual way (NCHW, convolutions over the batch, nothing frozen, standard modules, ImageFolder with two workers). Each
side has a process of its own.
"""

import importlib
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import click
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import dataset
import gan
import training

# ---------------------------------------------------------------------------------------------------------------------
# The plain baseline.


class PlainSubspace(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.U, self.L = nn.Parameter(torch.empty(gan.BASIS, width)), nn.Parameter(torch.empty(gan.BASIS))
        self.mu = nn.Parameter(torch.empty(width))

    def forward(self, z: Tensor) -> Tensor:
        return (self.L * z) @ self.U + self.mu


class PlainBlock(nn.Module):
    def __init__(self, C: int, wider: int, resolution: int):
        super().__init__()
        up = dict(kernel_size=3, stride=2, padding=1, output_padding=1)
        self.shape = C, resolution, resolution
        self.subspace = PlainSubspace(C * resolution**2)
        self.subspace_conv1 = nn.Conv2d(C, C, 1)
        self.feature_conv1 = nn.ConvTranspose2d(C, wider, **up)
        self.subspace_conv2 = nn.ConvTranspose2d(C, wider, **up)
        self.feature_conv2 = nn.Conv2d(wider, wider, 3, padding=1)
        self.act = nn.LeakyReLU(0.2)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        phi = self.subspace(z).view(-1, *self.shape)
        h = self.feature_conv1(self.act(h + self.subspace_conv1(phi)))
        return self.feature_conv2(self.act(h + self.subspace_conv2(phi)))


class PlainDecoder(nn.Module):
    def __init__(self, size: int, labels: int):
        super().__init__()
        self.embed, self.mapper = nn.Linear(labels, labels), nn.Linear(labels + gan.NOISE, gan.NOISE)
        at = [(r, gan.channels_at(size, r)) for r in (4 * 2**i for i in range(size.bit_length() - 2))]
        self.first = nn.Linear(gan.NOISE, 16 * at[0][1])
        self.blocks = nn.ModuleList(PlainBlock(C, at[i + 1][1], r) for i, (r, C) in enumerate(at[:-1]))
        self.last = nn.Conv2d(at[-1][1], 3, 7, padding=3)

    def forward(self, y: Tensor, latents: Tensor) -> Tensor:
        noise, z = latents[:, : gan.NOISE], latents[:, gan.NOISE :].unflatten(1, (-1, gan.BASIS))
        h = self.first(self.mapper(torch.cat((self.embed(y), noise), 1))).view(len(y), -1, 4, 4)
        for i, block in enumerate(self.blocks):
            h = block(h, z[:, i])
        return torch.tanh(self.last(F.leaky_relu(h, 0.2)))

    def take(self, ours: gan.Decoder) -> None:
        """Copy our weights, whose maps are stored NHWC."""
        G = ours.generator
        own = {name: value for name, value in ours.state_dict().items() if not name.startswith("generator")}
        own |= {n: v for n, v in G.state_dict().items() if not n.startswith("first") and n != "last_bias"}
        for i, block in enumerate(G.blocks):
            own[f"blocks.{i}.subspace.U"] = block.subspace.U.permute(0, 3, 1, 2).flatten(1)
            own[f"blocks.{i}.subspace.mu"] = block.subspace.mu.permute(2, 0, 1).flatten()
        own["first.weight"] = G.first.weight.unflatten(0, (16, -1)).transpose(0, 1).flatten(0, 1)
        own["first.bias"] = G.first.bias.unflatten(0, (16, -1)).T.flatten()
        own[f"blocks.{len(G.blocks) - 1}.feature_conv2.bias"] = G.last_bias
        self.load_state_dict(own)

    def orthogonality(self) -> Tensor:
        losses = []
        for block in self.blocks:
            U = block.subspace.U
            losses.append((U @ U.T - torch.eye(gan.BASIS, device=U.device, dtype=U.dtype)).square().mean())
        return torch.stack(losses).mean()


def plain_discriminator(ours: nn.Module) -> nn.Module:
    """The same network of standard modules, with a copy of our weights."""
    layers: list[nn.Module] = []
    act = nn.LeakyReLU(0.2)

    def copy(kind, theirs, *args, **kwargs):
        module = kind(*args, **kwargs)
        module.load_state_dict(theirs)
        return module

    convs = ours.features if isinstance(ours, gan.GlobalDiscriminator) else ours.layers
    for c in convs:
        conv = c.conv if isinstance(c, gan.ConvNormLrelu) else c
        args = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding
        layers.append(copy(nn.Conv2d, conv.state_dict(), *args, bias=conv.bias is not None))
        if isinstance(c, gan.ConvNormLrelu):
            layers.append(copy(nn.BatchNorm2d, c.norm.state_dict(), conv.out_channels))
        if type(c) is not nn.Conv2d:
            layers.append(act)
    if isinstance(ours, gan.GlobalDiscriminator):
        hidden = {"weight": ours.hidden.weight, "bias": ours.hidden_bias}
        layers += [nn.Flatten(), copy(nn.Linear, hidden, ours.hidden.in_features, ours.hidden.out_features), act]
        layers.append(copy(nn.Linear, ours.score.state_dict(), ours.score.in_features, 1))
    return nn.Sequential(*layers)


def plain_augment(x: Tensor, policy: str, p: float = 0.6) -> Tensor:
    """Differentiable augmentation with index tensors, from the same random numbers as ours."""
    B, _, H, W = x.shape
    coins = (torch.rand(5) < p).tolist()
    u = torch.rand(7, B, 1, 1, 1, device=x.device, dtype=x.dtype)
    if policy == "none":
        return x
    if coins[0]:
        x = x + (u[0] - 0.5)
    if coins[1]:
        grey = x.mean(dim=1, keepdim=True)
        x = (x - grey) * (2 * u[1]) + grey
    if coins[2]:
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = (x - mean) * (u[2] + 0.5) + mean
    batch, rows, columns = torch.meshgrid(torch.arange(B), torch.arange(H), torch.arange(W), indexing="ij")
    if coins[3]:
        down, right = (
            ((2 * (s // 8) + 1) * v).floor().long().view(B, 1, 1) - s // 8 for s, v in ((H, u[3]), (W, u[4]))
        )
        padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
        r, c = (rows - down + 1).clamp(0, H + 1), (columns - right + 1).clamp(0, W + 1)
        x = padded[batch, r, c].permute(0, 3, 1, 2).contiguous()
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


class PlainTrainer:
    """The four updates in the usual way, with the weights and the random numbers of a gan.Trainer."""

    def __init__(self, ours: gan.Trainer, encoder: nn.Module, classifier: nn.Module):
        self.options, self.batch, self.labels = ours.options, ours.batch, ours.labels
        self.latent_width = ours.decoder.latent_width
        self.encoder, self.classifier = encoder, classifier
        dtype = ours.decoder.generator.last_bias.dtype
        self.decoder = PlainDecoder(self.options["size"], ours.labels.shape[1]).to(dtype)
        self.ema = PlainDecoder(self.options["size"], ours.labels.shape[1]).to(dtype)
        self.decoder.take(ours.decoder)
        self.ema.take(ours.decoder)
        self.D = plain_discriminator(ours.D).to(dtype)
        adam = dict(lr=self.options["lr"], betas=(0.5, 0.99))
        self.opt_g = torch.optim.Adam(self.decoder.parameters(), **adam)
        self.opt_d = torch.optim.Adam(self.D.parameters(), **adam)

    def fake(self) -> tuple[Tensor, Tensor]:
        y = self.labels[torch.randint(len(self.labels), (self.batch,))]
        latents = torch.randn(self.batch, self.latent_width, dtype=y.dtype)
        return self.decoder(y, latents), y

    def step(self, loss: Tensor, optimiser: torch.optim.Optimizer) -> Tensor:
        for network in (self.decoder, self.D, self.encoder, self.classifier):
            network.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.detach()

    def regularise(self) -> Tensor:
        x, y = self.fake()
        return self.step(gan.loss_y("one-hot", self.classifier(self.encoder(x)), y), self.opt_g)

    def discriminate(self, real: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            fake, _ = self.fake()
        real, fake = (plain_augment(x, self.options["augment"]) for x in (real, fake))
        return self.step(gan.loss_d(self.options["loss"], self.D(real), self.D(fake)), self.opt_d)

    def penalise(self, real: Tensor, y: Tensor) -> Tensor:
        x = plain_augment(real, self.options["augment"]).requires_grad_()
        (gradient,) = torch.autograd.grad(self.D(x).sum(), x, create_graph=True)
        return self.step(self.options["r1"] * gradient.square().sum(dim=(1, 2, 3)).mean(), self.opt_d)

    def generate(self) -> Tensor:
        x, _ = self.fake()
        score = self.D(plain_augment(x, self.options["augment"]))
        return self.step(gan.loss_g(self.options["loss"], score) + 100 * self.decoder.orthogonality(), self.opt_g)

    def average(self, images: int) -> None:
        decay = 0.5 ** (self.options["batch"] / min(gan.EMA_HALF_LIFE, images / 40))
        with torch.no_grad():
            for p, q in zip(self.ema.parameters(), self.decoder.parameters(), strict=True):
                p.mul_(decay).add_(q, alpha=1 - decay)

    def iteration(self, i: int, real: Tensor, y: Tensor) -> None:
        if i % self.options["reg_every"] == 0:
            self.regularise()
        self.discriminate(real, y)
        if i % gan.R1_EVERY == 0:
            self.penalise(real, y)
        self.generate()
        self.average((i + 1) * self.options["batch"])


# ---------------------------------------------------------------------------------------------------------------------
# The training step: one process a side, taking turns.


def frozen_resnet(backbone: str) -> nn.Module:
    """A torchvision ResNet without its last layer, random weights, in eval mode."""
    resnet = getattr(torchvision.models, backbone)()
    resnet.fc = nn.Identity()
    return resnet.eval()


def build(side: str, size: int, batch: int, disc: str, backbone: str, loss: str = "lsgan"):
    """The trainer of one side, with the same weights: 'ours' and 'plain' in fp32, 'bf16' ours in mixed precision."""
    options = dict(size=size, batch=batch, disc=disc, per_class=False, loss=loss, reg_every=2, reg_mode="separate")
    options |= dict(
        orth="penalty", r1=10.0, reg_clip=False, augment="color,translation,cutout", sample_y="joint", lr=1e-4
    )
    torch.manual_seed(0)
    resnet = frozen_resnet(backbone)
    classifier = nn.Linear(2048 if backbone == "resnet50" else 512, 3)
    run = training.Run(torch.device("cpu"), torch.bfloat16 if side == "bf16" else None, 0)
    if side != "plain":
        import encoder

        theirs = resnet.state_dict()
        state = encoder.Encoder(backbone, "imagenet").state_dict()
        own = {name: theirs.get(name.removeprefix("backbone."), value) for name, value in state.items()}
        config = dict(backbone=backbone, stem="imagenet", mean=(0.0,) * 3, std=(1.0,) * 3)
        frozen = encoder.build({"config": config, "model": own, "data": {"size": size}}).to(
            memory_format=torch.channels_last
        )
        return gan.Trainer(options, run, torch.eye(3), "one-hot", frozen, classifier.requires_grad_(False))
    return PlainTrainer(gan.Trainer(options, run, torch.eye(3), "one-hot"), resnet, classifier)


def serve(side: str, size: int, batch: int, disc: str, backbone: str, data: str) -> None:
    """Child process: at each line on stdin run one R1 cycle and print the seconds of its parts."""
    if side != "plain":
        training.keep_memory()
    trainer = build(side, size, batch, disc, backbone)
    torch.manual_seed(1)
    batches = (plain_feed if side == "plain" else feed)(data, size, batch)
    real, y = next(batches)
    parts = dict(regularisation=trainer.regularise, D=lambda: trainer.discriminate(real, y), G=trainer.generate)
    parts |= dict(R1=lambda: trainer.penalise(real, y), EMA=lambda: trainer.average(200_000))
    for _ in sys.stdin:
        waited, start = 0.0, time.perf_counter()
        for i in range(gan.R1_EVERY):
            asked = time.perf_counter()
            real, y = next(batches)
            waited += time.perf_counter() - asked
            trainer.iteration(i, real, y)
        times = {"iteration": (time.perf_counter() - start) / gan.R1_EVERY, "data": waited / gan.R1_EVERY}
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            times[name] = time.perf_counter() - start
        peak = peak_kib() / 1024
        print(json.dumps(times | {"peak MiB": peak}), flush=True)


def peak_kib() -> int:
    """The most memory that this process has held. Not ru_maxrss, which on Linux starts at the parent's."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.split("VmHWM:")[1].split()[0])


def feed(data: str, size: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as gan.py gets them: shuffled, prepared by a thread, converted by the caller."""
    for x, y in dataset.open_dataset(data, size).batches(batch, "cpu"):
        yield dataset.to_float(x), y


def plain_feed(data: str, size: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same images by ImageFolder and two workers."""
    import bench_data

    for x, y in bench_data.usual_batches(Path(data) / "train", batch, size):
        yield x, F.one_hot(y, 3).float()


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def both_losses(sides: Sequence, update: str, arguments: tuple) -> list[float]:
    """The loss of one update on each side, from the same random numbers."""
    losses = []
    for side in sides:
        torch.manual_seed(5)
        loss = getattr(side, update)(*arguments)
        losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
    return losses


def precision_row() -> dict:
    """How far the losses of the two sides are apart in fp32, from the same weights and random numbers."""
    apart = 0.0
    for disc in ("global", "patch"):
        sides = [build(side, 32, 8, disc, "resnet18") for side in ("ours", "plain")]
        real, y = torch.rand(8, 3, 32, 32) * 2 - 1, torch.eye(3)[torch.arange(8) % 3]
        for update, arguments in (("regularise", ()), ("discriminate", (real, y))):
            ours, plain = both_losses(sides, update, arguments)
            apart = max(apart, abs(ours / plain - 1))
    return dict(what="step: losses in fp32 against the plain ones", note=f"at most {apart:.0e} apart, relatively")


def step_rows(quick: bool) -> list[dict]:
    """Ours against the baseline: a row for each configuration and part; where bf16 is the default, one for it too."""
    import bench_data

    cases = [(64, 32, "global", "resnet18"), (64, 32, "patch", "resnet50")]
    if not quick:
        cases += [(128, 16, "global", "resnet18"), (128, 16, "patch", "resnet50")]
    rows, folder = [precision_row()], tempfile.TemporaryDirectory()
    data, environment = f"{folder.name}/images", os.environ | {"INFOSCC_CACHE": f"{folder.name}/cache"}
    bench_data.image_folder(Path(data), 640, 128)
    contestants = ("ours", "bf16", "plain") if training.cpu_has_amx() else ("ours", "plain")
    for case in cases:
        command = [sys.executable, __file__, "--serve"]
        sides = {
            side: subprocess.Popen(
                [*command, json.dumps([side, *case, data])], stdin=-1, stdout=-1, text=True, env=environment
            )
            for side in contestants
        }
        rounds: dict[str, list[dict]] = {side: [] for side in sides}
        for _ in range(3 if quick else 7):
            for side, process in sides.items():
                print("go", file=process.stdin, flush=True)
                rounds[side].append(json.loads(process.stdout.readline()))
        for process in sides.values():
            process.stdin.close()
            process.wait()
        name = "{} px, batch {}, {}, {}".format(*case)
        for side, part in itertools.product(contestants[:-1], rounds["plain"][0]):
            ours, plain = ([r[part] for r in rounds[s][1:]] for s in (side, "plain"))  # the first warms up
            ratios = quartiles([p / o for o, p in zip(ours, plain, strict=True)])
            row = dict(
                what=f"step {name}: {part}{' in bf16' if side == 'bf16' else ''}",
                ours=statistics.median(ours),
                plain=statistics.median(plain),
            )
            row |= dict(ratio=ratios[1], spread=[ratios[0], ratios[2]], unit="MiB" if part == "peak MiB" else "s")
            if part == "iteration":
                row["images_per_second"] = case[1] / row["ours"]
            if part == "iteration" and side == "ours":
                row["gflop"] = count_flops(*case) / 1e9
                row["of_peak"] = row["gflop"] / row["ours"] / peak_gflops()
                row["note"] = f"{row['gflop']:.0f} GFLOP, {row['of_peak']:.0%} of the matrix-product peak"
            rows.append(row)
        waits = [r["data"] / r["iteration"] for r in rounds["ours"][1:]]
        rows.append(dict(what=f"step {name}: waiting for data", note=f"{statistics.median(waits):.2%} of an iteration"))
    folder.cleanup()
    return rows


class CountFlops(TorchDispatchMode):
    """Adds up the floating-point operations of what runs within it, by torch's own formulas.

    torch's FlopCounterMode also attributes them to modules, by hooks that refuse autograd.grad on leaves, as in R1.
    """

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


def count_flops(size: int, batch: int, disc: str, backbone: str) -> float:
    """Floating-point operations of our iteration, the mean over one R1 cycle, with usual convolutions."""
    conv2d = importlib.import_module("ops.conv2d")  # ops.conv2d is the function
    trainer = build("ours", size, batch, disc, backbone)
    real, y = torch.rand(batch, 3, size, size), torch.eye(3)[torch.arange(batch) % 3]
    fast, conv2d._FAST = conv2d._FAST, ()
    try:
        with CountFlops() as counter:
            for i in range(gan.R1_EVERY):
                trainer.iteration(i, real, y)
    finally:
        conv2d._FAST = fast
    return counter.total / gan.R1_EVERY


def peak_gflops(n: int = 2048) -> float:
    """Best rate of a float32 matrix product on this machine."""
    a, best = torch.randn(n, n), 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * n**3 / (time.perf_counter() - start) / 1e9)
    return best


def generation_rows(quick: bool) -> list[dict]:
    """Images from a trained generator: batch 16 at 256 px."""
    training.keep_memory()
    decoder = gan.Decoder(256, 3).to(memory_format=torch.channels_last).eval()
    plain = PlainDecoder(256, 3).eval()
    plain.take(decoder)
    y, latents = torch.eye(3)[torch.arange(16) % 3], torch.randn(16, decoder.latent_width)
    with torch.inference_mode():
        convolved = decoder.generator.convolved()
        sides = dict(ours=lambda: decoder(y, latents, convolved), plain=lambda: plain(y, latents))
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(4 if quick else 12):
            for side, f in sides.items():
                start = time.perf_counter()
                f()
                times[side].append(time.perf_counter() - start)
    ratios = quartiles([p / o for o, p in zip(times["ours"][1:], times["plain"][1:], strict=True)])
    medians = {side: statistics.median(t[1:]) for side, t in times.items()}
    return [dict(what="generation, 256 px, batch 16", **medians, ratio=ratios[1], spread=ratios[::2], unit="s")]


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def collect(only: str | None, quick: bool) -> list[dict]:
    import bench_data
    import bench_metrics
    import bench_ops

    groups = dict(ops=bench_ops.op_rows, step=step_rows, generation=generation_rows)
    groups |= dict(data=bench_data.data_rows, metrics=bench_metrics.metric_rows)
    return [row for name, rows in groups.items() if only in (None, name) for row in rows(quick)]


@click.command()
@click.option("--quick", is_flag=True, help="Fewer repetitions and cases.")
@click.option("--only", type=click.Choice(["ops", "step", "generation", "data", "metrics"]), help="One group.")
@click.option("--out", metavar="JSON", default="bench.json", show_default=True, help="File for the figures.")
@click.option("--serve", "child", hidden=True)
def main(quick, only, out, child):
    """Print and save the table of ratios."""
    if child:
        return serve(*json.loads(child))
    cpu = subprocess.run("lscpu", capture_output=True, text=True, check=False).stdout.partition("Model name:")[2]
    cpu = cpu.partition("\n")[0].strip() or platform.machine()
    machine = dict(cpu=cpu, cores=os.cpu_count(), torch=torch.__version__, python=platform.python_version())
    rows = collect(only, quick)
    Path(out).write_text(json.dumps(dict(machine=machine, rows=rows), indent=1) + "\n")
    for row in rows:
        ratio = f"{row['ratio']:7.2f}x" if "ratio" in row else ""
        spread = "[{:.2f}, {:.2f}]".format(*row["spread"]) if "spread" in row else ""
        print(f"{row['what']:70} {ratio:8} {spread:14}  {row.get('note', '')}".rstrip())
    print(f"{machine}; wrote {out}")


if __name__ == "__main__":
    main()
