"""experiments/imagenet.py, with a small network in place of the one that users install."""

import re
import sys

import click
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import trained
from experiments import imagenet


class StandIn(nn.Module):
    """Some colours of an image, in place of EfficientNet's 1,280 features."""

    def extract_features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, x * x, (x[:, :1] * x[:, 1:2]).sin()), dim=1)


class Same(nn.Module):
    def extract_features(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_images_are_scaled_as_the_network_was_trained():
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).expand(2, 5, 5, 3)
    expected = (torch.tensor([0, 128 / 255, 1]) - torch.tensor(imagenet.MEAN)) / torch.tensor(imagenet.STD)
    torch.testing.assert_close(imagenet.features(Same(), images), expected.expand(2, 3), atol=1e-5, rtol=0)


def test_without_its_packages_it_names_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(click.ClickException, match="pip install efficientnet_lite_pytorch"):
        imagenet.load_network()


def test_a_perfect_run_is_as_near_as_the_real_images(gan_run, monkeypatch):
    monkeypatch.setattr(imagenet, "load_network", StandIn)

    def distances() -> list[float]:
        result = CliRunner().invoke(imagenet.main, [str(gan_run), "--num", "60"], catch_exceptions=False)
        assert result.exit_code == 0 and "n 60 and 60" in result.output
        return [float(x) for x in re.findall(r"(?:generated|against real) (-?[\d.]+) \+-", result.output)]

    far, floor = distances()

    def perfect(run, n: int, seed: int):
        return run.real_images("train", torch.arange(n).numpy())

    monkeypatch.setattr(trained.TrainedRun, "generated", perfect)
    near, same = distances()
    assert same == floor and abs(near) < 20 and far > 100 * max(abs(near), abs(floor))
