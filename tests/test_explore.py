"""explore.py and latents.py: what the pictures show, what the dimensions are called, and the commands."""

import io
import json
import shutil
import warnings
from types import SimpleNamespace

import click
import numpy as np
import pytest
import torch
from conftest import ROOT, copy_run
from PIL import Image

import checkpoints
import control
import dataset
import explore
import gan
import latents


def lively_decoder(size: int, labels: int) -> gan.Decoder:
    """A decoder of random weights whose pictures differ plainly with y, eps and z."""
    torch.manual_seed(1)
    decoder = gan.Decoder(size, labels)
    if labels:
        decoder.mapper.weight.data[:, :labels].mul_(10)
    return decoder.eval().requires_grad_(False)


def save_network(path, decoder: gan.Decoder, names: list[str], kind: str, name: str = "rigged"):
    """A gan.pt of this decoder alone, with no encoder, classifier or images."""
    size = decoder.generator.size
    data = dict(
        data=f"/nowhere/{name}", name=name, preset="", size=size, squash=False, train_on_all=False, fingerprint="0"
    )
    data |= dict(attributes="class", label_names=names, label_kind=kind, splits={"train": len(names)})
    rows = torch.eye(len(names), dtype=torch.uint8)
    state = dict(
        stage="gan",
        data=data,
        options={"orth": "penalty", "width": 16, "outdir": "/nowhere/out"},
        ema=decoder.state_dict(),
    )
    state |= dict(labels={"rows": rows, "counts": torch.ones(len(names), dtype=torch.long)} if names else None)
    state |= dict(encoder=None, classifier=None, entropy_bits=1.0, images_seen=0, iteration=0)
    checkpoints.save(path, state)
    return path


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """A run's folder with a gan.pt of 32 px, three classes, no encoder."""
    folder = tmp_path_factory.mktemp("lively")
    save_network(folder / "gan.pt", lively_decoder(32, 3), ["cat", "dog", "big_wild"], "one-hot")
    return folder


@pytest.fixture(scope="module")
def attributes(tmp_path_factory):
    """The same for three attributes that can be on together."""
    folder = tmp_path_factory.mktemp("attributes")
    save_network(folder / "gan.pt", lively_decoder(32, 3), ["Hat", "Bow_Tie", "Tie"], "multi-label")
    return folder


@pytest.fixture(scope="module")
def trained(command, class_folder, class_run, tmp_path_factory):
    """The folder of a run of a few iterations, with encoder and classifier."""
    folder = copy_run(class_run, tmp_path_factory.mktemp("explore") / "run")
    command("gan", "--data", class_folder, "--outdir", folder, "--smoke", "--kimg", 0.032)
    return folder


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


# What each dimension does.


def rig(decoder: gan.Decoder) -> None:
    """Pictures of mid-dark noise in which dimension 4 of layer 3 alone lights the columns at the left.

    Dimension 2 darkens the lower right a little, where no attribute of `attribute_folder` is; all others do nothing.
    """
    for p in decoder.parameters():
        p.data.zero_()
    block = decoder.generator.blocks[2]
    tent = torch.tensor([0.5, 1, 0.5])
    block.subspace_conv2.weight.data[0, 0] = tent[:, None] * tent  # [in, out, 3, 3]: bilinear upsampling
    block.feature_conv2.weight.data[0, 0, 1, 1] = 1
    decoder.generator.last.weight.data[:, 0, 3, 3] = 1
    decoder.generator.last.bias.data.fill_(-1.6)  # tanh(0.8 - 1.6) is about the mean of the noise
    subspace = block.subspace
    subspace.mu.data[..., 0] = 0.8 + 0.3 * torch.randn(16, 16)
    U = subspace.U.data.view(6, 16, 16, -1)
    U[3, :, :3, 0], subspace.L.data[3] = 1, 0.4
    U[1, 9:14, 9:14, 0], subspace.L.data[1] = 1, 0.1
    subspace.L.data[0] = 18  # large, but of an empty basis: |L| says nothing


