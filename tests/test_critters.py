"""The embedded data set: the same everywhere, balanced, independent, and every factor visible."""

import copy

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import critters
from critters import ATTRIBUTES, KINDS, OFFSETS, RATES, SPECIES, SPLITS, draw, factors, render


@pytest.fixture(scope="module")
def many() -> list:
    return [factors(0, i) for i in range(SPLITS["train"])]


def flat(f: dict) -> list:
    """All numbers of a factor dict, in its own order."""
    return [float(x) for value in f.values() for x in np.atleast_1d(value)]


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int)).max(2)


def test_known_factors() -> None:
    """The generator and the order of its draws are fixed: these values hold on any machine."""
    for (seed, index), (species, kind, attributes, yaw, scale, fur_lightness) in KNOWN.items():
        f = factors(seed, index)
        assert (f["species"], f["kind"], f["attributes"].tolist()) == (species, kind, attributes)
        assert np.allclose([f["yaw"], f["scale"], f["fur"][1]], [yaw, scale, fur_lightness], rtol=0, atol=1e-12)


def test_same_factors_same_pixels() -> None:
    for index in (0, 5, 1234):
        a, b = factors(3, index), factors(3, index)
        assert flat(a) == flat(b)
        before = copy.deepcopy(a)
        assert np.array_equal(draw(a, 32), draw(b, 32))
        assert flat(a) == flat(before)  # drawing leaves the factors alone
    assert flat(factors(0, 7)) != flat(factors(1, 7)) and flat(factors(0, 7)) != flat(factors(0, 43))


def test_known_pixels() -> None:
    """Mean colours of a few images, to a grey level."""
    for (index, size), mean in PIXELS.items():
        assert np.abs(draw(factors(0, index), size).mean((0, 1)) - mean).max() < 1.0, (index, size)


