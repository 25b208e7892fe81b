"""control.py: attribute control accuracy, questions, judge and diversity on cases with known answers."""

import math

import numpy as np
import pytest
import torch

import control

CPU = torch.device("cpu")


def test_control_accuracy():
    y = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    asked = y.argmax(1)
    found = control.control_accuracy(torch.tensor([[2.0, 1], [1, 2], [0, 1], [0, 1]]), y, asked, "one-hot", ["a", "b"])
    assert found["accuracy"] == 0.75 and found["labels"] == {"a": {"accuracy": 0.5}, "b": {"accuracy": 1.0}}

    y = torch.tensor([[1.0, 0], [0, 0], [0, 1], [1, 0]])  # asked: a on, a off, b on, b off
    low = math.log(0.3 / 0.7)  # sigmoid 0.3: off at 0.5, on at 0.2
    logits = torch.tensor([[low, -9], [-9.0, 9], [9, 9], [9, 9]])
    found = control.control_accuracy(logits, y, torch.tensor([0, 0, 1, 1]), "multi-label", ["a", "b"])
    assert found["labels"]["a"] == {"accuracy": 0.5, "on": 0.0, "off": 1.0, "published": 1.0}
    assert found["labels"]["b"] == {"accuracy": 0.5, "on": 1.0, "off": 0.0, "published": 1.0}
    assert (found["accuracy"], found["published"], found["exact"]) == (0.5, 1.0, 0.0)


def test_the_published_rule_takes_probabilities_at_the_real_rates():
    """A balanced classifier that knows nothing says 0.5 for an attribute that 1 % of images have: not above 0.2."""
    y, asked = control.questions("multi-label", torch.eye(2), 100, seed=0, published=True)
    assert (y[torch.arange(200), asked] == 1).all() and abs(y[:100, 1].mean() - 0.5) < 0.2
    nothing, balance = torch.zeros(200, 2), torch.tensor([99.0, 1.0]).log()
    found = control.control_accuracy(nothing, y, asked, "multi-label", ["rare", "even"], balance, published=True)
    assert found["labels"]["rare"]["accuracy"] == 0 and found["labels"]["even"]["accuracy"] == 1
    assert found["accuracy"] == found["published"] == 0.5
    assert control.control_accuracy(nothing + 3, y, asked, "multi-label", ["rare", "even"], balance)["published"] == 0.5


def test_questions_ask_on_and_off_equally():
    real = torch.tensor([[1.0, 1, 0], [0, 0, 1]])
    y, asked = control.questions("multi-label", real, 40, seed=0)
    for i in range(3):
        own = y[asked == i]
        assert len(own) == 40 and own[:, i].mean() == 0.5
        others = [j for j in range(3) if j != i]
        assert {tuple(r) for r in own[:, others].tolist()} == {tuple(r) for r in real[:, others].tolist()}
    y, asked = control.questions("one-hot", torch.eye(3), 5, seed=0)
    assert (y.argmax(1) == asked).all() and (torch.bincount(asked) == 5).all()


def test_spread_is_the_mean_distance_of_pairs():
    assert control.spread(torch.tensor([[0.0, 0], [3, 4], [0, 0]])) == pytest.approx(10 / 3)


def test_balanced_accuracy_weighs_as_control_accuracy_asks():
    y = (torch.arange(100) < 5).float()[:, None]
    assert control.balanced_accuracy(torch.full((100, 1), -1.0), y, "multi-label") == 0.5  # plainly right on 95 %
    y, logits = torch.eye(3)[[0] * 8 + [1] * 2], torch.eye(3)[[0] * 10]
    assert control.balanced_accuracy(logits, y, "one-hot") == 0.5  # the third class does not occur


def test_judge_learns_what_is_there_and_only_that():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 100, (400, 16, 16, 3)).astype(np.uint8)
    labels = torch.from_numpy(draw.integers(0, 2, (400, 2))).float()
    images[..., 0] += (labels[:, 0].numpy() * 80).astype(np.uint8)[:, None, None]  # the second label is not to be seen
    groups = [("multi-label", ["red"], labels[:, :1]), ("one-hot", ["dark", "red"], torch.eye(2)[labels[:, 0].long()])]
    judge, right = control.train_judge(images, [*groups, ("multi-label", ["unseen"], labels[:, 1:])], 0, CPU, 60)
    assert right[0] > 0.95 and right[1] > 0.95 and right[2] < 0.8 and not judge.training
    features, logits = control.judged(judge, images, np.arange(400))
    assert logits.shape == (400, 4) and ((logits[:, 0] > 0) == (labels[:, 0] > 0.5)).float().mean() > 0.95
    assert abs(features.mean()) < 0.01 and features.std(0).median() == pytest.approx(1, abs=0.01)  # standardised


def test_groups_of_one_y():
    labels = torch.eye(3)[[0, 1, 1, 2, 2, 2, 2]]
    groups = control.groups_of_one_y(labels, each=3)
    assert [g.tolist() for g in groups] == [[3, 4, 5], [1, 2]]  # the most frequent first; a single image has no pair