@pytest.mark.long
def test_dimensions_of_a_rigged_generator(command, attribute_folder, attribute_run, tmp_path, monkeypatch):
    folder = copy_run(attribute_run, tmp_path / "run")
    data = ("--data", attribute_folder, "--outdir", folder)
    command("classifier", *data, "--no-resume", "--epochs", 300)
    command("gan", *data, "--smoke", "--kimg", 0.008, "--width", 16)
    state = checkpoints.load(folder / "gan.pt", "gan")
    decoder = gan.Decoder(32, 3)
    rig(decoder)
    checkpoints.save(folder / "gan.pt", state | {"ema": decoder.state_dict()})

    monkeypatch.setattr(explore, "COLUMNS", 2)
    table = command("explore", "dimensions", "--network", folder, "--num", 16, "--steps", 60).output
    assert f"it has the 2 labels that move most; {folder / 'dimensions.json'} has all 3" in table
    content = json.loads((folder / "dimensions.json").read_text())
    found = {(d["layer"], d["dim"]): d for d in content["dimensions"]}
    names = {key: d["name"] for key, d in found.items() if d["name"] != "no attribute"}
    assert list(names) == [(3, 4)] and names[3, 4].startswith("Left +"), table
    assert list(found)[:2] == [(3, 4), (3, 2)] and f"3   4    {found[3, 4]['change']:.1%}   {names[3, 4]}" in table
    left = found[3, 4]["labels"]["Left"]
    assert set(left) == {"classifier", "judge"} and all(r["consistency"] == 1 for r in left.values())
    assert float(names[3, 4].split()[1]) == round(min(r["effect"] for r in left.values()), 1)
    assert found[3, 1]["change"] == 0 and found[3, 1]["labels"]["Left"]["judge"]["logit"] == 0
    assert pixels(folder / "dimensions.png").shape[0] > 300

    # The change is the mean difference between z = -2 and 2; strips are sorted by their own, and carry the name.
    network = gan.load(folder / "gan.pt")
    low, high = (latents.move(network.latents([0]), 3, 4, z) for z in (-2, 2))
    y = torch.zeros(1, 3)
    difference = (network.decode(y, high) - network.decode(y, low)).abs().mean() / 2
    assert found[3, 4]["change"] == pytest.approx(difference.item(), abs=0.004)
    command("explore", "traverse", "--network", folder, "--steps", 3, "--tile", 32)
    strips = pixels(folder / "traverse.png")[-18 * 32 :, -3 * 32 :].reshape(18, 32, 3, 32, 3)
    moved = np.abs(strips[:, :, 2] - strips[:, :, 0]).mean((1, 2, 3))
    assert moved[0] > 10 > moved[1] > 1 and (moved[2:] == 0).all()

    # An export takes the names along; without its encoder, the judge alone finds them: the one trained before.
    monkeypatch.setattr(control, "train_judge", lambda *a, **k: pytest.fail("another judge"))
    command("explore", "export", "--network", folder, "--out", tmp_path / "small.pt")
    assert {d["name"] for d in gan.load(tmp_path / "small.pt").dimensions} == {names[3, 4], "no attribute"}
    again = ("--num", 8, "--steps", 60, "--json", tmp_path / "again.json", "--data", attribute_folder)
    line = command("explore", "dimensions", "--network", tmp_path / "small.pt", *again).output
    assert "the judge alone" in line
    first = json.loads((tmp_path / "again.json").read_text())["dimensions"][0]
    assert first["name"].startswith("Left +") and set(first["labels"]["Left"]) == {"judge"}


def test_a_class_called_no_is_not_what_names_a_dimension():
    seen = {"no": {who: {"effect": 1.0, "consistency": 0.5, "logit": 1.2} for who in ("classifier", "judge")}}
    entry = dict(layer=1, dim=1, change=0.01, name=latents.NAMELESS, also=[], labels=seen)
    assert "+1.2" not in explore.table([entry])[1] and "+1.2" in explore.table([entry | {"name": "no +1.0"}])[1]


def test_a_loop_without_variation_is_finite():
    _, codes = latents.loop(None, torch.zeros(2, 10), 5, True)
    assert codes.isfinite().all()


def test_names_need_all_readers_and_one_direction():
    def labels(classifier, judge, consistency=1.0):
        by = {"classifier": classifier, "judge": judge}
        return {"Hat": {w: {"effect": e, "consistency": consistency} for w, e in by.items() if e is not None}}

    assert latents.names_of(labels(1.5, 0.9)) == [("Hat", 0.9)]
    assert latents.names_of(labels(-1.5, -1.9)) == [("Hat", -1.5)]
    assert latents.names_of(labels(None, 0.9)) == [("Hat", 0.9)]
    for nothing in (labels(1.5, -0.9), labels(0.3, 0.9), labels(0.9, None), labels(1.5, 0.9, 0.7)):
        assert latents.names_of(nothing) == []


def test_log_odds():
    p = torch.tensor([[0.7, 0.2, 0.1]])
    torch.testing.assert_close(latents.log_odds(p.log() + 5, "one-hot"), (p / (1 - p)).log())
    assert torch.equal(latents.log_odds(p, "multi-label"), p)
    assert latents.log_odds(torch.tensor([[100.0, -100.0]]), "one-hot").isfinite().all()


def test_the_check_against_the_factors_of_critters():
    def dimension(layer, **effects):
        labels = {name: {"judge": {"effect": e, "consistency": 1.0, "logit": e}} for name, e in effects.items()}
        return dict(layer=layer, dim=1, labels=labels)

    found = [dimension(1, yaw=-0.9, light=2.0), dimension(2, yaw=1.5, roll=0.1), dimension(3, yaw=1.2)]
    _, pose, colour = explore.factor_table(found, ["yaw", "roll", "light", "Hat"])
    assert pose == "  pose    yaw: layer 2, dim 1 (+1.5); roll: none"
    assert colour == "  colour  light: layer 1, dim 1 (+2.0)"


