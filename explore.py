"""Look at a trained run: samples by class or attributes, the explorable dimensions z of every layer, the embeddings.

python explore.py sample    --network runs/critters/gan.pt
python explore.py sample    --network runs/celeba/gan.pt --y Bald,Eyeglasses --y Wearing_Hat --seeds 100-107
python explore.py traverse  --network runs/critters/gan.pt --y cat --seeds 3
python explore.py embedding --network runs/critters/encoder.pt
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import click
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import gan
import metrics
import training

MOST = 1000  # seeds of a range, images of a strip
PIXELS = 10**8  # of a picture
POINTS = 2000  # of an embedding: exact t-SNE takes half a minute for them
RANGE = 4.5  # a traversal covers z in [-4.5, 4.5], as in EigenGAN


def parse_seeds(text: str) -> list[int]:
    """'0-7' or '1,5,9-11' -> the seeds it lists; raises click.UsageError."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            chosen = range(int(first), int(last or first) + 1)
            if not 0 <= chosen.start < chosen.stop <= min(2**32, chosen.start + MOST):
                raise ValueError
            seeds += chosen
    except ValueError:
        raise click.UsageError(
            f"--seeds {text}: give numbers below 2^32 and ranges of at most {MOST}, as in 0-7 or 1,5,9-11"
        ) from None
    return seeds


def parse_y(network: gan.Network, texts: Sequence[str]) -> tuple[Tensor | None, list[str]]:
    """Each text, a class or a comma list of attributes to turn on ('none': all off) -> y [rows, Y] and the row names.

    Without texts: every class, or every attribute alone. Raises click.UsageError naming what does not exist.
    """
    names = network.label_names
    if network.label_kind == "none":
        if texts:
            raise click.UsageError("--y: this network is unconditional, it takes no labels")
        return None, [""]
    rows = []
    for text in texts or names:
        wanted = [text] if text in names else text.split(",")  # classes may have commas, attributes have none
        wanted = [] if text == "none" and network.label_kind == "multi-label" else wanted
        for name in wanted:
            if name not in names:
                raise click.UsageError(f"--y {name}: this network knows {', '.join(names)}")
        if network.label_kind == "one-hot" and len(wanted) != 1:
            raise click.UsageError(f"--y {text}: an image has one class here; repeat --y for more rows")
        rows.append([float(name in wanted) for name in names])
    return torch.tensor(rows), list(texts or names)


def check_size(tiles: int, tile: int) -> None:
    """Raises click.UsageError for a picture that would fill the memory."""
    if tiles * tile**2 > PIXELS:
        raise click.UsageError(f"{tiles:,} images at --tile {tile} are more than {PIXELS:,} pixels: ask for less")


