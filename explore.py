"""Look at a trained run: samples, explorations, what each dimension does, projections of pictures, the browser page.

    python explore.py sample     --network runs/critters/gan.pt --y cat --seeds 0-63
    python explore.py sample     --network runs/critters --vary z
    python explore.py traverse   --network runs/critters --dims 3 --out layer3.gif
    python explore.py traverse   --network runs/critters --interpolate --seeds 0-7
    python explore.py dimensions --network runs/critters
    python explore.py project    --network runs/critters photo.jpg
    python explore.py embedding  --network runs/critters
    python explore.py export     --network runs/critters --out critters.pt
    python explore.py serve      --network runs/critters

`--network` is a gan.pt, a snapshot, an export, or the folder of a run. Pictures go beside it unless --out says where.
latents.py does what these commands draw, page.py is what `serve` shows.
"""

import json
import os
import re
import shutil
import struct
import subprocess
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # read when matplotlib is imported; notebooks' shells name one that may not be there

import click
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import checkpoints
import gan
import latents
import metrics
import trained
import training

PRETRAINED = Path(__file__).parent / "pretrained" / "critters.pt"  # for `serve` without --network
PIXELS = 10**8  # of a picture, or of all frames of an animation: 1.2 GB as floats
POINTS = 2000  # of an embedding: exact t-SNE takes half a minute for them
COLUMNS = 24  # labels in a heat map, before it gets too wide to read
PANELS = 6  # labels in the picture of an embedding, for the same reason

matplotlib.rcParams["text.parse_math"] = False  # names are no formulas, whatever their dollar signs
# Characters that the font lacks are drawn as boxes, which says enough without a warning for each.
warnings.filterwarnings("ignore", "Glyph .* missing from font")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures.


def check_size(images: int, network: gan.Network, tile: int) -> None:
    """Raises click.UsageError for images that would fill the memory, at their own size or as tiles."""
    side = max(tile, network.size)
    if images * side**2 > PIXELS:
        raise click.UsageError(f"{images:,} images of {side} px are more than {PIXELS:,} pixels: ask for fewer")


