"""What each part of the recipe of stage 3 is worth: variants of it on one encoder and classifier, several seeds each.

    python -m experiments.ablations                                      # the rows of the README, seeds 0 to 2
    python -m experiments.ablations --run runs/icons "" --reg-every=4    # on other data, chosen rows

Trains and measures what is missing in RUN/ablations, then prints the table: mean +- sd over the seeds. All rows see the
same number of images. The judge of FD, KD, recall and control has never seen a generated image.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import torch

import gan
import latents
import training

ROOT = Path(__file__).resolve().parent.parent
ROWS = (
    "",
    "--penalty=r1",
    "--beta1=0.5",
    "--width=16",
    "--lr-decay=0",
    "--no-projection",
    "--no-reg-clip",
    "--reg-every=4",
)
COLUMNS = {
    "FD": (lambda m: m["fd"], "{:.0f}"),
    "KD": (lambda m: m["kd"], "{:.3f}"),
    "recall": (lambda m: m["recall"], "{:.2f}"),
    "control, judge": (lambda m: 100 * m["accuracy_judge"], "{:.1f} %"),
    "dimensions > 2 %": (lambda m: m["alive"], "{:.1f}"),
}


def alive(network: gan.Network, images: int = 64, least: float = 0.02) -> int:
    """Dimensions of z that change the picture by more than `least` of the full range on average, from -3 to 3."""
    found = 0
    y = (
        None
        if network.real_labels is None
        else network.real_labels[torch.arange(images) * 7919 % len(network.real_labels)]
    )
    codes = network.latents(range(images))
    for layer, dim in latents.all_dimensions(network):
        low, high = (training.to_uint8(network.decode(y, latents.move(codes, layer, dim, z))).float() for z in (-3, 3))
        found += ((high - low).abs().mean() / 255 > least).item()
    return found


def measured(run: Path, row: str, seed: int, kimg: float) -> dict:
    """The metrics of a variant, trained and measured now unless its folder has them."""
    folder = run / "ablations" / f"{row.strip('-') or 'recipe'}-{kimg:g}-{seed}"
    if not (folder / "metrics.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("encoder.pt", "classifier.pt"):
            shutil.copy(run / name, folder)
        data = training.load(run / "encoder.pt", "encoder")["data"]["data"]
        command = [
            "gan.py",
            "--data",
            data,
            "--outdir",
            folder,
            "--kimg",
            kimg,
            "--seed",
            seed,
            *([row] if row else []),
        ]
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
        command = ["metrics.py", "--network", folder, "--metrics", "fid,kid,pr,accuracy", "--json", folder / "m.json"]
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
        found = json.loads((folder / "m.json").read_text()) | {"alive": alive(gan.load(folder / "gan.pt"))}
        (folder / "m.json").unlink()
        (folder / "metrics.json").write_text(json.dumps(found, indent=1) + "\n")
        for name in ("encoder.pt", "classifier.pt", "gan.previous.pt"):  # 45 MB and more, which gan.pt has too
            (folder / name).unlink(missing_ok=True)
    return json.loads((folder / "metrics.json").read_text())


@click.command(help=__doc__, context_settings=dict(ignore_unknown_options=True, show_default=True))
@click.option(
    "--run",
    type=click.Path(path_type=Path, exists=True),
    default="runs/critters",
    help="Folder of an encoder.pt and classifier.pt.",
)
@click.option("--kimg", type=float, default=15.0, help="Thousands of images for each row and seed.")
@click.option("--seeds", type=int, default=3, help="From 0 on.")
@click.argument("rows", metavar="[ROW]...", nargs=-1, type=click.UNPROCESSED)
def main(run: Path, kimg: float, seeds: int, rows: tuple[str, ...]) -> None:
    table = {row: [measured(run.resolve(), row, seed, kimg) for seed in range(seeds)] for row in rows or ROWS}
    print("| option | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for row, found in table.items():
        cells = []
        for value, form in COLUMNS.values():
            values = [value(m) for m in found]
            cells.append(f"{form.format(np.mean(values))} +- {form.format(np.std(values, ddof=min(1, seeds - 1)))}")
        print(f"| {f'`{row}`' if row else 'the recipe'} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