def test_everything_that_is_known_of_critters(monkeypatch, tmp_path):
    import critters
    import dataset

    monkeypatch.setenv("INFOSCC_CACHE", str(tmp_path))
    monkeypatch.setattr(critters, "SPLITS", {"train": 60, "val": 90})
    data = dataset.open_dataset("critters", 32, "val")
    info = dataset.read_info(data.pack)
    run = SimpleNamespace(
        images={"val": data}, names=data.label_names, labels=lambda split: torch.from_numpy(data.labels),
        kind="one-hot", all_labels=(info["classes"], info["attributes"]),
    )  # fmt: skip
    names, known = latents.known_labels(run, "val")
    assert names[:3] == ["cat", "dog", "wild"] and {"Eyeglasses", "Hat", "lion", "yaw", "head size", "light"} <= set(
        names
    )
    assert known.shape == (90, len(names)) and known.min() == 0 and known.max() == 1
    scale = [critters.factors(0, critters.OFFSETS["val"] + i)["scale"] for i in range(90)]
    assert known[:, names.index("head size")].argmax() == np.argmax(scale)
    assert torch.equal(known[:, names.index("dog")], torch.from_numpy(data.labels[:, 1]))


def test_a_judge_that_can_read_nothing_names_nothing(command, trained):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        said = command("explore", "dimensions", "--network", trained, "--num", 8, "--steps", 1).output
    assert "The judge cannot tell well enough to name anything by it: " in said


def test_names_of_other_weights_are_not_taken(lively, tmp_path):
    network = gan.load(lively / "gan.pt")
    entry = dict(layer=1, dim=2, name="Hat +1.0", change=0.5)
    own = checkpoints.fingerprint(network.decoder.state_dict())
    for content, found in (
        ({"network": own, "dimensions": [entry]}, [entry]),
        ({"network": own, "dimensions": [entry | {"layer": 9}]}, []),
        ({"network": own, "dimensions": [{"layer": [1], "dim": {}}]}, []),
        ({"network": own, "dimensions": 3}, []),
        ({"network": "other", "dimensions": [entry]}, []),
        ([], []),
    ):
        (tmp_path / "dimensions.json").write_text(json.dumps(content))
        assert latents.found_names(network, tmp_path / "gan.pt") == found
    (tmp_path / "dimensions.json").write_text("[" * 100_000)
    assert latents.found_names(network, tmp_path / "gan.pt") == []
    assert latents.found_names(network, tmp_path / "nowhere" / "gan.pt") == []


# Samples.


def test_a_seed_is_one_picture_whatever_is_drawn_beside_it(command, lively, tmp_path):
    command("explore", "sample", "--network", lively, "--separate", "--seeds", "0-39", "--out", tmp_path / "many")
    command(
        "explore", "sample", "--network", lively, "--separate", "--seeds", "39", "--y", "dog", "--out", tmp_path / "one"
    )
    (one,) = (tmp_path / "one").iterdir()
    assert np.array_equal(pixels(one), pixels(tmp_path / "many" / "079-dog-seed-39.png"))
    assert len(list((tmp_path / "many").iterdir())) == 120
    assert not np.array_equal(pixels(one), pixels(tmp_path / "many" / "078-dog-seed-38.png"))
    command(
        "explore",
        "sample",
        "--network",
        lively,
        "--seeds",
        "38-39",
        "--y",
        "dog",
        "--tile",
        32,
        "--out",
        tmp_path / "grid.png",
    )
    assert np.array_equal(pixels(tmp_path / "grid.png")[-32:, -32:], pixels(one))


