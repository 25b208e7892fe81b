"""What each part of the recipe of stage 3 is worth: variants of it on one encoder and classifier, several seeds each.

    python -m experiments.ablations                                      # ROWS, seeds 0 to 2, after `make demo`
    python -m experiments.ablations --run runs/icons "" --reg-every=4    # on other data, chosen rows

Trains and measures what is missing in RUN/ablations, then prints the table: mean +- sd over the seeds, and what the last
option of a row adds to FD, mean +- standard error of the differences with the same seed. All rows see the same number of
images. The judge of FD, KD, recall and control has never seen a generated image.
"""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import torch

import checkpoints
import control
import gan
import latents
import training

ROOT = Path(__file__).resolve().parent.parent
ROWS = (
    "",
    "--penalty-every=1",
    "--penalty=r1",
    "--beta1=0.5",
    "--width=16",
    "--no-projection",
    "--lr-decay=0",
    "--reg-augment=translation",
)
METRICS = "fid,kid,pr,accuracy"
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
    labels = network.real_labels
    y = None if labels is None else labels[torch.arange(images) * 7919 % len(labels)]  # of all over the training images
    codes = network.latents(range(images))
    for layer, dim in latents.all_dimensions(network):
        low, high = (training.to_uint8(network.decode(y, latents.move(codes, layer, dim, z))).float() for z in (-3, 3))
        found += ((high - low).abs().mean() / 255 > least).item()
    return found


def measured(run: Path, row: str, seed: int, kimg: float) -> dict:
    """The metrics of a variant, trained and measured now unless its folder has them, of the same stages, recipe and judge."""
    encoder, classifier = (checkpoints.load(run / f"{stage}.pt", stage) for stage in ("encoder", "classifier"))
    folder = run / "ablations" / f"{row.strip('-') or 'recipe'}-{kimg:g}-{seed}"
    made_of = [checkpoints.fingerprint(stage["model"]) for stage in (encoder, classifier)] + [
        gan.PRESETS,
        control.JUDGE,
    ]
    done, begun = folder / "metrics.json", folder / "made_of.json"
    if folder.exists() and not (begun.exists() and json.loads(begun.read_text()) == made_of):
        shutil.rmtree(folder)
    if done.exists():
        return json.loads(done.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(made_of))
    for name in ("encoder.pt", "classifier.pt"):
        shutil.copy(run / name, folder)
    data = encoder["data"]
    how = ["--data", data["data"], "--preset", data["preset"] or "none", "--size", data["size"], "--outdir", folder]
    how += ["--kimg", kimg, "--seed", seed, "--protocol", "ours"]
    asked = ["--network", folder, "--features", "judge", "--metrics", METRICS, "--json", folder / "m.json"]
    for command in (["gan.py", *how, *shlex.split(row)], ["metrics.py", *asked]):
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    found = json.loads((folder / "m.json").read_text()) | {"alive": alive(gan.load(folder / "gan.pt"))}
    for left in (*folder.glob("*.pt"), *folder.glob("snapshots/*.pt"), folder / "m.json"):
        if left.name != "gan.pt":  # which has all
            left.unlink()
    done.write_text(json.dumps(found, indent=1) + "\n")
    return found


def cell(values: list[float], form: str, by: float = 1.0) -> str:
    """Mean +- sd; by: what to divide the sd by."""
    sd = np.std(values, ddof=1) / by if len(values) > 1 else np.nan
    return f"{form.format(np.mean(values))} +- {form.format(sd)}"


@click.command(
    help=__doc__.replace("\n\n", "\n\n\b\n", 1), context_settings=dict(ignore_unknown_options=True, show_default=True)
)
@click.option(
    "--run",
    type=click.Path(path_type=Path, exists=True),
    default="runs/critters",
    help="Folder of an encoder.pt and classifier.pt.",
)
@click.option("--kimg", type=float, default=15.0, help="Thousands of images for each row and seed.")
@click.option("--seeds", type=click.IntRange(1), default=3, help="How many: 0 to N - 1.")
@click.argument("rows", metavar="[ROW]...", nargs=-1, type=click.UNPROCESSED)
def main(run: Path, kimg: float, seeds: int, rows: tuple[str, ...]) -> None:
    table = {row: [measured(run.resolve(), row, seed, kimg) for seed in range(seeds)] for row in rows or ROWS}
    print("| option | " + " | ".join(COLUMNS) + " | the last option adds to FD |\n" + "|---" * (len(COLUMNS) + 2) + "|")
    for row, found in table.items():
        cells = [cell([value(m) for m in found], form) for value, form in COLUMNS.values()]
        before = table.get(row.rpartition(" ")[0], []) if row else []
        added = [ours["fd"] - theirs["fd"] for ours, theirs in zip(found, before, strict=False)]
        cells.append(cell(added, "{:+.0f}", by=seeds**0.5).replace("+- +", "+- ") if added else "")
        print(f"| {f'`{row}`' if row else 'the recipe'} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