def test_species_and_kinds_are_balanced(many: list) -> None:
    kinds = np.array([f["kind"] for f in many])
    species = np.array([f["species"] for f in many])
    n = len(many)
    assert np.bincount(species).tolist() == [n // 3] * 3
    assert np.bincount(kinds).tolist() == [n // 3] * 2 + [n // 12] * 4
    assert len(set(kinds[species == SPECIES.index("wild")])) >= 4
    assert set(kinds[species == 0]) == {KINDS.index("cat")} and set(kinds[species == 1]) == {KINDS.index("dog")}
    val = [factors(0, OFFSETS["val"] + i)["species"] for i in range(SPLITS["val"])]
    assert np.bincount(val).tolist() == [500] * 3
    for stride in (2, 3, 4, 8):  # processes that take every n-th image see every species
        assert np.bincount(species[::stride]).min() > 0.3 * len(species[::stride])


def test_attributes_follow_their_rates_independently(many: list) -> None:
    a = np.array([f["attributes"] for f in many])
    assert a.dtype == np.uint8 and a.shape == (len(many), len(ATTRIBUTES)) and set(np.unique(a)) == {0, 1}
    n = len(many)
    assert np.abs(a.mean(0) - RATES).max() < 4.5 * 0.5 / n**0.5
    others = np.array([flat(f)[2 + len(ATTRIBUTES) :] for f in many])
    species = np.eye(3)[[f["species"] for f in many]]
    x = np.concatenate([a, others, species], 1)
    corr = np.corrcoef(x.T)[: len(ATTRIBUTES)]
    np.fill_diagonal(corr, 0)
    assert np.abs(corr).max() < 4.5 / n**0.5  # six times forty correlations of standard error 1 / sqrt(n)


def test_kind_is_independent_of_colour_and_pose(many: list) -> None:
    others = np.array([flat(f)[2 + len(ATTRIBUTES) :] for f in many])
    kinds = np.eye(len(KINDS))[[f["kind"] for f in many]]
    corr = np.corrcoef(np.concatenate([kinds, others], 1).T)[: len(KINDS), len(KINDS) :]
    assert np.abs(corr).max() < 4.5 / len(many) ** 0.5


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_each_attribute_shows_at_32_pixels(name: str) -> None:
    j = ATTRIBUTES.index(name)
    for index in range(36):  # every kind at least three times
        f = factors(1, index)
        images = []
        for value in (0, 1):
            f["attributes"][:] = 0
            f["attributes"][j] = value
            images.append(draw(f, 32))
        assert (difference(*images) > 12).sum() >= 6, (name, KINDS[f["kind"]], index)


def test_kinds_differ_with_all_else_equal() -> None:
    f = factors(0, 0)
    f["attributes"][:] = 0
    images = [draw({**f, "kind": k}, 32) for k in range(len(KINDS))]
    for i in range(len(KINDS)):
        for j in range(i):
            assert (difference(images[i], images[j]) > 30).mean() > 0.1, (KINDS[i], KINDS[j])


def test_every_continuous_factor_shows() -> None:
    f = factors(0, 0)
    f["attributes"][:] = 1
    names = [name for name in f if name not in ("species", "kind", "attributes")]
    reference = draw(f, 64)
    for name in names:
        for index in range(1, 6):  # the other side, or another cat, may be the same by chance
            if factors(0, index)[name] != f[name]:
                break
        assert (draw({**f, name: factors(0, index)[name]}, 64) != reference).any(), name


@pytest.mark.parametrize("size", [32, 64, 128])
def test_sizes_agree(size: int) -> None:
    """An image drawn at 256 px and averaged down is the image drawn at the size, to well under a pixel's shift."""
    for index in range(6):
        f = factors(2, index)
        zoom = 256 // size
        small = draw(f, size).astype(float)
        large = draw(f, 256).reshape(size, zoom, size, zoom, 3).mean((1, 3))
        pixel = np.abs(np.diff(small, axis=0)).mean()  # what a shift by one pixel would change
        assert np.abs(small - large).mean() < 0.35 * pixel


def test_edges_are_antialiased() -> None:
    """The line around a grey head on a flat white ground has greys between."""
    f = factors(0, 1)
    white = (0.0, 1.0, 0.0)
    f.update(background=white, background2=white, fur=(0.0, 0.5, 0.0), light=(0.0, 0.0, 0.0), haze=(0.0, 0.0))
    f["attributes"][:] = 0
    row = draw(f, 256)[20:200].mean(2)
    steps = np.abs(np.diff(row, axis=1))
    partial = (steps > 8).sum(1)
    assert partial.max() > 4 and len(np.unique(row)) > 64


@pytest.mark.parametrize("size", [16, 17, 31, 32, 64, 100, 256, 512])
def test_any_size(size: int) -> None:
    image = draw(factors(0, 2), size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    assert image.std() > 10 and image.flags.c_contiguous and image.flags.writeable


def test_validation_repeats_no_training_image() -> None:
    train = {tuple(flat(factors(0, OFFSETS["train"] + i))[8:16]) for i in range(3000)}
    val = {tuple(flat(factors(0, OFFSETS["val"] + i))[8:16]) for i in range(SPLITS["val"])}
    assert len(train) == 3000 and len(val) == SPLITS["val"] and not train & val
    assert OFFSETS["val"] >= OFFSETS["train"] + SPLITS["train"]


def test_render() -> None:
    image, species, attributes, kind = render(4, "val", 10, 32)
    f = factors(4, OFFSETS["val"] + 10)
    assert np.array_equal(image, draw(f, 32)) and np.array_equal(attributes, f["attributes"])
    assert (species, kind) == (f["species"], f["kind"])
    assert not np.array_equal(image, render(4, "train", 10, 32)[0])
    assert not np.array_equal(image, render(5, "val", 10, 32)[0])


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="split must be one of train, val"):
        render(0, "test", 0, 32)
    with pytest.raises(ValueError, match="val has images 0 to 1499"):
        render(0, "val", 1500, 32)
    with pytest.raises(ValueError, match="16 to 512"):
        draw(factors(0, 0), 8)
    with pytest.raises(ValueError, match="negative"):
        factors(-1, 0)


def test_sheet(tmp_path) -> None:
    out = tmp_path / "sheet.png"

    def sheet(*options: str) -> np.ndarray:
        result = CliRunner().invoke(critters.main, ["--out", str(out), *options])
        assert result.exit_code == 0, result.output
        return np.asarray(Image.open(out))

    base = sheet("--size", "16", "--num", "5")
    assert base.shape == (32, 48, 3) and (base[16:, 32:] == 255).all()  # five of six places taken
    assert sheet("--size", "20", "--num", "5").shape == (40, 60, 3)
    assert sheet("--size", "16", "--num", "4").shape == (32, 32, 3)
    assert not np.array_equal(base, sheet("--size", "16", "--num", "5", "--seed", "1"))
    first_cat = next(i for i in range(5) if factors(0, i)["kind"] == 0)
    assert np.array_equal(base[:16, :16], draw(factors(0, first_cat), 16))

    bad = CliRunner().invoke(critters.main, ["--out", str(tmp_path / "none" / "sheet.png"), "--num", "1"])
    assert bad.exit_code == 1 and "cannot write" in bad.output and "Traceback" not in bad.output


# (seed, index): species, kind, attributes, yaw, scale, fur lightness
# (seed, index): species, kind, attributes, yaw, scale, fur lightness
# (seed, index): species, kind, attributes, yaw, scale, fur lightness
# (seed, index): species, kind, attributes, yaw, scale, fur lightness
# (seed, index): species, kind, attributes, yaw, scale, fur lightness
# (seed, index): species, kind, attributes, yaw, scale, fur lightness
KNOWN = {
    (0, 0): (0, 0, [1, 1, 1, 0, 0, 0], 0.19647948882725416, 0.9323149931079182, 0.6009437558753143),
    (0, 7): (0, 0, [0, 0, 0, 0, 0, 0], 0.20118459581232198, 0.9457926189008009, 0.6531906257840726),
    (1, 11): (2, 5, [0, 0, 0, 0, 0, 0], 0.11409471946778751, 1.0186187335929635, 0.8272067714684271),
    (123, 154618822660): (2, 3, [0, 1, 0, 1, 0, 0], 0.014249257266068904, 0.9472816502423733, 0.49586858590251703),
}
# (index, size): mean red, green, blue at seed 0
PIXELS = {
    (0, 32): (147.66, 122.58, 107.10),
    (1, 64): (135.64, 122.39, 64.50),
    (5, 128): (151.65, 126.52, 87.47),
}