def test_png_notes(command, lively, tmp_path):
    weights = checkpoints.fingerprint(gan.load(lively / "gan.pt").decoder.state_dict())
    sample = ("explore", "sample", "--network", lively / "gan.pt", "--truncation", 0.5)
    command(*sample, "--y", "big wild", "--seeds", 7, "--separate", "--out", tmp_path)
    with Image.open(tmp_path / "0-big_wild-seed-7.png") as picture:
        assert picture.text == {"network": weights, "y": "big_wild", "seed": "7", "truncation": "0.5"}
    command(*sample, "--seeds", "3,5", "--vary", "z", "--out", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        notes = {"network": weights, "y": "cat; dog; big_wild", "seed": "3,5", "truncation": "0.5", "vary": "z"}
        assert picture.text == notes


def test_the_four_explorations(command, lively, tmp_path):
    network = gan.load(lively / "gan.pt")
    drawn, N = network.latents([4, 9]), gan.NOISE
    y = torch.eye(3)[:2]
    for vary, first, second in (("eps,z", 1, 1), ("eps", 1, 0), ("z", 0, 1)):
        labels, codes = latents.exploration(network, y, [4, 9], vary)
        assert labels.argmax(1).tolist() == [0, 0, 1, 1] and torch.equal(codes[:2], codes[2:])
        assert torch.equal(codes[0], drawn[0])
        assert torch.equal(codes[1], torch.cat((drawn[first, :N], drawn[second, N:])))
    labels, codes = latents.exploration(network, y, [4, 9], "y")
    assert labels.argmax(1).tolist() == [0, 1, 0, 1] and torch.equal(codes, drawn[[0, 0, 1, 1]])

    pictures = {}
    for vary in ("eps,z", "eps", "z", "y"):
        out = ("--seeds", "4,9", "--tile", 32, "--out", tmp_path / "x.png")
        command("explore", "sample", "--network", lively, "--y", "cat", "--y", "dog", "--vary", vary, *out)
        pictures[vary] = pixels(tmp_path / "x.png")[-64:, -64:].reshape(2, 32, 2, 32, 3).swapaxes(1, 2)
    both = pictures["eps,z"]
    assert np.array_equal(pictures["y"], both.swapaxes(0, 1))  # rows and columns change places
    for vary in ("eps", "z"):
        assert np.array_equal(pictures[vary][:, 0], both[:, 0]) and not np.array_equal(pictures[vary][:, 1], both[:, 1])
    assert not np.array_equal(pictures["eps"], pictures["z"])


def test_samples_change_with_the_options(command, trained):
    command("explore", "sample", "--network", trained)
    whole = pixels(trained / "sample.png")
    for change in (["--y", "low"], ["--seeds", "9-12"], ["--truncation", "0.2"], ["--tile", "32"], ["--vary", "y"]):
        command("explore", "sample", "--network", trained / "gan.pt", "--out", trained / "other.png", *change)
        other = pixels(trained / "other.png")
        assert other.shape != whole.shape or not np.array_equal(other, whole), change


def test_labels_by_the_names_that_tables_print(lively, attributes):
    network = gan.load(lively / "gan.pt")
    for text in ("big_wild", "big wild", "Big Wild"):
        assert latents.parse_y(network, [text]) == (pytest.approx(torch.tensor([[0.0, 0, 1]])), ["big_wild"])
    network = gan.load(attributes / "gan.pt")
    y, names = latents.parse_y(network, ["hat, bow tie", "none", "Tie"])
    assert y.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]] and names == ["Hat, Bow_Tie", "none", "Tie"]
    assert latents.parse_y(network, [])[0].tolist() == torch.eye(3).tolist()
    unclear = SimpleNamespace(label_names=["a_b", "a b", "A b"], label_kind="one-hot")
    assert latents.parse_y(unclear, ["a b"])[0].tolist() == [[0, 1, 0]]
    with pytest.raises(click.UsageError, match="classes here are a_b, a b, A b"):
        latents.parse_y(unclear, ["A_B"])


def test_classes_with_commas():
    network = SimpleNamespace(label_names=["dog", "tench, Tinca"], label_kind="one-hot")
    assert latents.parse_y(network, [])[0].tolist() == [[1, 0], [0, 1]]
    assert latents.parse_y(network, ["tench, Tinca"])[0].tolist() == [[0, 1]]


# Strips and loops.


def test_strips_move_one_dimension():
    decoder = lively_decoder(32, 0)
    with torch.inference_mode():
        network = gan.Network(decoder, None, None, None, {}, [], "none", None, 32, 0, {}, decoder.generator.convolved())
    code = network.latents([3])
    at = code[0, gan.NOISE + 6 + 3].item()
    (strip,) = latents.strips(network, None, code, [(2, 4)], torch.tensor([-4.5, at, 4.5]))
    torch.testing.assert_close(strip[1:2], network.decode(None, code), rtol=0, atol=1e-4)
    assert (strip[0] - strip[2]).abs().max() > 1e-3
    assert latents.spread(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)) == 0.5  # of the range, around grey


def test_strips_and_animations(command, lively, tmp_path):
    command("explore", "traverse", "--network", lively, "--dims", "3.2,1", "--steps", 5, "--y", "dog")
    assert pixels(lively / "traverse.png").shape[0] // 64 == 7
    other = tmp_path / "cat.png"
    command("explore", "traverse", "--network", lively, "--dims", "3.2,1", "--steps", 5, "--y", "cat", "--out", other)
    assert not np.array_equal(pixels(other), pixels(lively / "traverse.png"))
    command("explore", "traverse", "--network", lively, "--dims", "2", "--steps", 5, "--out", tmp_path / "moving.gif")
    with Image.open(tmp_path / "moving.gif") as gif:
        assert gif.n_frames == 8 and gif.info["loop"] == 0  # 5 there, 3 back
        assert json.loads(gif.info["comment"])["y"] == "cat"
    command("explore", "traverse", "--network", lively, "--seeds", "1,2", "--steps", 3)
    strips = [pixels(lively / f"traverse-{seed}.png")[-18 * 64 :, -64:] for seed in (1, 2)]
    assert not np.array_equal(*strips)


def test_the_loop_is_smooth_and_closed():
    codes, y = torch.randn(4, 600), torch.eye(3)[[0, 1, 2, 0]]
    labels, path = latents.loop(y, codes, 20, one_hot=True)
    torch.testing.assert_close(path[::20], codes)
    torch.testing.assert_close(labels[::20], y)
    torch.testing.assert_close(labels.sum(1), torch.ones(80))
    lengths = codes.norm(dim=1)
    assert lengths.min() * 0.999 <= path.norm(dim=1).min() and path.norm(dim=1).max() <= lengths.max() * 1.001
    speed = (path.roll(-1, 0) - path).norm(dim=1)  # from the last frame to the first too
    assert speed.max() < 2.5 * speed.min() and (speed.roll(-1) - speed).abs().max() < 0.2 * speed.mean()
    on, _ = latents.loop(torch.tensor([[1.0, 1], [1, 0]]), codes[:2], 10, one_hot=False)
    assert on.min() >= 0 and on.max() <= 1 and torch.allclose(on[:, 0], torch.ones(20))
    assert latents.loop(None, codes, 5, one_hot=False)[0] is None


