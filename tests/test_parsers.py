"""Parsers of options and of small files, given anything: a value that is right, or one line for the user."""

import json
from types import SimpleNamespace

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dataset
import gan
import latents

ANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NETWORK = SimpleNamespace(label_names=["Hat", "été"], generator=SimpleNamespace(blocks=[0, 1]))
LATENT = {"y": {"Hat": 1, "été": 0.5}, "noise": [0.5] * gan.NOISE, "z": [[0.25] * gan.BASIS] * 2}


@ANY
@given(st.text(alphabet="0123456789-, a\u0663") | st.text())
def test_any_text_as_seeds(text):
    try:
        seeds = latents.parse_seeds(text)
    except click.UsageError as error:
        assert "--seeds" in error.message
    else:
        assert seeds and all(0 <= seed < 2**32 for seed in seeds)


@ANY
@given(st.lists(st.tuples(st.integers(0, 2**32 - 10), st.integers(0, 9)), min_size=1, max_size=5))
def test_seeds_come_back(ranges):
    text = ",".join(f"{first}-{first + more}" if more else str(first) for first, more in ranges)
    assert latents.parse_seeds(text) == [s for first, more in ranges for s in range(first, first + more + 1)]


@ANY
@given(spec=st.none() | st.text() | st.lists(st.sampled_from(["Hat", "été", "e\u0301te\u0301", " Hat"])).map(",".join))
@pytest.mark.parametrize("classes", [[], ["a", "b"]])
@pytest.mark.parametrize("preset", ["", "celeba"])
def test_any_text_as_attributes(spec, classes, preset):
    known = ["Hat", "été"]
    try:
        resolved, names = dataset.select(spec, "data", preset, classes, known)
    except click.ClickException as error:
        assert "--attributes" in error.message and "\n" not in error.message
    else:
        assert len(set(names)) == len(names) and set(names) <= set(known)
        assert names or (classes and resolved == "class")
        assert dataset.select(resolved, "data", preset, classes, known) == (resolved, names)


def read(tmp_path, content: bytes):
    (tmp_path / "latent.json").write_bytes(content)
    return latents.read_json(NETWORK, tmp_path / "latent.json")


def test_a_latent_comes_back(tmp_path):
    y, latent = read(tmp_path, json.dumps(LATENT).encode())
    assert y.tolist() == [[1.0, 0.5]] and latent.tolist() == [[0.5] * gan.NOISE + [0.25] * 2 * gan.BASIS]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@ANY
@given(entry=st.sampled_from(["y", "noise", "z"]), value=VALUES, at=st.integers(0, 1))
def test_any_json_as_latent(tmp_path, entry, value, at):
    inside = {"y": {"y": {"Hat": value, "été": 0}}, "noise": {"noise": [value] * gan.NOISE}, "z": {"z": [value] * 2}}
    content = LATENT | ({entry: value} if at else inside[entry])
    try:
        y, latent = read(tmp_path, json.dumps(content).encode())
    except click.ClickException as error:
        assert "is not a latent of this network" in error.message and "\n" not in error.message
    else:
        assert y.shape == (1, 2) and latent.isfinite().all() and y.isfinite().all()


@ANY
@given(raw=st.binary())
def test_any_bytes_as_latent(tmp_path, raw):
    with pytest.raises(click.ClickException, match="is not a latent of this network"):
        read(tmp_path, raw)
