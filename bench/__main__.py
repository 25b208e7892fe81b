"""The command: runs the benchmarks, prints their table and saves it as JSON."""

import json
import os
import platform
import subprocess
from pathlib import Path

import click
import torch

from .data import data_rows
from .metrics import metric_rows
from .ops import op_rows
from .step import generation_rows, step_rows

GROUPS = dict(ops=op_rows, step=step_rows, generation=generation_rows, data=data_rows, metrics=metric_rows)


def machine() -> dict:
    """What the figures hold for."""
    # lscpu knows the model; platform has the architecture at most.
    cpu = subprocess.run("lscpu", capture_output=True, text=True, check=False).stdout.partition("Model name:")[2]
    cpu = cpu.partition("\n")[0].strip() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(cpu=cpu, cores=os.cpu_count(), gpu=gpu, torch=torch.__version__, python=platform.python_version())


def line(row: dict) -> str:
    """A row of the table: what, how many times as fast, the quartiles of that, note."""
    ratio = f"{row['ratio']:7.2f}x" if "ratio" in row else ""
    spread = "[{:.2f}, {:.2f}]".format(*row["spread"]) if "spread" in row else ""
    return f"{row['what']:70} {ratio:8} {spread:14}  {row['note']}".rstrip()


@click.command()
@click.option("--quick", is_flag=True, help="Fewer repetitions and cases.")
@click.option("--only", type=click.Choice(list(GROUPS)), help="One group.")
@click.option("--out", metavar="JSON", default="bench.json", show_default=True, help="File for the figures.")
def main(quick: bool, only: str | None, out: str) -> None:
    """Time ours against the usual ways. A ratio above 1 means that ours is faster; in brackets its quartiles."""
    rows = []
    for name, measure in GROUPS.items():
        if only in (None, name):
            for row in measure(quick):
                click.echo(line(row))
                rows.append(row)
            Path(out).write_text(json.dumps(dict(machine=machine(), rows=rows), indent=1) + "\n")  # so far
    click.echo(f"{machine()}; wrote {out}")


if __name__ == "__main__":
    main()