def gallery(images: Tensor, columns: int, tile: int, row_names: list[str], column_names: list[str]) -> Image.Image:
    """x [rows * columns, 3, H, W] in [-1, 1] -> a picture of tiles of `tile` px with a name for each row and column."""
    tiles = gan.grid(images, columns)
    rows = len(images) // columns
    body = Image.fromarray(tiles).resize((columns * tile, rows * tile), Image.Resampling.BICUBIC)
    file = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"  # Pillow's own has but ASCII
    font = ImageFont.truetype(file, max(10, tile // 6))
    left = max((int(font.getlength(name)) for name in row_names), default=0)
    left, top = left + 12 if left else 0, int(1.6 * font.size)
    picture = Image.new("RGB", (left + body.width, top + body.height), "white")
    picture.paste(body, (left, top))
    draw = ImageDraw.Draw(picture)
    for r, name in enumerate(row_names):
        draw.text((left - 6, top + (r + 0.5) * tile), name, fill="black", font=font, anchor="rm")
    for c, name in enumerate(column_names):
        draw.text((left + (c + 0.5) * tile, top / 2), name, fill="black", font=font, anchor="mm")
    return picture


def generate(network: gan.Network, y: Tensor | None, latents: Tensor, batch: int = 64) -> Tensor:
    """Decode many latents in batches, to the CPU."""
    parts = range(0, len(latents), batch)
    return torch.cat(
        [network.decode(None if y is None else y[i : i + batch], latents[i : i + batch]).cpu() for i in parts]
    )


def sample(network: gan.Network, y: Tensor | None, rows: int, seeds: list[int], truncation: float) -> Tensor:
    """A row of images for each y, a column for each seed: [rows * len(seeds), 3, size, size]."""
    latents = (truncation * network.latents(seeds)).repeat(rows, 1)
    return generate(network, None if y is None else y.repeat_interleave(len(seeds), dim=0), latents)


def importance(network: gan.Network) -> list[tuple[float, int, int]]:
    """(|L|, layer, dimension) of every explorable dimension, the most important first; layers and dimensions from 1."""
    L = [block.subspace.L.abs().tolist() for block in network.generator.blocks]
    triples = [(value, i + 1, j + 1) for i, layer in enumerate(L) for j, value in enumerate(layer)]
    return sorted(triples, key=lambda t: (-t[0], t[1], t[2]))


def traverse(
    network: gan.Network, y: Tensor | None, latent: Tensor, layer: int, dimension: int, values: Tensor
) -> Tensor:
    """One image with the z of a layer's dimension (both from 1) set to each of `values` [N]: [N, 3, size, size]."""
    latents = latent.repeat(len(values), 1)
    latents[:, gan.NOISE + (layer - 1) * gan.BASIS + dimension - 1] = values
    return generate(network, None if y is None else y.expand(len(values), -1), latents)


def scatter(points: np.ndarray, panels: Sequence[tuple], shown: str) -> "matplotlib.figure.Figure":
    """Picture of points [N, 2], once for each of the panels (title, integers [N], their names), coloured by it."""
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # names are no formulas, whatever their dollar signs
    warnings.filterwarnings("ignore", "Glyph .* missing from font")
    figure = Figure(figsize=(6 * len(panels), 6))
    for axis, (title, value, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, label in enumerate(names):
            axis.scatter(*points[value == i].T, s=6, color=matplotlib.colormaps["tab20"](i % 20), label=label)
        axis.set_title(f"{shown}, by {title}")
        axis.set_xticks([]), axis.set_yticks([])
        if len(names) <= 20:
            axis.legend(markerscale=2, fontsize=8)
    figure.tight_layout()
    return figure


def label_panels(ds, index: np.ndarray) -> list[tuple]:
    """What `scatter` colours by: the classes or up to six attributes of a Dataset's images, and its hidden labels."""
    labels = np.asarray(ds.labels)[index]
    panels = [(name, labels[:, i].astype(int), ["off", "on"]) for i, name in enumerate(ds.label_names)]
    if ds.label_kind == "one-hot":
        panels = [("label", labels.argmax(1), ds.label_names)]
    return (panels + [(name, value[index], names) for name, (value, names) in ds.hidden.items()])[:6]


def finite(context: click.Context, option: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter("give a finite number")
    return value


# fmt: off
Y = "A class, or attributes to turn on (A,B,...; none: all off)"
OPTIONS = [
    click.option("--network",    metavar="FILE", required=True, help="gan.pt or a snapshot."),
    click.option("--truncation", metavar="T", type=click.FloatRange(0), callback=finite, default=1.0, help="Scale of the latents: below 1 more typical, less varied."),
    click.option("--tile",       metavar="PIXELS", type=click.IntRange(8, 1024), default=64, help="Size of an image in the picture."),
    click.option("--device",     metavar="DEVICE", default="cpu", help="cpu or cuda."),
    click.option("--out",        metavar="PNG", help="Picture to write.  [default: beside the network]"),
]
# fmt: on


def options(*own):
    def decorate(command):
        for option in reversed(own + tuple(OPTIONS)):
            command = option(command)
        return command

    return decorate


def write(picture: Image.Image, out: str | None, network: str, name: str) -> None:
    path = Path(out) if out else Path(network).with_name(name)
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"--out {path}: {error}") from None
    click.echo(f"wrote {path}, {picture.width} x {picture.height}")


@click.group(context_settings=dict(max_content_width=120, show_default=True))
def main():
    """Pictures of a trained run."""


@main.command("sample")
@options(
    click.option("--y", metavar="NAMES", multiple=True, help=f"{Y}; may be repeated.  [default: each in turn]"),
    click.option("--seeds", metavar="LIST", default="0-7", help="Seeds, a column each."),
)
def sample_command(network, y, seeds, truncation, tile, device, out):
    """A grid: a row for each class or attribute set, a column for each seed."""
    file, network = network, gan.load(network, device)
    labels, names = parse_y(network, y)
    columns = parse_seeds(seeds)
    check_size(len(names) * len(columns), tile)
    images = sample(network, labels, len(names), columns, truncation)
    write(gallery(images, len(columns), tile, names, [str(s) for s in columns]), out, file, "sample.png")


@main.command("traverse")
@options(
    click.option("--y", metavar="NAMES", help=f"{Y}.  [default: the first]"),
    click.option("--seeds", metavar="LIST", default="0", help="Seeds of the images to start from, a picture each."),
    click.option("--steps", metavar="N", type=click.IntRange(2, MOST), default=9, help="Images in a strip."),
)
def traverse_command(network, y, seeds, steps, truncation, tile, device, out):
    """A strip over [-4.5, 4.5] for each layer and dimension, the most important |L| first."""
    file, network = network, gan.load(network, device)
    labels, _ = parse_y(network, [y] if y else [])
    values = torch.linspace(-RANGE, RANGE, steps)
    dimensions = importance(network)
    strips = [f"layer {layer} dim {dim}  |L| {L:.1f}" for L, layer, dim in dimensions]
    wanted = parse_seeds(seeds)
    check_size(len(dimensions) * steps, tile)
    for seed in wanted:
        latent = truncation * network.latents([seed])
        first = None if labels is None else labels[:1]
        images = torch.cat([traverse(network, first, latent, layer, dim, values) for _, layer, dim in dimensions])
        picture = gallery(images, steps, tile, strips, [f"{v:.1f}" for v in values.tolist()])
        name = "traverse.png" if len(wanted) == 1 else f"traverse-{seed}.png"
        if out and len(wanted) > 1:
            raise click.UsageError("--out takes one picture: give one seed, or leave --out away")
        write(picture, out, file, name)


@main.command("embedding")
@click.option("--network", metavar="FILE", required=True, help="encoder.pt.")
@click.option("--data", metavar="PATH", help="The run's images, if they have moved.")
@click.option("--seed", metavar="N", type=click.IntRange(0), default=0, help="Seed of what is random.")
@click.option("--device", metavar="DEVICE", default="cpu", help="cpu or cuda.")
@click.option("--out", metavar="PNG", help="Picture to write.  [default: beside the network]")
def embedding_command(network, data, seed, device, out):
    """t-SNE in the plane of the validation images' embeddings, coloured by their labels."""
    import dataset
    import encoder as stage1

    state, run = training.load(network, "encoder"), training.start(device, seed=seed)
    ds = dataset.open_dataset(data or state["data"]["data"], state["data"]["size"], "val")
    training.check_images(state["data"], ds, network, "give --data")
    index = np.linspace(0, len(ds) - 1, min(POINTS, len(ds))).astype(int)
    if len(index) < 10:
        raise click.ClickException(f"{len(index)} validation images are too few for a t-SNE")
    images = (torch.from_numpy(ds.images[part]) for part in np.array_split(index, max(1, len(index) // 256)))
    h = stage1.embed(stage1.build(state).to(run.device), images, len(index), run)
    points = metrics.tsne(h, dims=2, perplexity=min(30.0, (len(h) - 1) / 3), seed=seed)
    figure = scatter(points.numpy(), label_panels(ds, index), "t-SNE of validation embeddings")
    path = Path(out) if out else Path(network).with_name("embedding.png")
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"--out {path}: {error}") from None
    click.echo(f"wrote {path}")


if __name__ == "__main__":
    main()