def test_interpolation(command, lively, tmp_path):
    loop = ("explore", "traverse", "--network", lively, "--interpolate", "--frames", 4, "--tile", 32)
    command(*loop, "--seeds", "1-3", "--y", "cat", "--y", "dog")
    with Image.open(lively / "interpolate.gif") as gif:
        assert gif.n_frames == 12 and gif.size == (32, 32) and gif.info["duration"] == 40
    assert "two seeds or two ys" in command(*loop, "--seeds", 1, "--y", "cat", code=2).output
    assert "ends in .gif or .mp4" in command(*loop, "--out", tmp_path / "x.png", code=2).output
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")
def test_mp4(command, lively, tmp_path):
    out = tmp_path / "loop.mp4"
    command("explore", "traverse", "--network", lively, "--interpolate", "--frames", 4, "--tile", 33, "--out", out)
    assert out.read_bytes()[4:8] == b"ftyp"


def test_mp4_without_ffmpeg(command, lively, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    out = ("--out", tmp_path / "loop.mp4")
    line = command("explore", "traverse", "--network", lively, "--interpolate", "--frames", 2, *out, code=2).output
    assert "needs ffmpeg" in line and not out[1].exists()


# Latents as JSON, projection, export.


def test_latents_from_json(command, lively, tmp_path):
    network = gan.load(lively / "gan.pt")
    y, code = torch.eye(3)[1], network.latents([5])[0]
    (tmp_path / "five.json").write_text(json.dumps(latents.to_json(network, y, code)))
    read = latents.read_json(network, tmp_path / "five.json")
    assert torch.equal(read[0][0], y) and torch.equal(read[1][0], code)
    command(
        "explore",
        "sample",
        "--network",
        lively,
        "--latent",
        tmp_path / "five.json",
        "--tile",
        32,
        "--out",
        tmp_path / "a.png",
    )
    command(
        "explore", "sample", "--network", lively, "--y", "dog", "--seeds", 5, "--tile", 32, "--out", tmp_path / "b.png"
    )
    assert np.array_equal(pixels(tmp_path / "a.png")[-32:, -32:], pixels(tmp_path / "b.png")[-32:, -32:])
    both = ("--latent", tmp_path / "five.json", "--y", "dog")
    assert "leave --y" in command("explore", "sample", "--network", lively, *both, code=2).output


def test_bad_latents_are_one_line(command, lively, tmp_path):
    network = gan.load(lively / "gan.pt")
    good = latents.to_json(network, torch.eye(3)[1], network.latents([5])[0])
    z, noise = good["z"], good["noise"]
    for text, why in (
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("\0\xff", "no JSON"),
        ("[]", "entries y, noise and z"),
        (json.dumps(good | {"y": {"cat": 1}}), "cat, dog, big_wild"),
        (json.dumps(good | {"y": {"cat": 1, "dog": "1", "big_wild": 0}}), "y must hold finite numbers"),
        (json.dumps(good | {"noise": noise[:-1]}), "noise must be a list of 512"),
        (json.dumps(good | {"noise": [float("nan"), *noise[1:]]}), "finite"),
        (json.dumps(good | {"noise": [1e30, *noise[1:]]}), "at most 1000"),
        (json.dumps(good | {"noise": [10**400, *noise[1:]]}), "noise"),
        (json.dumps(good | {"z": z[:1]}), "3 layers"),
        (json.dumps(good | {"z": [z[0], z[1], [*z[2], 0]]}), "each layer of z must be a list of 6"),
        (json.dumps(good | {"z": [z[0], z[1], [True] * 6]}), "each layer of z must hold"),
    ):
        (tmp_path / "bad.json").write_text(text, encoding="latin-1")
        line = command("explore", "sample", "--network", lively, "--latent", tmp_path / "bad.json", code=1).output
        assert why in line and "bad.json is not a latent" in line and line.count("\n") == 1, (text[:40], line)
    for path, why in ((tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")):
        assert why in command("explore", "sample", "--network", lively, "--latent", path, code=1).output


def test_projection_comes_back_to_a_generated_picture(command, lively, tmp_path):
    command("explore", "sample", "--network", lively, "--separate", "--seeds", 77, "--y", "dog", "--out", tmp_path)
    picture, out = tmp_path / "0-dog-seed-77.png", tmp_path / "found.png"
    line = command(
        "explore", "project", picture, "--network", lively, "--steps", 150, "--tile", 32, "--out", out
    ).output
    assert "holds no encoder" in line
    given, found = np.split(pixels(out)[-32:, -64:], 2, axis=1)
    assert np.array_equal(given, pixels(picture))
    psnr = 10 * np.log10(255**2 / np.square(given - found).mean())
    assert psnr >= 25 and f", {psnr:.1f} dB" in line

    # The JSON is the picture's latent; a search of two steps finds less.
    network = gan.load(lively / "gan.pt")
    y, code = latents.read_json(network, tmp_path / "found.json")
    assert y.sum().item() == pytest.approx(1, abs=1e-5)
    assert np.array_equal(gan.grid(network.decode(y, code), 1), found)
    command("explore", "project", picture, "--network", lively, "--steps", 2, "--tile", 32, "--out", out)
    assert np.square(given - pixels(out)[-32:, -32:]).mean() > 4 * np.square(given - found).mean()


def test_projection_through_the_encoder(command, trained, class_folder, monkeypatch):
    target = class_folder / "low" / "3.png"
    command("explore", "project", target, "--network", trained, "--steps", 4)
    with_features = json.loads((trained / "project.json").read_text())
    assert set(with_features["y"]) == {"high", "low", "middle"}
    monkeypatch.setattr(latents, "FEATURES", 0.0)
    command("explore", "project", target, "--network", trained, "--steps", 4)
    assert json.loads((trained / "project.json").read_text()) != with_features


def test_pictures_that_cannot_be_projected(command, lively, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for path in (tmp_path / "text.png", tmp_path / "missing.png", tmp_path):
        line = command("explore", "project", path, "--network", lively, code=1).output
        assert f"{path} cannot be read as a picture" in line and line.count("\n") == 1
    wide = tmp_path / "wide.png"  # cropped to its middle and resized, like the data
    Image.fromarray(np.full((50, 90, 3), 200, np.uint8)).save(wide)
    command("explore", "project", wide, "--network", lively, "--steps", 2, "--tile", 32, "--out", tmp_path / "o.png")
    assert (pixels(tmp_path / "o.png")[-32:, -64:-32] == 200).all()


def test_export(command, trained, class_folder, tmp_path):
    command("explore", "export", "--network", trained, "--out", tmp_path / "small.pt")
    state = torch.load(tmp_path / "small.pt", weights_only=True)
    floats = [
        t for part in (state["ema"], state["classifier"]["model"]) for t in part.values() if t.is_floating_point()
    ]
    assert {t.dtype for t in floats} == {torch.float16} and state["encoder"] is None and "trainer" not in state
    assert (tmp_path / "small.pt").stat().st_size < 2.1 * sum(t.numel() for t in floats) < 8e6
    raw = (tmp_path / "small.pt").read_bytes()
    assert str(tmp_path.parent).encode() not in raw and str(ROOT).encode() not in raw  # no paths of this machine
    full, small = gan.load(trained / "gan.pt"), gan.load(tmp_path / "small.pt")
    assert small.encoder is None and small.label_names == full.label_names
    y = torch.eye(3)
    torch.testing.assert_close(small.generate(y, [1, 2, 3]), full.generate(y, [1, 2, 3]), rtol=0, atol=0.01)
    command("explore", "sample", "--network", tmp_path / "small.pt")
    command("explore", "export", "--network", tmp_path / "small.pt", "--out", tmp_path / "small.pt")  # of an export too
    (snapshot,) = (trained / "snapshots").iterdir()  # which has the decoder alone
    command("explore", "export", "--network", snapshot, "--out", tmp_path / "snapshot.pt")
    assert torch.equal(gan.load(tmp_path / "snapshot.pt").generate(y[:1], [1]), small.generate(y[:1], [1]))

    # What needs the images or the encoder says so.
    for code, stage, *args in ((1, "explore", "embedding"), (2, "metrics", "--metrics", "accuracy")):
        args += ["--network", tmp_path / "small.pt"]
        assert "small.pt does not say where its images are: give --data" in command(stage, *args, code=1).output
        assert "encoder" in command(stage, *args, "--data", class_folder, code=code).output


def test_export_overwrites_no_checkpoint(command, trained, tmp_path):
    before = (trained / "gan.pt").stat()
    assert (
        "goes on from" in command("explore", "export", "--network", trained, "--out", trained / "gan.pt", code=1).output
    )
    assert (trained / "gan.pt").stat() == before
    (tmp_path / "mine.pt").write_text("mine")
    assert "mine.pt" in command("explore", "export", "--network", trained, "--out", tmp_path / "mine.pt", code=1).output
    assert (tmp_path / "mine.pt").read_text() == "mine"


# Embeddings, and what is drawn with names.


def test_embedding(command, class_folder, class_run, attribute_run, attribute_folder, trained, tmp_path, monkeypatch):
    for run in (class_run, attribute_run):
        out = tmp_path / f"{run.name}.png"
        line = command("explore", "embedding", "--network", run / "encoder.pt", "--out", out, code=1).output
        assert "validation images are too few" in line  # 7 and 6 of them
    moved = ("--network", class_run / "encoder.pt", "--data", attribute_folder)
    assert "made from other images" in command("explore", "embedding", *moved, code=1).output
    state = checkpoints.load(class_run / "encoder.pt", "encoder")
    checkpoints.save(tmp_path / "odd.pt", state | {"config": state["config"] | {"backbone": "resnet34"}})
    assert "odd.pt is incomplete" in command("explore", "embedding", "--network", tmp_path / "odd.pt", code=1).output
    folders = ("--images", class_folder, "--reference", class_folder, "--metrics", "fid")
    assert "odd.pt is incomplete" in command("metrics", *folders, "--features", tmp_path / "odd.pt", code=1).output
    squashed = ("--data", class_folder, "--outdir", tmp_path / "squashed")
    command("encoder", *squashed, "--smoke", "--squash", "--train-on-all")
    line = command("explore", "embedding", "--network", tmp_path / "squashed" / "encoder.pt", code=1).output
    assert "validation images are too few" in line
    command("explore", "embedding", "--network", trained)  # with as many generated ones, 14
    height, width, _ = pixels(trained / "embedding.png").shape
    assert width == 2 * height  # by origin and by label
    first = (trained / "embedding.png").read_bytes()
    command("explore", "embedding", "--network", trained, "--seed", 1)
    assert (trained / "embedding.png").read_bytes() != first
    monkeypatch.setattr(explore, "PANELS", 1)
    assert "it leaves out label" in command("explore", "embedding", "--network", trained).output


def test_scatter_of_names_that_are_no_formulas(tmp_path):
    points = np.random.default_rng(0).normal(size=(30, 2))
    figures = []
    for names in (["$0_to_$10", "$10_to_^$"], ["off", "on"]):
        explore.scatter(points, [("label", np.arange(30) % 2, names)], "points").savefig(tmp_path / "x.png")
        figures.append((tmp_path / "x.png").read_bytes())
    assert figures[0] != figures[1]


def test_names_beyond_ascii_are_drawn():
    pictures = [np.asarray(explore.gallery(torch.zeros(1, 3, 8, 8), 1, 64, [n], [""])) for n in ("größe", "gräße")]
    assert not np.array_equal(*pictures)


# What the user gets wrong.


def test_nothing_of_the_users_is_written_over(command, lively, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 64), "red").save(photo)
    (tmp_path / "gan.json").write_text('{"size": 32}')
    project = ("explore", "project", photo, "--network", lively, "--steps", 2)
    assert "is the picture itself" in command(*project, "--out", photo, code=2).output
    assert "gan.json is there and is no latent" in command(*project, "--out", tmp_path / "gan.png", code=2).output
    assert json.loads((tmp_path / "gan.json").read_text()) == {"size": 32} and Image.open(photo).size == (64, 64)
    for _ in range(2):  # a latent that it wrote itself it writes again
        command(*project, "--out", tmp_path / "made.png")


def test_names_of_columns_that_are_wider_than_a_tile_stand_upright():
    images, names = torch.zeros(4, 3, 8, 8), ["a", "b", "latent of a nice cat", "d"]
    narrow, wide = (np.asarray(explore.gallery(images, 4, 48, [], n)) for n in (["a", "b", "c", "d"], names))
    assert wide.shape[1] == narrow.shape[1] == 4 * 48 and wide.shape[0] > narrow.shape[0] + 60
    ink = (wide[:-48] < 128).any(2)
    assert [ink[:, c * 48 : (c + 1) * 48].any() for c in range(4)] == [True] * 4
    assert not ink[:, ::48].any()  # none reaches into the next column


def test_bad_options_are_one_line(command, lively, attributes, class_run, tmp_path, monkeypatch):
    sample, strips = ("sample", "--network", lively), ("traverse", "--network", lively)
    bad = [(*sample, "--seeds", seeds) for seeds in ("a", "-1", "5-3", str(2**32), "0-99999999", "1,,2")]
    lines = dict.fromkeys(bad, "--seeds")
    lines |= {
        (*sample, "--y", "lion"): "--y lion: the classes here are cat, dog, big_wild",
        (*sample, "--y", "cat,dog"): "one class here",
        ("sample", "--network", attributes, "--y", "Hat,Wig"): "--y Wig: the attributes here are Hat, Bow_Tie, Tie",
        (*sample, "--tile", 2000): "--tile",
        (*sample, "--truncation", "nan"): "--truncation",
        (*sample, "--seeds", "0-999", "--tile", 1024): "pixels: ask for fewer",
        (*sample, "--vary", "x"): "eps,z",
        (*strips, "--dims", "4"): "--dims 4: this network has layers 1 to 3, each with dimensions 1 to 6",
        (*strips, "--dims", "3.7"): "--dims 3.7",
        (*strips, "--dims", ""): "--dims",
        (*strips, "--frames", 9): "--frames goes with --interpolate",
        (*strips, "--interpolate", "--dims", "1"): "leave --dims and --steps away",
        (*strips, "--interpolate", "--steps", 5): "leave --dims and --steps away",
        (*strips, "--y", "cat", "--y", "dog"): "strips are of one image",
        (*strips, "--seeds", "1,2", "--out", tmp_path / "x.png"): "--out takes one picture",
        ("sample",): "--network",
        ("dance",): "dance",
        ("serve", "--port", 0): "--port",
        ("serve", "--network", lively, "--host", "::1"): "--host ::1",
        (*sample, "--seeds", ""): "--seeds",
        (*sample, "--seeds", "3-"): "--seeds 3-",
        (*sample, "--out", tmp_path / "x"): "name a file that ends in .png or .gif",
        (*sample, "--out", tmp_path / "x.xyz"): "x.xyz: name a file that ends in",
        ("dimensions", "--network", lively, "--out", tmp_path / "x.mp4"): "x.mp4: name a file that ends in .png",
        ("dimensions", "--network", lively, "--json", tmp_path / "x.pt"): "name a file that ends in .json",
        ("export", "--network", lively, "--out", tmp_path): "is a folder: name a file",
    }
    for arguments, why in lines.items():
        line = command("explore", *arguments, code=2).output
        assert why in line and line.count("\n") == 1, line
    (tmp_path / "gan.txt").write_text("no checkpoint")
    (tmp_path / "empty").mkdir()
    for arguments, why in {
        (*sample, "--device", "tpu"): "--device tpu",
        (*sample, "--out", tmp_path / "none" / "x.png"): "No such file or directory",
        (*sample, "--separate", "--out", tmp_path / "gan.txt"): "gan.txt",
        ("sample", "--network", "nothing.pt"): "nothing.pt does not exist",
        ("sample", "--network", tmp_path / "empty"): "gan.pt does not exist",
        ("sample", "--network", tmp_path / "gan.txt"): "gan.txt is not a checkpoint",
        ("sample", "--network", class_run / "encoder.pt"): "written by encoder.py",
    }.items():
        line = command("explore", *arguments, code=1).output
        assert why in line and line.count("\n") == 1, line
    monkeypatch.setattr(explore, "PRETRAINED", tmp_path / "critters.pt")
    assert "there is no" in command("explore", "serve", code=2).output


def test_what_is_no_dimension_and_no_exploration(lively):
    network = gan.load(lively / "gan.pt")
    codes = network.latents([0, 1])
    for wrong in (
        lambda: latents.move(codes, 1, 0, 3.0),
        lambda: latents.move(codes, 0, 1, 3.0),
        lambda: latents.move(codes, 1, gan.BASIS + 1, 3.0),
        lambda: latents.exploration(network, None, [0], "noise"),
    ):
        with pytest.raises(ValueError, match=r"no (dimension|exploration)"):
            wrong()


def test_factors_that_nobody_can_read_are_left_out():
    assert explore.factor_table([], ["cat", "dog"]) == []
    name = next(iter(next(iter(latents.FACTORS.values()))))
    head, *lines = explore.factor_table([], ["cat", name])
    assert "drawn with" in head and len(lines) == 1 and f"{name}: none" in lines[0]


def test_unconditional(command, class_folder, tmp_path):
    network = save_network(tmp_path / "gan.pt", lively_decoder(32, 0), [], "none")
    command("explore", "sample", "--network", network, "--seeds", "0,1", "--tile", 32)
    tiles = pixels(tmp_path / "sample.png")[-32:].reshape(32, 2, 32, 3)
    assert not np.array_equal(tiles[:, 0], tiles[:, 1])
    command("explore", "traverse", "--network", network, "--dims", "1.1", "--steps", 2)
    for wrong in (["--y", "cat"], ["--vary", "y"]):
        assert "unconditional" in command("explore", "sample", "--network", network, *wrong, code=2).output
    target = io.BytesIO()
    Image.fromarray(pixels(tmp_path / "sample.png")[-32:, :32].astype(np.uint8)).save(target, "PNG")
    (tmp_path / "t.png").write_bytes(target.getvalue())
    command("explore", "project", tmp_path / "t.png", "--network", network, "--steps", 2)
    assert json.loads((tmp_path / "project.json").read_text())["y"] == {}
    state = torch.load(network, weights_only=True)
    state["data"]["data"], state["options"]["protocol"] = str(class_folder), "ours"
    open_images = dataset.open_dataset(str(class_folder), 32)
    state["data"] |= {key: open_images.info()[key] for key in ("fingerprint", "splits", "preset")}
    checkpoints.save(network, state)
    line = command("explore", "embedding", "--network", network, code=1).output
    assert "holds no encoder: run encoder.py with the same --outdir first" in line
    run = SimpleNamespace(
        images={"val": SimpleNamespace(data="x", hidden={})}, names=[], labels=None, all_labels=(["one"], [])
    )
    with pytest.raises(click.ClickException, match="no labels to name dimensions by"):
        latents.known_labels(run, "val")


def test_the_pretrained_network(command, tmp_path):
    """It is small, draws every class, and its numbers lie beside it."""
    path = explore.PRETRAINED
    assert path.stat().st_size <= 8e6
    command("explore", "sample", "--network", path, "--out", tmp_path / "sample.png")
    assert pixels(tmp_path / "sample.png").std() > 20
    network = gan.load(path)
    assert network.label_names == ["cat", "dog", "wild"] and network.dimensions
    results = json.loads((path.parent / "metrics.json").read_text())
    assert results["seed"] == 0 and results["features"] == "judge" and results["accuracy_judge"] > 0.9
