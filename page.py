"""The page of `explore.py serve`: labels, a slider for each dimension that changes the picture, downloads.

Everything is served from this machine, and to it alone unless another address is asked for: no fonts, scripts or
counts of users come from or go to anywhere else. Needs gradio 6.
"""

import hashlib
import json
import os
import random
import tempfile
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import click
import gradio as gr
import torch
from PIL import Image
from torch import Tensor

import gan
import latents

# Pictures are shown large, whatever their size, and stay in sight while the sliders scroll.
CSS = """
#picture img, #batch img {
    width: min(480px, 90vw) !important; height: auto !important; max-width: none; object-fit: contain !important;
}
#side { position: sticky; top: 8px; align-self: flex-start; }
"""


def visible_dimensions(network: gan.Network, file: Path) -> list[dict]:
    """What gets a slider: layer, dim and name of each dimension that changes the picture, those that do most first."""
    found = latents.found_names(network, file)
    if not found:
        click.echo("explore.py dimensions finds names for the sliders; until then they have numbers alone")
        # Sorted, with equal labels together, so that four at equal distances differ as far as they can.
        y = None if network.real_labels is None else network.real_labels[:: max(1, len(network.real_labels) // 4)][:4]
        # Without readers, on four images: it finds no names but the order, and the page opens soon.
        found = latents.measure(network, y, network.latents(range(4 if y is None else len(y))), {})
    return [d for d in found if d["change"] >= latents.VISIBLE]


def build(network: gan.Network, file: Path, folder: Path) -> gr.Blocks:
    """The page of a network. What it lets users download is written to `folder`, over and over."""
    names, start = network.label_names, network.latents([0])
    dims = visible_dimensions(network, file)
    columns = [latents.column(d["layer"], d["dim"]) for d in dims]

    # gradio checks that what comes from the browser lies in the ranges below.
    def code(chosen: str | list | None, seeds: list[int], truncation: float, z: tuple) -> tuple[Tensor | None, Tensor]:
        """y and latents: eps from the seeds, z from the sliders; a z without a slider is that of seed 0."""
        codes = torch.cat((network.latents(seeds)[:, : gan.NOISE], start[:, gan.NOISE :].repeat(len(seeds), 1)), 1)
        codes[:, columns] = torch.tensor(z, dtype=codes.dtype)
        # Checkboxes give a list, a radio one name.
        chosen = chosen if isinstance(chosen, list) else [chosen]
        y = torch.tensor([[float(name in chosen) for name in names]]) if names else None
        return None if y is None else y.repeat(len(seeds), 1), truncation * codes

    def draw(request: gr.Request, chosen, seed, truncation, *z) -> tuple[str, str, str]:
        """The picture, and the two files to download."""
        # An emptied field gives None.
        y, codes = code(chosen, [int(seed or 0)], truncation, z)
        # Hashed, because it comes from the browser: '../x' must not name a folder.
        own = folder / hashlib.sha256(str(request.session_hash).encode()).hexdigest()[:16]  # of this visitor
        own.mkdir(exist_ok=True)
        picture, latent = own / "picture.png", own / "latent.json"
        # Alone, as `sample --latent` draws the saved latent: the same bytes.
        image = Image.fromarray(gan.grid(latents.generate(network, y, codes), 1))
        y_note = ", ".join(chosen) if isinstance(chosen, list) else chosen or ""
        # 'eps': the seed draws the noise alone, z comes from the sliders.
        notes = latents.notes_of(network, y=y_note or "none", seed=f"eps {int(seed or 0)}", truncation=truncation)
        image.save(picture, pnginfo=latents.png_info(notes))
        latent.write_text(json.dumps(latents.to_json(network, None if y is None else y[0], codes[0])) + "\n")
        return str(picture), str(picture), str(latent)  # shown, and the two to save

    def draw_batch(chosen, seed, truncation, *z) -> Image.Image:
        """16 pictures in a square: the eps of this seed and of the 15 after it."""
        seeds = [(int(seed or 0) + i) % 2**32 for i in range(16)]  # after the last comes 0
        return Image.fromarray(gan.grid(latents.generate(network, *code(chosen, seeds, truncation, z), 16), 4))

    # delete_cache: gradio keeps every picture that was shown; those of ten minutes ago go, looked for as often.
    with gr.Blocks(title="InfoSCC-GAN", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f"# InfoSCC-GAN\n{file.name}, {network.size} px")
        with gr.Row():
            with gr.Column(scale=3):
                if network.label_kind == "one-hot":
                    choose = gr.Radio if len(names) <= 30 else gr.Dropdown  # more would push the sliders off the page
                    labels = choose(names, value=names[0], label="Class", elem_id="labels")
                elif names:
                    labels = gr.CheckboxGroup(names, value=[], label="Attributes", elem_id="labels")
                else:
                    labels = gr.State(None)  # stands in for them, so that `draw` gets as many arguments
                with gr.Row():
                    # Seeds that `sample --seeds` takes too.
                    seed = gr.Number(0, label="Seed of eps", precision=0, minimum=0, maximum=2**32 - 1, elem_id="seed")
                    # 0: the mean; 1: as in training; above: rarer latents than those.
                    truncation = gr.Slider(0, 1.5, 1, step=0.05, label="Truncation", elem_id="truncation")
                new = gr.Button("New eps", elem_id="new")
                gr.Markdown("Dimensions z, those that change the picture most first" if dims else "No z changes it.")
                sliders = []
                for first in range(0, len(dims), 2):  # two in a row
                    with gr.Row():
                        for d, c in list(zip(dims, columns, strict=True))[first : first + 2]:
                            name = "" if d["name"] == latents.NAMELESS else f": {d['name']}"
                            label = f"layer {d['layer']}, dim {d['dim']}{name}"
                            # Two digits, as the slider shows them: it would else start beside its own steps.
                            ends, at = latents.RANGE, round(start[0, c].item(), 2)
                            sliders.append(gr.Slider(-ends, ends, at, step=0.01, label=label, min_width=200))
            with gr.Column(scale=2, elem_id="side"):
                picture = gr.Image(
                    show_label=False, elem_id="picture", buttons=[], interactive=False, alt_text="Picture"
                )
                with gr.Row():
                    save_picture = gr.DownloadButton("Save picture", elem_id="save-picture", size="sm")
                    save_latent = gr.DownloadButton("Save latent", elem_id="save-latent", size="sm")
                more = gr.Button("16 seeds from this one", elem_id="more")
                batch = gr.Image(
                    show_label=False, elem_id="batch", buttons=[], interactive=False, alt_text="16 pictures"
                )

        # Every control redraws; while a slider moves, only its last place counts.
        inputs = [labels, seed, truncation, *sliders]
        moves = [control.change for control in inputs if not isinstance(control, gr.State)]
        # hidden: else the picture would fade at every move. private: not for other programs to call.
        quietly = dict(show_progress="hidden", api_visibility="private")
        outputs = [picture, save_picture, save_latent]
        # page.load: the first picture, before anything is touched.
        gr.on([page.load, *moves], draw, inputs, outputs, trigger_mode="always_last", **quietly)
        # The new seed is a change like any other, and redraws.
        new.click(lambda: random.randrange(2**31), None, seed, **quietly)
        more.click(draw_batch, inputs, batch, **quietly)
    return page


def serve(network: gan.Network, file: Path, host: str, port: int) -> None:
    """Show the page until Ctrl-C. Raises click.ClickException if the port is taken."""
    with tempfile.TemporaryDirectory(prefix="infoscc-page-") as folder:  # what visitors saved goes with it
        os.environ["GRADIO_TEMP_DIR"] = f"{folder}/cache"  # files go there by their content, so a new one is loaded
        page = build(network, file, Path(folder))
        fonts = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # the reader's own
        try:
            # ssr_mode would need Node.js. prevent_thread_lock: launch() returns, and the address is printed.
            page.launch(
                server_name=host, server_port=port, theme=gr.themes.Default(**fonts), css=CSS, quiet=True, share=False,
                ssr_mode=False, footer_links=[], prevent_thread_lock=True,
            )  # fmt: skip
        except OSError:
            raise click.ClickException(
                f"--host {host} --port {port} cannot be listened at: give another --port or --host"
            ) from None
        click.echo(f"http://{host}:{port} shows {file}; Ctrl-C ends it")
        page.block_thread()