def gallery(images: Tensor, columns: int, tile: int, row_names: list[str], column_names: list[str]) -> Image.Image:
    """x [rows * columns, 3, H, W] in [-1, 1] -> a picture of tiles of `tile` px with a name for each row and column."""
    tiles = gan.grid(images, columns)
    rows = len(images) // columns
    # Bicubic: tiles are mostly larger than the images, whose pixels would else show as blocks.
    body = Image.fromarray(tiles).resize((columns * tile, rows * tile), Image.Resampling.BICUBIC)
    file = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"  # Pillow's own has but ASCII
    # Letters of a sixth of a tile, but of at least 10 px: smaller ones cannot be read.
    font = ImageFont.truetype(file, max(10, tile // 6))
    left = max((int(font.getlength(name)) for name in row_names), default=0)
    wide = max((int(font.getlength(name)) for name in column_names), default=0)
    upright = wide + 4 > tile  # names that are wider than a tile would run into each other
    # Margins: 6 px on both sides of row names; 4 px at both ends of upright names, else 1.6 lines.
    left, top = left + 12 if left else 0, wide + 8 if upright else int(1.6 * font.size)
    picture = Image.new("RGB", (left + body.width, top + body.height), "white")
    picture.paste(body, (left, top))
    draw = ImageDraw.Draw(picture)
    for r, name in enumerate(row_names):
        draw.text((left - 6, top + (r + 0.5) * tile), name, fill="black", font=font, anchor="rm")
    for c, name in enumerate(column_names):
        x = left + (c + 0.5) * tile
        if upright:
            # Pillow writes level lines only, so a name gets a picture of its own, which is turned.
            line = Image.new("RGB", (wide + 2, int(1.4 * font.size)), "white")
            ImageDraw.Draw(line).text((0, line.height / 2), name, fill="black", font=font, anchor="lm")
            line = line.rotate(90, expand=True)
            picture.paste(line, (int(x - line.width / 2), top - 4 - line.height))
        else:
            draw.text((x, top / 2), name, fill="black", font=font, anchor="mm")
    return picture


PICTURES = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE}
FIGURES = {f".{ending}" for ending in Figure().canvas.get_supported_filetypes()}
NO_FFMPEG = "an MP4 needs ffmpeg, which is not installed: install it, or give a .gif"


def check_out(path: Path | None, endings: Collection[str] = PICTURES, option: str = "--out") -> None:
    """Raises click.ClickException for a file that could not be written: before the work, not after it."""
    if path and path.suffix.lower() not in endings:
        usual = [ending for ending in (".png", ".gif", ".mp4", ".pdf", ".json") if ending in endings]
        raise click.UsageError(f"{option} {path}: name a file that ends in {' or '.join(usual)}")
    if path and path.suffix.lower() == ".mp4" and not shutil.which("ffmpeg"):
        raise click.UsageError(f"{option} {path}: {NO_FFMPEG}")
    if path and not path.parent.is_dir():
        raise click.ClickException(f"{option} {path}: No such file or directory: make the folder {path.parent} first")


def save(pictures: Sequence[Image.Image], path: Path, notes: dict[str, str], frame_ms: int = 100) -> None:
    """Save a picture, with its notes as text chunks where it is a PNG; several are the frames of a GIF or MP4.

    The file is written aside and renamed. Raises click.ClickException if it cannot be written.
    """
    first, *others = pictures
    try:
        with checkpoints.atomic(path) as temporary:
            if path.suffix.lower() == ".mp4":
                write_mp4(pictures, temporary, 1000 / frame_ms)
            elif others or path.suffix.lower() == ".gif":
                if path.suffix.lower() != ".gif":
                    raise ValueError("an animation is a .gif or an .mp4")
                # loop 0: for ever. disposal 1: a frame stays, and the next one holds only what changes.
                first.save(temporary, save_all=True, append_images=others, duration=frame_ms, loop=0, disposal=1,
                           comment=json.dumps(notes).encode())  # fmt: skip
            else:
                first.save(temporary, **({"pnginfo": latents.png_info(notes)} if path.suffix.lower() == ".png" else {}))
    except (OSError, ValueError, struct.error) as error:  # a GIF's sides have 16 bits
        raise click.ClickException(f"--out {path}: {getattr(error, 'strerror', None) or error}") from None


def write(pictures: Sequence[Image.Image], path: Path, notes: dict[str, str], frame_ms: int = 100) -> None:
    """`save`, and say so."""
    save(pictures, path, notes, frame_ms)
    frames = f", {len(pictures)} frames" if len(pictures) > 1 else ""
    click.echo(f"wrote {path}, {pictures[0].width} x {pictures[0].height}{frames}")


def write_mp4(frames: Sequence[Image.Image], path: Path, rate: float) -> None:
    """Encode frames by ffmpeg. Raises ValueError where it is missing or fails."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise ValueError(NO_FFMPEG)
    even = "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white"  # yuv420p, which every player shows, halves the colours
    # Raw pixels through a pipe: no frame is compressed twice or written to a file of its own.
    command = [program, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-r", str(rate), "-s",
               f"{frames[0].width}x{frames[0].height}", "-i", "-", "-vf", even, "-pix_fmt", "yuv420p", str(path)]  # fmt: skip
    # All frames at once: `check_size` keeps them to some hundred MB.
    done = subprocess.run(command, input=b"".join(f.tobytes() for f in frames), capture_output=True)
    if done.returncode:
        raise ValueError(f"ffmpeg: {(done.stderr.decode(errors='replace').strip() or 'failed').splitlines()[-1]}")


def scatter(points: np.ndarray, panels: Sequence[tuple], shown: str) -> Figure:
    """Picture of points [N, 2], once for each of the panels (title, integers [N], their names), coloured by it."""
    figure = Figure(figsize=(6 * len(panels), 6))
    for axis, (title, value, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        # Distinct hues and no scale: classes have no order.
        colours = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
        dots = [axis.scatter(*points[value == i].T, s=6, color=colours(i % colours.N)) for i in range(len(names))]
        axis.set_title(f"{shown}, by {title}")
        axis.set_xticks([]), axis.set_yticks([])  # t-SNE's axes mean nothing
        if len(names) <= 20:  # beyond, colours repeat, and a legend would mislead
            axis.legend(dots, names, markerscale=2, fontsize=8)
    figure.tight_layout()
    return figure


def label_panels(names: Sequence[str], kind: str, labels: np.ndarray) -> list[tuple]:
    """What `scatter` colours by: the classes, or each attribute, of labels [N, Y]."""
    if kind == "one-hot":
        return [("label", labels.argmax(1), names)]
    return [(name, (labels[:, i] > 0.5).astype(int), ["off", "on"]) for i, name in enumerate(names)]


def heat_map(found: list[dict]) -> Figure:
    """What each dimension (a row, those that change most first) does to each label, in standard deviations."""

    def effect(d: dict, name: str) -> float:  # of the judge where it has a say
        by = d["labels"][name]
        return by.get("judge", by.get("classifier"))["effect"]

    # Strongest first, because only COLUMNS of them are drawn.
    names = sorted(found[0]["labels"], key=lambda name: -max(abs(effect(d, name)) for d in found))[:COLUMNS]
    values = np.array([[effect(d, name) for name in names] for d in found]).reshape(len(found), len(names))
    # Inches: 0.5 x 0.3 hold a number of 7 points; the rest is for names, title and colour bar.
    figure = Figure(figsize=(3.5 + 0.5 * len(names), 1.8 + 0.3 * len(found)), layout="constrained")
    axis = figure.subplots()
    # At least 1: else a network whose dimensions do little would look as vivid as any other.
    top = max(1.0, float(np.abs(values).max(initial=0)))
    image = axis.imshow(values, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
    for (row, col), value in np.ndenumerate(values):
        if abs(value) >= latents.LEAST:  # smaller ones give a dimension no name
            # Black cannot be read on the dark ends of the colour map.
            colour = "white" if abs(value) > 0.7 * top else "black"
            axis.text(col, row, f"{value:+.1f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    rows = [f"layer {d['layer']}, dim {d['dim']}  ({d['change']:.1%})" for d in found]
    axis.set_yticks(range(len(found)), rows, fontsize=8)
    title = "From z = -2 to 2: labels in standard deviations\n(beside it: change of the picture)"
    figure.suptitle(title, fontsize=9)  # of the figure: the axis may be narrower
    figure.colorbar(image, fraction=0.02)
    return figure


def table(found: list[dict]) -> list[str]:
    """What `latents.measure` found, as lines of text: of the label that names a dimension, what each reader saw."""
    lines = ["layer dim  change   name                              logit: classifier  judge   same way   also"]
    for d in found:
        # A name is a label and its effect, 'Hat +0.9'. NAMELESS goes first: a class may be called 'no'.
        by = {} if d["name"] == latents.NAMELESS else d["labels"].get(d["name"].rpartition(" ")[0], {})
        logits = [f"{by[who]['logit']:+.1f}" if who in by else "" for who in ("classifier", "judge")]
        same = f"{min(r['consistency'] for r in by.values()):.0%}" if by else ""  # the lowest of the readers'
        numbers = f"{logits[0]:>13s} {logits[1]:>6s} {same:>10s}"
        also = ", ".join(d["also"][:3])  # dimensions.json has all
        lines.append(f"{d['layer']:5d} {d['dim']:3d} {d['change']:7.1%}   {d['name']:38s} {numbers}   {also}".rstrip())
    return lines


def factor_table(found: list[dict], readable: Sequence[str]) -> list[str]:
    """The factors that critters are drawn with, as far as the judge reads them, each with what moves it most."""
    moved = [(effect, name, d) for d in found for name, effect in latents.names_of(d["labels"])]
    moved.sort(key=lambda item: abs(item[0]))
    best = {name: f"layer {d['layer']}, dim {d['dim']} ({effect:+.1f})" for effect, name, d in moved}  # the last stays
    lines = []
    for group, factors in latents.FACTORS.items():
        # Only what the judge can read: of other factors nobody knows whether a dimension moves them.
        its = [f"{name}: {best.get(name, 'none')}" for name in factors if name in readable]
        lines += [f"  {group:7s} {'; '.join(its)}"] if its else []
    return ["What critters are drawn with, and the dimension that moves it most:", *lines] if lines else []


def write_figure(figure: Figure, path: Path) -> None:
    """Save a figure. Raises click.ClickException if that is impossible."""
    try:
        with checkpoints.atomic(path) as temporary:
            figure.savefig(temporary, dpi=100)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"--out {path}: {getattr(error, 'strerror', None) or error}") from None
    click.echo(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------------
# The commands.


class Commands(training.OneLine, click.Group):
    """A group of commands that reports errors in one line."""

    command_class = training.OneLine


def find(context: click.Context, option: click.Parameter, value: str | None) -> Path | None:
    """The checkpoint that --network names: in a run's folder gan.pt, or else its encoder.pt."""
    path = None if value is None else Path(value)
    if path and path.is_dir():
        # Where neither is there, the error is about gan.pt: that is what most commands need.
        return next((path / name for name in ("gan.pt", "encoder.pt") if (path / name).exists()), path / "gan.pt")
    return path


# fmt: off
Y = "A class, or attributes to turn on (A,B,...; none: all off)"
NETWORK = click.Option(["--network"], metavar="FILE|DIR", type=training.FilePath(), required=True, callback=find, help="gan.pt, a snapshot or an export; or a run's folder.")
DEVICE = click.Option(["--device"], metavar="DEVICE", default="auto", help="cpu, cuda, cuda:1; auto: cuda if there is one.")
SEED = click.Option(["--seed"], metavar="N", type=click.IntRange(0, 2**31), default=0, help="Seed of what is random.")
DATA = click.Option(["--data"], metavar="PATH", type=training.FilePath(), help="The run's images, if they have moved.")
OUT = click.Option(["--out"], metavar="FILE", type=training.FilePath(path_type=Path), help="What to write.  [default: beside the network]")
TILE = click.Option(["--tile"], metavar="PIXELS", type=click.IntRange(8, 1024), default=64, help="Size of an image in the picture.")
TRUNCATION = click.Option(["--truncation"], metavar="T", type=click.FloatRange(0, 100), default=1.0, help="Scale of the latents: below 1 more typical, less varied.")

SAMPLE = [
    NETWORK,
    click.Option(["--y"], metavar="NAMES", multiple=True, help=f"{Y}; may be repeated.  [default: each in turn]"),
    click.Option(["--seeds"], metavar="LIST", help="Seeds, such as 0-63 or 1,5,9-11.  [default: 0-7]"),
    click.Option(["--vary"], type=click.Choice(["eps,z", "eps", "z", "y"]), help="What differs within a row; the rest is held as in the first seed.  [default: eps,z]"),
    click.Option(["--latent"], metavar="JSON", type=training.FilePath(), multiple=True, help="A latent that the page saved, in place of --y, --seeds and --vary; may be repeated."),
    click.Option(["--separate"], is_flag=True, help="A PNG for each image, at its own size, in the folder --out.  [default: images]"),
    TRUNCATION, TILE, DEVICE, OUT,
]

TRAVERSE = [
    NETWORK,
    click.Option(["--y"], metavar="NAMES", multiple=True, help=f"{Y}; --interpolate takes several.  [default: the first; --interpolate: each in turn]"),
    click.Option(["--seeds"], metavar="LIST", help="Seeds of the images to start from, a picture each; with --interpolate, to go through.  [default: 0; 0-3]"),
    click.Option(["--dims"], metavar="LIST", help="Dimensions: 3.2 is dimension 2 of layer 3, and 3 all of layer 3.  [default: all]"),
    click.Option(["--steps"], metavar="N", type=click.IntRange(2, latents.MOST), help="Images in a strip.  [default: 9]"),
    click.Option(["--interpolate"], is_flag=True, help="Instead: a smooth loop through the seeds and ys, as a .gif or .mp4."),
    click.Option(["--frames"], metavar="N", type=click.IntRange(2, latents.MOST), help="With --interpolate: frames from one seed to the next, 25 a second.  [default: 25]"),
    TRUNCATION, TILE, DEVICE, OUT,
]

DIMENSIONS = [
    NETWORK, DATA,
    click.Option(["--num"], metavar="N", type=click.IntRange(8, 10_000), default=64, help="Images to move each dimension of."),
    click.Option(["--steps"], metavar="N", type=click.IntRange(1, 10**6), default=600, help="Training steps of the judge, of 64 images."),
    click.Option(["--json", "json_file"], metavar="FILE", type=training.FilePath(path_type=Path), help="What to write.  [default: dimensions.json beside the network]"),
    SEED, DEVICE, OUT,
]

PROJECT = [
    NETWORK,
    click.Option(["--steps"], metavar="N", type=click.IntRange(2, 10**6), default=300, help="Steps of gradient descent."),
    SEED, TILE, DEVICE, OUT,
]

SERVE = [
    click.Option(["--network"], metavar="FILE|DIR", type=training.FilePath(), callback=find, help="gan.pt, a snapshot or an export; or a run's folder.  [default: pretrained/critters.pt]"),
    click.Option(["--host"], metavar="ADDRESS", default="127.0.0.1", help="Address to listen at; 0.0.0.0 lets other machines in."),
    click.Option(["--port"], metavar="N", type=click.IntRange(1, 65535), default=7860, help="Port to listen at."),
    DEVICE,
]
# fmt: on


@click.group(cls=Commands, context_settings=dict(max_content_width=120, show_default=True))
def main():
    """Look at a trained run."""


@main.command("sample", params=SAMPLE)
def sample_command(network, y, seeds, vary, latent, separate, truncation, tile, device, out):
    """Images as a grid, or each on its own.

    The paper's four explorations are --vary eps,z at fixed y, eps at fixed z and y, z at fixed eps and y, and y at fixed
    eps and z. With eps,z and y a seed gives the same image, whatever else is drawn. With eps or z alone, the other part
    is the first seed's.
    """
    if not separate:
        check_out(out)  # else it is a folder, made below
    file, network = network, gan.load(network, device)

    # Find what to draw: y and a latent of each image, the names of rows and columns, and what each PNG says of itself.
    if latent:
        if y or seeds or vary:
            raise click.UsageError("--latent holds eps, z and y: leave --y, --seeds and --vary away")
        read = [latents.read_json(network, path) for path in latent]
        labels = None if read[0][0] is None else torch.cat([its for its, _ in read])
        codes = torch.cat([code for _, code in read])
        rows, columns = [""], [Path(path).stem for path in latent]
        whole, notes = {"latent": ", ".join(columns)}, [{"latent": name} for name in columns]
    else:
        labels, names = latents.parse_y(network, y)
        # Defaults stand here and not in the options: None tells, above, that --latent came alone.
        seeds = "0-7" if seeds is None else seeds
        numbers, vary = latents.parse_seeds(seeds), vary or "eps,z"
        if vary == "y" and labels is None:
            raise click.UsageError("--vary y: this network is unconditional, it takes no labels")
        check_size(len(names) * len(numbers), network, tile)
        labels, codes = latents.exploration(network, labels, numbers, vary)
        rows, columns = names, [str(seed) for seed in numbers]
        if vary == "y":  # a row for each seed
            rows, columns = columns, rows
        whole = {"y": "; ".join(names), "seed": seeds, "vary": vary}
        notes = [{"y": row, "seed": column} for row in rows for column in columns]
        if vary == "y":
            # Rows and columns have changed places, so here they also change meaning.
            notes = [{"y": its["seed"], "seed": its["y"]} for its in notes]
        if vary in ("eps", "z"):  # the other one is the first seed's
            held = {"held": f"{'z' if vary == 'eps' else 'eps'} of seed {numbers[0]}"}
            notes = [its | held for its in notes]
    folder = out or file.with_name("images")
    if separate:
        folder.mkdir(parents=True, exist_ok=True)  # before the work, in case it cannot be made
    images = latents.generate(network, labels, truncation * codes)
    common = latents.notes_of(network, truncation=truncation)

    # Write one picture, or one for each image.
    if not separate:
        picture = gallery(images, len(columns), tile, rows, columns)
        return write([picture], out or file.with_name("sample.png"), common | whole)
    for i, (image, its) in enumerate(zip(images, notes, strict=True)):
        # `held` is the same for all of them: it stays in the notes.
        title = "-".join(f"{key}-{value}" if key == "seed" else value for key, value in its.items() if key != "held")
        # At most 80 characters: a file name has at most 255 bytes, and a character up to 3 or 4.
        name = re.sub(r"[^\w-]+", "-", title)[:80].strip("-")  # labels can have any character, and file names not
        picture = Image.fromarray(gan.grid(image[None], 1))
        save([picture], folder / f"{i:0{len(str(len(images) - 1))}}-{name}.png", common | its)  # sorted as drawn
    click.echo(f"wrote {len(images)} images to {folder}")


@main.command("traverse", params=TRAVERSE)
def traverse_command(network, y, seeds, dims, steps, interpolate, frames, truncation, tile, device, out):
    """What each dimension does to an image, as strips.

    A strip covers z in [-4.5, 4.5]; the dimensions that change the picture most come first. A .gif shows them moving.
    """
    if interpolate and (dims is not None or steps):
        raise click.UsageError("--interpolate moves all dimensions, by --frames: leave --dims and --steps away")
    if frames and not interpolate:
        raise click.UsageError("--frames goes with --interpolate; --steps is the number of images in a strip")
    check_out(out, {".gif", ".mp4"} if interpolate else PICTURES | {".mp4"})
    # Here, so that the checks above see what was given. 9 is odd: z = 0 is in the middle.
    frames, steps = frames or 25, steps or 9
    file, network = network, gan.load(network, device)
    labels, names = latents.parse_y(network, y)
    wanted = latents.parse_dimensions(network, "all" if dims is None else dims)
    numbers = latents.parse_seeds(("0-3" if interpolate else "0") if seeds is None else seeds)

    # A loop: keyframe i has seed i and y i, each list over again where it is the shorter one.
    if interpolate:
        stops = max(len(numbers), len(names))
        if stops < 2:
            raise click.UsageError("--interpolate needs two seeds or two ys to go between")
        check_size(stops * frames, network, tile)
        codes = truncation * network.latents([numbers[i % len(numbers)] for i in range(stops)])
        labels = None if labels is None else labels[torch.arange(stops) % len(names)]
        labels, codes = latents.loop(labels, codes, frames, network.label_kind == "one-hot")
        # In batches: they change the last bit, which cannot be seen in a film of hundreds of frames.
        images = latents.generate(network, labels, codes, latents.BATCH)
        pictures = [
            Image.fromarray(gan.grid(x[None], 1)).resize((tile, tile), Image.Resampling.BICUBIC) for x in images
        ]
        notes = latents.notes_of(network, y="; ".join(names), seed=",".join(map(str, numbers)), truncation=truncation)
        # 40 ms are the 25 frames a second of --frames.
        return write(pictures, out or file.with_name("interpolate.gif"), notes, frame_ms=40)

    # Strips, a picture for each seed.
    if len(y) > 1:
        raise click.UsageError("--y: strips are of one image, so give one; several go with --interpolate")
    if out and len(numbers) > 1:
        raise click.UsageError("--out takes one picture: give one seed, or leave --out away")
    check_size(len(wanted) * steps, network, tile)
    values = torch.linspace(-latents.RANGE, latents.RANGE, steps)
    # Names, where `dimensions` has been run on these weights.
    found = {(d["layer"], d["dim"]): f": {d['name']}" for d in latents.found_names(network, file)}
    order = None
    for seed in numbers:
        code, first = truncation * network.latents([seed]), None if labels is None else labels[:1]
        strips = dict(zip(wanted, latents.strips(network, first, code, wanted, values), strict=True))
        changes = {d: latents.spread(images) for d, images in strips.items()}
        order = order or sorted(wanted, key=lambda d: -changes[d])  # the first seed's, so that pictures compare
        rows = [f"layer {d[0]}, dim {d[1]}{found.get(d, '')}   {changes[d]:.1%}" for d in order]
        path = out or file.with_name("traverse.png" if len(numbers) == 1 else f"traverse-{seed}.png")
        images = torch.stack([strips[d] for d in order])
        if path.suffix.lower() in (".gif", ".mp4"):  # there and back: a jump at the end would look like a change
            there_and_back = [*range(steps), *range(steps - 2, 0, -1)]  # both ends once: twice would look like a halt
            pictures = [gallery(images[:, i], 1, tile, rows, [f"{values[i]:.1f}"]) for i in there_and_back]
        else:
            pictures = [gallery(images.flatten(0, 1), steps, tile, rows, [f"{v:.1f}" for v in values.tolist()])]
        write(pictures, path, latents.notes_of(network, y=names[0], seed=seed, truncation=truncation))


@main.command("dimensions", params=DIMENSIONS)
def dimensions_command(network, data, num, steps, json_file, seed, device, out):
    """What each dimension does, by name.

    Prints a table, and writes JSON and a heat map. Moves each z from -2 to 2 in many images. The run's classifier, and a
    judge that is trained once on the real images and all that is known of them, say which labels move. The page and the
    strips take the names from dimensions.json.
    """
    check_out(out, FIGURES)
    check_out(json_file, {".json"}, "--json")
    # 64 images at once, as metrics.py has by default.
    file, run = network, trained.TrainedRun(str(network), metrics.start(device, 64), data)
    readers, quality = latents.readers_of(run, seed, steps)
    # y as `generated` draws it (from the data; under --protocol paper uniformly): what a dimension does can depend on it.
    y = run.generated(num, seed).y
    found = latents.measure(run.net, y, run.net.latents(range(seed, seed + num)), readers)

    click.echo("\n".join(table(found)))
    if run.train.data == "critters":  # of other data nobody knows what they were drawn from
        for line in factor_table(found, readers["judge"].names):
            click.echo(line)
    unread = [name for name in quality if name not in readers["judge"].names]
    if unread:
        click.echo(f"The judge cannot tell well enough to name anything by it: {', '.join(unread)}")
    if "classifier" not in readers and run.names:
        click.echo(f"{file} holds no encoder, so the judge alone names the dimensions")

    # Write the files.
    # The hash ties the names to these weights: after more training, dimensions do other things.
    content = dict(network=checkpoints.fingerprint(run.net.decoder.state_dict()), samples=num, seed=seed, judge=quality)
    path = json_file or file.with_name("dimensions.json")
    with checkpoints.atomic(path) as temporary:
        temporary.write_text(json.dumps(content | {"dimensions": found}, indent=1) + "\n")
    click.echo(f"wrote {path}")
    if found[0]["labels"]:  # there are none where the judge can read nothing and no classifier is there
        write_figure(heat_map(found), out or file.with_name("dimensions.png"))
    if (labels := len(found[0]["labels"])) > COLUMNS:
        click.echo(f"for want of room, it has the {COLUMNS} labels that move most; {path} has all {labels}")


@main.command("project", params=PROJECT)
@click.argument("picture", metavar="FILE", type=training.FilePath(path_type=Path))
def project_command(picture, network, steps, seed, tile, device, out):
    """The latent of a given picture.

    Writes FILE beside what the network makes of it, and the latent as JSON, which `sample --latent` takes.
    """
    import dataset
    import files

    check_out(out)
    file, network = network, gan.load(network, device)
    path = out or file.with_name("project.png")
    codes = path.with_suffix(".json")
    # samefile() needs both; a picture that is missing gets its message below.
    if path.exists() and picture.exists() and path.samefile(picture):
        raise click.UsageError(f"--out {path} is the picture itself: give another --out")
    # --out gan.png would write the latent over gan.json, the run's options. An earlier latent may go.
    if codes.exists():
        try:
            latents.read_json(network, codes)
        except click.ClickException:
            raise click.UsageError(f"--out {path}: {codes} is there and is no latent: give another --out") from None
    try:
        image = files.read_image(picture)
    except ValueError as error:
        raise click.ClickException(f"{picture} cannot be read as a picture: {error}") from None
    # As the training images were cut: the generator knows no others.
    crop = dataset.squashed if network.data["squash"] else dataset.square
    given = training.to_float(torch.from_numpy(np.array(crop(image, network.size)))[None])[0]
    if network.encoder is None:
        click.echo(f"{file} holds no encoder, so pixels alone are compared")
    y, latent, made = latents.project(network, given, steps, seed)
    shown, wanted = (training.to_float(training.to_uint8(x[None])) for x in (made, given))  # as the picture has them
    title = f"found, {latents.psnr((shown - wanted).square().mean().item()):.1f} dB"
    its = (
        "" if y is None else ", ".join(f"{n} {v:.2f}" for n, v in zip(network.label_names, y[0].tolist(), strict=True))
    )
    write(
        [gallery(torch.stack((given, made)), 2, tile, [""], ["given", title])],
        path,
        latents.notes_of(network, y=its, seed=seed),
    )
    with checkpoints.atomic(codes) as temporary:
        temporary.write_text(json.dumps(latents.to_json(network, None if y is None else y[0], latent[0])) + "\n")
    click.echo(f"wrote {codes}, {title.removeprefix('found, ')}" + f", y: {its}" * bool(its))


@main.command("embedding", params=[NETWORK, DATA, SEED, DEVICE, OUT])
def embedding_command(network, data, seed, device, out):
    """A t-SNE picture of encoder features, by label.

    Of the validation images; with a gan.pt, of as many generated ones among them.
    """
    import dataset
    import encoder as stage1

    check_out(out, FIGURES)
    state = None
    try:
        state = checkpoints.load(network, "encoder")
    except click.ClickException as error:
        # A gan.pt is refused in these words, and read below; any other error is for the user.
        if "written by gan.py" not in error.message:
            raise

    # Embed validation images, and as many generated ones where there is a generator.
    if state:
        run = training.start(device, seed=seed)
        info = state["data"]
        ds = dataset.open_dataset(data or info["data"], info["size"], "val", **dataset.same_images(info))
        checkpoints.check_images(info, ds, network, "give --data")
        # Spread over the whole split, because images may lie class by class.
        index = np.linspace(0, len(ds) - 1, min(POINTS, len(ds))).astype(int)
        # A few hundred at once: 2,000 of 256 px would be 1.6 GB as floats.
        images = (torch.from_numpy(ds.images[part]) for part in np.array_split(index, max(1, len(index) // 256)))
        with checkpoints.reading(network):
            net = stage1.build(state).to(run.device)
        h = stage1.embed(net, images, len(index), run)
        panels = label_panels(ds.label_names, ds.label_kind, np.asarray(ds.labels)[index])
        # What training never saw, such as the kinds of wild animals in critters.
        panels += [(name, value[index], names) for name, (value, names) in ds.hidden.items()]
    else:
        run = trained.TrainedRun(str(network), metrics.start(device, 64), data)
        if run.features is None:
            remedy = (
                "give the run's gan.pt or encoder.pt" if run.names else "run encoder.py with the same --outdir first"
            )
            raise click.ClickException(f"{network} holds no encoder: {remedy}")
        n = min(POINTS // 2, len(run.images["val"]))  # the other half is generated
        index = np.linspace(0, len(run.images["val"]) - 1, n).astype(int)
        fake, labels = run.generated(n, seed), run.labels("val")
        h = torch.cat((run.embed(run.real_images("val", index)), run.embed(fake)))
        panels = [("origin", np.arange(2 * n) // n, ["real", "generated"])]
        if run.names and labels is not None:
            panels += label_panels(run.names, run.kind, torch.cat((labels[index], fake.y)).numpy())
    if len(h) < 10:  # t-SNE's perplexity would be below 3
        raise click.ClickException(f"{len(index)} validation images are too few for a t-SNE")
    points = metrics.tsne(h, dims=2, perplexity=metrics.perplexity_of(len(h)))
    shown, left = panels[:PANELS], [title for title, *_ in panels[PANELS:]]
    write_figure(scatter(points.numpy(), shown, "t-SNE of embeddings"), out or network.with_name("embedding.png"))
    if left:
        click.echo(f"for want of room, it leaves out {', '.join(left)}")


@main.command("export", params=[NETWORK, OUT])
def export_command(network, out):
    """What pictures need, as one small file.

    That is the averaged decoder and the classifier, in 16 bits. It loads like a gan.pt. Without the encoder there are few
    metrics, and `project` compares pixels alone. The names of the dimensions go along, if `explore.py dimensions` has
    found them.
    """
    path = out or network.with_name("export.pt")
    if path.is_dir():
        raise click.UsageError(f"--out {path} is a folder: name a file")
    # Only exports may be written over: a gan.pt has D and Adam's state too, and those would be lost.
    if path.exists() and "exported" not in checkpoints.load(path, "gan"):
        raise click.ClickException(f"--out {path} is a checkpoint that training goes on from: give another --out")

    def half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        # Half the size; images in [-1, 1] change by less than 0.01.
        return {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}

    found = latents.found_names(gan.load(network, "cpu"), network)
    named = [d for d in found if d["name"] != latents.NAMELESS]
    state = gan.read(network)
    data, classifier = state["data"], state.get("classifier")
    # Without the encoder: a ResNet-18 alone has 22 MB in 16 bits, all the rest for critters 7 MB.
    content = {
        "stage": "gan", "labels": state.get("labels"), "images_seen": state["images_seen"], "exported": True,
        "ema": half(state["ema"]), "dimensions": found or None, "encoder": None,
        "classifier": classifier and {"config": classifier["config"], "model": half(classifier["model"]), "balance": classifier["balance"]},
        # Others need not know where files lay on this machine.
        "data": data | {"data": data["name"] if Path(data["data"]).is_absolute() else data["data"]},
        "options": {k: v for k, v in state["options"].items() if k not in ("data", "outdir", "init")},
    }  # fmt: skip
    checkpoints.save(path, content)
    click.echo(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB, {len(named)} dimensions with a name")


@main.command("serve", params=SERVE)
def serve_command(network, host, port, device):
    """A page in the browser.

    Class or attributes, a slider for each dimension that changes something, new eps, truncation, downloads.
    """
    if ":" in host or not host:  # gradio takes no IPv6 address as it is usually written
        raise click.UsageError(f"--host {host}: give an IPv4 address or a name")
    if network is None and not PRETRAINED.exists():
        raise click.UsageError(f"--network: name a run's gan.pt; there is no {PRETRAINED}")
    try:
        # Here, because requirements.txt leaves gradio out: nothing else needs it.
        import page
    except ModuleNotFoundError as error:
        if error.name != "gradio":  # a module that gradio itself lacks: its traceback says more
            raise
        raise click.ClickException("the page needs gradio: pip install gradio") from None
    file = network or PRETRAINED
    page.serve(gan.load(file, device), file, host, port)


if __name__ == "__main__":
    main()
