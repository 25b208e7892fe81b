"""Stage 3: networks, losses, updates, and the command on small real folders."""

import copy
import json
import math
import os
import shutil
from pathlib import Path

import click
import pytest
import torch
import torch.nn.functional as F
from conftest import OTHER_PRECISION, ROOT, copy_run, run_script
from PIL import Image

import checkpoints
import classifier as stage2
import gan
import training

OPTIONS = gan.default_options(32, batch=8, loss="ns", lr=1e-3, penalty="r1", reg_clip=False, width=16)
CPU = training.Run(torch.device("cpu"), None, 0)


def trainer(labels=3, encoder=None, classifier=None, kind="one-hot", **options):
    options = OPTIONS | {"disc_layers": 3 if options.get("disc") == "patch" else None} | options
    return gan.Trainer(options, CPU, torch.eye(labels) if labels else None, kind, encoder, classifier)


def frozen_stages():
    """Stand-ins for stages 1 and 2: the mean colour, of which the class is the strongest channel."""
    encoder = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten())
    classifier = torch.nn.Linear(3, 3)
    classifier.weight.data = 20 * torch.eye(3)
    return encoder, classifier.requires_grad_(False)


# Networks.


def test_sizes_of_the_published_networks():
    assert [gan.channels_at(256, r) for r in (4, 8, 16, 32, 64, 128, 256)] == [512, 512, 256, 128, 64, 32, 16]
    G = gan.Generator(256)
    assert len(G.blocks) == 6
    assert [tuple(b.subspace.U.shape) for b in G.blocks[:2]] == [(6, 16, 512), (6, 64, 512)]
    assert G.blocks[0].subspace.L.tolist() == [18, 15, 12, 9, 6, 3]
    D = gan.GlobalDiscriminator(256)
    assert [c.out_channels for c in D.features] == [16, 16, 32, 32, 64, 64, 128, 128, 256, 256, 512, 512, 512, 512]
    assert D(torch.zeros(2, 3, 256, 256)).shape == (2, 1)


def parameters(network) -> int:
    return sum(p.numel() for p in network.parameters())


def test_patch_discriminator_by_depth():
    """pix2pix's, of 3 layers, and the published one, of 6."""
    assert parameters(gan.PatchDiscriminator(3)) == 2_765_633 and parameters(gan.PatchDiscriminator(6)) == 15_351_617
    for size, layers, scores in ((256, 3, 30), (256, 6, 2), (128, 5, 2), (64, 4, 2), (32, 3, 2)):
        D = gan.build_discriminator("patch", size, layers)
        assert D(torch.zeros(2, 3, size, size)).shape == (2, 1, scores, scores)
        assert layers == 3 or gan.patch_layers(size) == layers
        assert [c.conv.out_channels for c in D.layers[1:]] == [min(64 * 2**i, 512) for i in range(1, layers + 1)]


def double(layer, x):
    """Twice the resolution, by PyTorch alone."""
    x = F.conv_transpose2d(x, layer.weight, None, stride=2, padding=1, output_padding=1)
    if layer.blur is not None:
        row = F.pad(x, (1, 1, 1, 1))
        row = (row[..., :-2] + 2 * row[..., 1:-1] + row[..., 2:]) / 4
        x = (row[:, :, :-2] + 2 * row[:, :, 1:-1] + row[:, :, 2:]) / 4
    return x + layer.bias.view(-1, 1, 1)


@pytest.mark.parametrize("blurred", [True, False])
@pytest.mark.parametrize("batch", [3, 9])
def test_generator_equals_the_plain_one(batch, blurred):
    """phi convolved for every image, as published, on both sides of the batch at which the basis is cheaper."""
    decoder = gan.Decoder(32, 3, blurred=blurred).double()
    for p in decoder.parameters():
        p.data += 0.01 * torch.randn_like(p)
    y, latents = torch.eye(3).double()[torch.arange(batch) % 3], torch.randn(batch, decoder.latent_width).double()
    noise, z = latents[:, : gan.NOISE], latents[:, gan.NOISE :].view(batch, 3, 6)
    eps = decoder.mapper(torch.cat((decoder.embed(y), noise), 1))
    G = decoder.generator
    h = G.first(eps).view(batch, 4, 4, -1).permute(0, 3, 1, 2)
    for i, block in enumerate(G.blocks):
        s = block.subspace
        phi = ((s.L * z[:, i]) @ s.U.flatten(1) + s.mu.flatten()).view(batch, *s.mu.shape).permute(0, 3, 1, 2)
        h = double(block.feature_conv1, F.leaky_relu(h + block.subspace_conv1(phi), 0.2))
        h = block.feature_conv2(F.leaky_relu(h + double(block.subspace_conv2, phi), 0.2))
    plain = torch.tanh(G.last(F.leaky_relu(h, 0.2)))
    torch.testing.assert_close(decoder(y, latents).double(), plain, rtol=0, atol=1e-6)  # images are float32
    torch.testing.assert_close(decoder(y, latents, G.convolved()).double(), plain, rtol=0, atol=1e-6)


def test_the_blur_leaves_no_dots():
    """Even maps stay even, whatever the weights; those of a transposed convolution do not."""
    x, dots = torch.randn(1, 6, 1, 1).expand(1, 6, 8, 8), []
    for blurred in (True, False):
        y = gan.Upsample(6, 4, blurred)(x.contiguous()).detach()
        assert y.shape == (1, 4, 16, 16)
        dots.append(y[:, :, 2:-2, 2:-2].std((2, 3)).max())
    assert dots[0] < 1e-6 < 0.01 < dots[1]


def test_the_way_out_of_saturation():
    """The values are tanh's; so is the gradient, but that it does not vanish where descent leads back."""
    a = torch.tensor([-9.0, -9.0, -0.5, -0.5, 0.5, 9.0, 9.0], dtype=torch.float64, requires_grad=True)
    grad = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0, 1.0, -1.0], dtype=torch.float64)  # descent goes the other way
    for slope in (0.0, 0.125):
        x = gan.TanhWithFloor.apply(a, slope)
        assert torch.equal(x, a.tanh())
        (found,) = torch.autograd.grad(x, a, grad)
        expected = grad * (1 - a.tanh() ** 2)
        expected[[0, 5]] = torch.where(expected[[0, 5]].abs() < slope, slope * grad[[0, 5]], expected[[0, 5]])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    inside = torch.linspace(-1, 1, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: gan.TanhWithFloor.apply(a, 0.125), inside)
    assert torch.autograd.gradgradcheck(lambda a: gan.TanhWithFloor.apply(a, 0.125), inside)


def test_the_log_has_the_information_without_the_balance():
    """Noise says nothing about a rare label: logits that only balance it must not count against it."""
    y = (torch.arange(200) % 20 == 0).float()[:, None]
    balanced = stage2.Classifier(3, 1)
    balanced.balance = stage2.weights_of(y, False).log()
    with torch.no_grad():
        balanced.weight.zero_()
        balanced.bias.copy_(y.mean().logit() + balanced.balance)
    t = trainer(1, kind="multi-label", reg_augment="none", encoder=lambda x: x[:, :, 0, 0], classifier=balanced)
    t.entropy = training.entropy_bits(y)
    loss, stats = t.classification(torch.randn(200, 3, 32, 32), y)
    assert stats["mi_bits"].item() == pytest.approx(0, abs=1e-3) and loss > stats["H_y_given_e"] + 0.1


def test_every_z_and_the_label_change_the_image():
    decoder = gan.Decoder(32, 3)
    latents = torch.randn(1, decoder.latent_width)
    y = torch.eye(3)
    assert (decoder(y[:1], latents) - decoder(y[1:2], latents)).abs().max() > 1e-6
    for k in range(gan.NOISE, decoder.latent_width):
        moved = latents.clone()
        moved[0, k] += 3
        assert (decoder(y[:1], latents) - decoder(y[:1], moved)).abs().max() > 1e-7, k


def test_bases_start_smooth_or_as_published():
    def roughness(**options):
        U = trainer(0, kind="none", size=64, **options).decoder.generator.blocks[-1].subspace.U.detach()
        torch.testing.assert_close(U.flatten(1) @ U.flatten(1).T, torch.eye(len(U)), atol=1e-4, rtol=0)
        return (U.unflatten(1, (32, 32)).diff(dim=1).std() / U.std()).item()

    assert roughness() < 0.3 and roughness(start="torch") == pytest.approx(2**0.5, rel=0.05)


def test_orthogonality():
    decoder = gan.Decoder(32, 0)
    assert decoder.orthogonality() < 1e-10
    for block in decoder.generator.blocks:
        block.subspace.U.data *= 2**0.5  # U U^T = 2 I: mean((2 I - I)^2) = 1 / 6
    assert decoder.orthogonality().item() == pytest.approx(1 / 6, rel=1e-5)


def test_exact_orthonormal_basis():
    s = gan.Subspace(16, 8, orthonormal=True).double()
    s.U.data = torch.randn_like(s.U)
    s.L.data.fill_(1)
    U = s.maps()[:-1].flatten(1)
    torch.testing.assert_close(U @ U.T, torch.eye(6).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(s.gram(), torch.eye(6).double(), rtol=0, atol=1e-12)  # what the log calls orthogonality


def test_width_is_the_channels_at_full_size():
    decoder, D = gan.Decoder(32, 0, width=24), gan.GlobalDiscriminator(32, width=24)
    assert decoder.generator.last.in_channels == 24 and decoder.generator.blocks[0].feature_conv1.in_channels == 192
    assert [layer.out_channels for layer in D.features] == [24, 24, 48, 48, 96, 96, 192, 192]
    assert decoder(None, torch.randn(2, decoder.latent_width)).shape == (2, 3, 32, 32)


def test_projection_discriminator():
    """The score is that without labels plus <V y, h> / sqrt(C): linear in y, and another for each label."""
    D = gan.GlobalDiscriminator(32, labels=3).double()
    assert D.projection.abs().sum() == 0  # at the start, labels say nothing
    torch.nn.init.normal_(D.projection)
    x, y = torch.randn(4, 3, 32, 32).double(), torch.eye(3)[[0, 2, 1, 0]].double()
    seen = []
    D.score.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    by_label = D(x, y) - D(x, torch.zeros(4, 3).double())
    torch.testing.assert_close(by_label, ((y @ D.projection) * seen[0]).sum(1, keepdim=True) / 128**0.5)
    both = D(x, torch.tensor([[1.0, 1, 0]] * 4).double()) - D(x, torch.tensor([[0.0, 1, 0]] * 4).double())
    torch.testing.assert_close(both, D(x, torch.eye(3).double()[[0] * 4]) - D(x, torch.zeros(4, 3).double()))

    # The gradient penalty sees the labels too, and reaches the projection.
    x.requires_grad_()
    penalty = [gan.gradient_penalty(D(x, torch.eye(3).double()[[c] * 4]), x)[0] for c in (0, 1)]
    assert penalty[0] != penalty[1]
    penalty[0].backward(inputs=[D.projection])
    assert D.projection.grad[0].abs().sum() > 0 and D.projection.grad[1:].abs().sum() == 0


def test_learning_rate_falls_to_zero():
    t = trainer(labels=0, kind="none", reg_every=0, lr=1e-3, lr_decay=0.5, kimg=0.08)  # ten iterations of 8 images
    assert [t.decay(i) for i in (0, 5, 6, 9, 10, 99)] == pytest.approx([1, 1, 0.8, 0.2, 0, 0])
    t.iteration(6, torch.zeros(8, 3, 32, 32), None)
    assert [g["lr"] for step in (t.step_g, t.step_d) for g in step.optimizer.param_groups] == pytest.approx([8e-4] * 2)
    constant = trainer(labels=0, kind="none", lr_decay=0.0, kimg=0.08)
    assert constant.decay(9) == 1


def test_per_class_discriminator_scores_by_its_class():
    D = gan.build_discriminator("global", 32, classes=3)
    x, y = torch.randn(7, 3, 32, 32), torch.eye(3)[[2, 0, 1, 0, 2, 2, 0]]
    each = torch.cat([D.members[c](x[i : i + 1]) for i, c in enumerate(y.argmax(1).tolist())])
    torch.testing.assert_close(D(x, y), each)
    only = D(x[:2], torch.eye(3)[[2, 2]])  # classes without an image are left out
    torch.testing.assert_close(only, D.members[2](x[:2]))


# Augmentation.


def test_augmentations():
    x = torch.rand(16, 3, 32, 32) * 2 - 1
    assert gan.augment(x, "none") is x
    assert gan.augment(x, "color", p=0.0) is x
    coloured = gan.augment(x, "color", p=1.0)
    assert coloured.shape == x.shape and not torch.equal(coloured, x)
    cut = gan.augment(x, "cutout", p=1.0)
    lost = (cut == 0).all(1)
    assert lost.flatten(1).sum(1).max() <= 256 and lost.flatten(1).sum(1).min() >= 64  # a quarter of it at a corner
    assert torch.equal(cut[~lost[:, None].expand_as(cut)], x[~lost[:, None].expand_as(x)])
    torch.manual_seed(1)
    views = gan.augment(x, "crop", p=0.0)  # always
    torch.manual_seed(1)
    assert torch.equal(views, training.random_crop(x, 0.6)) and not torch.equal(views, x)


def test_translation_shifts_by_up_to_an_eighth():
    x = torch.rand(64, 3, 32, 32) + 1
    moved = gan.augment(x, "translation", p=1.0)
    seen = set()
    for before, after in zip(x, moved, strict=True):
        rows, columns = after[0].any(1).nonzero(), after[0].any(0).nonzero()
        dy = int(rows[0]) or int(rows[-1]) - 31
        dx = int(columns[0]) or int(columns[-1]) - 31
        seen |= {dy, dx}
        whole = F.pad(before, (4, 4, 4, 4))[:, 4 - dy : 36 - dy, 4 - dx : 36 - dx]
        assert torch.equal(after, whole)
    assert seen == set(range(-4, 5))


@pytest.mark.parametrize("policy", ["color,translation,cutout", "crop"])
def test_augmentation_is_differentiable_twice(policy):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)

    def f(x):
        torch.manual_seed(1)
        return gan.augment(x, policy, p=1.0)[:, :, ::3, ::3]

    assert torch.autograd.gradcheck(f, x, fast_mode=True) and torch.autograd.gradgradcheck(f, x, fast_mode=True)


def test_augmentation_coins():
    x = torch.rand(2, 3, 16, 16)
    kept = sum(torch.equal(gan.augment(x, "cutout"), x) for _ in range(400))
    assert abs(kept / 400 - 0.4) < 0.08  # applied with probability 0.6: three standard errors


# Losses.


def test_losses_by_their_formulas():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    assert gan.loss_d("hinge", real, fake).item() == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1 + 4) / 3)
    assert gan.loss_g("hinge", fake).item() == pytest.approx(-1 / 3)
    assert gan.loss_d("lsgan", real, fake).item() == pytest.approx((1 + 0.25 + 4) / 6 + (4 + 0 + 9) / 6)
    assert gan.loss_g("lsgan", fake).item() == pytest.approx((9 + 1 + 4) / 6)
    log_d = [math.log1p(math.exp(-v)) for v in real.tolist()]
    log_1_d = [math.log1p(math.exp(v)) for v in fake.tolist()]
    assert gan.loss_d("ns", real, fake).item() == pytest.approx(sum(log_d) / 3 + sum(log_1_d) / 3, rel=1e-6)
    assert gan.loss_g("ns", fake).item() == pytest.approx(sum(math.log1p(math.exp(-v)) for v in fake.tolist()) / 3)
    # The published code's: a generator loss that stops at 0, and squares of squares.
    assert gan.loss_d("hinge-v1", real, fake) == gan.loss_d("hinge", real, fake)
    assert gan.loss_g("hinge-v1", fake).item() == pytest.approx((3 + 1 + 0) / 3)
    assert gan.loss_d("lsgan-published", real, fake).item() == pytest.approx((1 + 1 / 16 + 16) / 3 + (16 + 0 + 81) / 3)
    assert gan.loss_g("lsgan-published", fake).item() == pytest.approx((81 + 1 + 16) / 3)


def test_conditional_entropy():
    even = torch.zeros(4, 2)
    assert gan.loss_y("one-hot", even, torch.eye(2)[[0, 1, 0, 1]]).item() == pytest.approx(math.log(2))
    assert gan.loss_y("multi-label", even, torch.ones(4, 2)).item() == pytest.approx(2 * math.log(2))


def test_penalty_of_a_linear_discriminator_and_its_gradient():
    """D(x) = w . x: the penalty is ||w||^2 at any images, its gradient 2 w; seen through a halving of x, w / 2."""
    w = torch.nn.Parameter(torch.randn(3 * 16))
    real, fake = torch.randn(5, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4, requires_grad=True)
    r1, r2 = gan.gradient_penalty(torch.cat((real, fake / 2)).flatten(1) @ w, real, fake)
    assert r1.item() == pytest.approx(w.square().sum().item(), rel=1e-5)
    assert r2.item() == pytest.approx(w.square().sum().item() / 4, rel=1e-5)
    r1.backward(inputs=[w])
    torch.testing.assert_close(w.grad, 2 * w.detach())


@pytest.mark.parametrize("disc", ["global", "patch"])
def test_r1_gradient_of_the_real_discriminators(disc):
    """Against finite differences, in float64, through the fused ops' double backward."""
    D = gan.build_discriminator(disc, 32).double()
    layers = D.layers if disc == "patch" else torch.nn.Sequential(D.features, torch.nn.Flatten(), D.hidden)
    D.forward = lambda x, y=None: layers(x)  # without the cast to float32 at the end
    x, p = torch.randn(4, 3, 32, 32).double(), next(layers.parameters())
    x.requires_grad_()
    gan.gradient_penalty(D(x), x)[0].backward()
    direction, step = torch.randn_like(p), 1e-8  # so small that no leaky ReLU changes its side
    values = []
    for sign in (1, -1):
        p.data += sign * step * direction
        values.append(gan.gradient_penalty(D(x), x)[0].item())
        p.data -= sign * step * direction
    assert (p.grad * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


# Updates.


def test_every_parameter_is_in_exactly_one_optimiser():
    t = trainer()
    held = [*t.step_g.parameters, *t.step_d.parameters]
    assert len({id(p) for p in held}) == len(held)
    assert {id(p) for p in held} == {id(p) for n in (t.decoder, t.D) for p in n.parameters()}


def test_updates_touch_their_network_only():
    encoder, classifier = frozen_stages()
    t = trainer(encoder=encoder, classifier=classifier)
    real, y = torch.rand(8, 3, 32, 32) * 2 - 1, torch.eye(3)[torch.arange(8) % 3]

    def changed(update):
        before = {n: checkpoints.fingerprint(getattr(t, n).state_dict()) for n in ("decoder", "D", "ema")}
        update()
        return {n for n, h in before.items() if checkpoints.fingerprint(getattr(t, n).state_dict()) != h}

    assert changed(t.regularise) == {"decoder"}
    assert changed(lambda: t.discriminate(real, y)) == {"D"}
    assert changed(lambda: t.penalise(real, y)) == {"D"}
    assert changed(t.generate) == {"decoder"}
    assert changed(lambda: t.average(1000)) == {"ema"}
    assert all(p.grad is None for p in classifier.parameters())
    assert all(p.requires_grad for p in t.D.parameters())


def test_generator_step_costs_the_discriminator_no_weight_gradients():
    t = trainer(0, kind="none")
    t.generate()
    assert all(p.grad is None for p in t.D.parameters())


def test_ema_half_life_counts_images():
    t = trainer(0, kind="none", batch=2000)
    for images, half_life in ((40 * gan.EMA_HALF_LIFE, gan.EMA_HALF_LIFE), (80_000, 2000)):
        for p, q in zip(t.decoder.parameters(), t.ema.parameters(), strict=True):
            p.data.fill_(1.0)
            q.data.fill_(0.0)
        for _ in range(half_life // 2000):
            t.average(images)
        for q in t.ema.parameters():
            torch.testing.assert_close(q, torch.full_like(q, 0.5))


def test_penalties_in_the_step_of_the_discriminator():
    """--penalty r1r2: the step's gradient is the loss's plus theirs times the weight and the steps between them."""
    real, y = torch.rand(8, 3, 32, 32) * 2 - 1, torch.eye(3)[torch.arange(8) % 3]
    gradients = []
    for weight, every in ((0.0, 1), (1.0, 1), (2.0, 1), (1.0, 2)):
        t = trainer(penalty="r1r2", r1=weight, penalty_every=every, augment="none", reg_every=0)
        CPU.reseed(1)
        assert ("r2" in t.discriminate(real, y, penalised=weight > 0)) == (weight > 0)
        gradients.append(torch.cat([p.grad.flatten() for p in t.D.parameters()]))
        expected = [weight > 0 and i % every == 0 for i in range(1, 5)]
        assert ["r1" in t.iteration(i, real, y) for i in range(1, 5)] == expected
    once, *twice = (g - gradients[0] for g in gradients[1:])
    assert once.norm() > 0
    for g in twice:
        torch.testing.assert_close(g, 2 * once, rtol=1e-3, atol=1e-3 * once.abs().max().item())


def test_regularisation_counts_iterations(monkeypatch):
    encoder, classifier = frozen_stages()
    real, y = torch.rand(8, 3, 32, 32) * 2 - 1, torch.eye(3)[torch.arange(8) % 3]
    for every, expected in ((0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4])):
        t = trainer(encoder=encoder, classifier=classifier, reg_every=every)
        stats = [t.iteration(i, real, y) for i in range(5)]
        assert [i for i, s in enumerate(stats) if "H_y_given_e" in s] == expected
        assert [i for i, s in enumerate(stats) if "r1" in s] == [0]
    t = trainer(reg_every=0, penalty_every=2)
    assert ["r1" in t.iteration(i, real, y) for i in range(3)] == [True, False, True]


def test_regularisation_lowers_the_classification_loss():
    encoder, classifier = frozen_stages()
    t = trainer(encoder=encoder, classifier=classifier, lr=1e-4)
    losses = []
    for _ in range(4):  # the same latents and labels each time
        CPU.reseed(1)
        losses.append(t.regularise()["H_y_given_e"].item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.99 * losses[0]


@pytest.mark.parametrize(("every", "clip"), [(2, False), (2, True), (4, True)])
def test_reg_clip_limits_the_regularisations_gradient(monkeypatch, every, clip):
    """To N times the adversarial norm; without the option it stays as it is."""
    encoder, classifier = frozen_stages()
    classifier.weight.data *= 1000
    real, y = torch.rand(8, 3, 32, 32) * 2 - 1, torch.eye(3)[torch.arange(8) % 3]
    t = trainer(encoder=encoder, classifier=classifier, reg_every=every, reg_clip=clip)
    norms, step = [], training.Stepper.step
    monkeypatch.setattr(training.Stepper, "step", lambda *a: norms.append(step(*a)) or norms[-1])
    t.iteration(0, real, y)
    *_, adversarial, classification = norms
    assert classification > 4 * adversarial
    used = measure_gradient(t.decoder)
    torch.testing.assert_close(used, every * adversarial if clip else classification, rtol=1e-4, atol=0)


@pytest.mark.parametrize("stretch", [1.0, 10.0])
def test_reg_stretch_scales_a_small_gradient_up_to_the_limit(stretch):
    """By no more than X times; 1 leaves it as it is."""
    encoder, classifier = frozen_stages()
    t = trainer(encoder=encoder, classifier=classifier, lr=1e-30, reg_clip=True, reg_stretch=stretch)
    used = []
    for norm in (None, 0.5, 4.0, 100.0):  # times its own
        CPU.reseed(1)
        t.regularise(None if norm is None else norm * used[0])
        used.append(measure_gradient(t.decoder))
    expected = [1, 0.5, min(4, stretch), stretch]
    torch.testing.assert_close(torch.stack(used) / used[0], torch.tensor(expected), rtol=1e-4, atol=0)


def measure_gradient(network):
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm()


def test_first_images_are_smooth_and_bases_orthonormal():
    decoder = trainer(0, kind="none", size=64).decoder
    x = decoder(None, torch.randn(16, decoder.latent_width))
    neighbours = (x[..., 1:] - x[..., :-1]).square().mean() / (2 * x.var())
    assert neighbours < 0.25  # white noise: 1
    assert decoder.orthogonality() < 1e-10


@pytest.mark.parametrize("labels", [3, 15])
def test_code_starts_to_follow_the_labels_as_much_as_the_noise(labels):
    for disc in ("global", "patch"):
        decoder = trainer(labels, disc=disc).decoder
        by_y = decoder.mapper.weight[:, :labels] @ (decoder.embed.weight @ torch.eye(labels))
        by_noise = decoder.mapper.weight[:, labels:] @ torch.randn(gan.NOISE, 100)
        ratio = by_y.std(dim=1).mean() / by_noise.std(dim=1).mean()
        assert 0.3 < ratio < 3 if disc == "global" else ratio < 0.2  # patches leave it at the common scale


def test_joint_regularisation_adds_to_the_adversarial_step():
    encoder, classifier = frozen_stages()
    moved = {}
    for joint in (False, True):
        t = trainer(encoder=encoder, classifier=classifier)
        CPU.reseed(1)
        losses = t.generate(joint)
        moved[joint] = checkpoints.fingerprint(t.decoder.state_dict()), losses["loss_g"].item()
        assert ("mi_bits" in losses) == joint
    assert moved[False][0] != moved[True][0] and moved[False][1] == moved[True][1]


def test_labels_are_drawn_as_they_occur_together():
    labels = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(50, 1)  # two attributes that always agree
    t = gan.Trainer(OPTIONS | {"batch": 2000}, CPU, labels, "multi-label")
    y = t.fake()[1]
    assert torch.equal(y[:, 0], y[:, 1]) and abs(y.mean().item() - 0.5) < 0.05
    assert t.entropy == pytest.approx(1)  # one bit, not two


@pytest.mark.parametrize("kind", ["one-hot", "multi-label"])
def test_labels_are_drawn_uniformly(kind):
    """As the published code draws them: classes alike, attributes as fair coins, whatever the data has."""
    rare = torch.eye(3)[[0] * 97 + [1, 2]]
    t = gan.Trainer(OPTIONS | {"batch": 3000, "draw_y": "uniform"}, CPU, rare, kind)
    y = t.draw_y("uniform")
    assert torch.allclose(y.mean(0), torch.full((3,), 1 / 3 if kind == "one-hot" else 1 / 2), atol=0.05)
    assert (y.sum(1) == 1).all() == (kind == "one-hot")
    assert torch.allclose(t.fake()[1].mean(0), y.mean(0), atol=0.05)
    assert t.draw_y("data")[:, 0].mean() > 0.9


@pytest.mark.parametrize("mode", ["separate", "joint"])
def test_regularisation_has_the_labels_of_the_data(mode, monkeypatch):
    """Whatever --draw-y says: eq. 4 has the real distribution of y, whose H(Y) the log compares with."""
    encoder, classifier = frozen_stages()
    t = trainer(encoder=encoder, classifier=classifier, draw_y="uniform", reg_mode=mode, reg_every=1)
    t.labels[:] = torch.eye(3)[0]  # no image has another class
    asked, classification = [], t.classification
    monkeypatch.setattr(t, "classification", lambda x, y: asked.append(y) or classification(x, y))
    t.iteration(0, torch.rand(8, 3, 32, 32) * 2 - 1, torch.eye(3)[[0] * 8])
    assert len(asked) == 1 and (asked[0].argmax(1) == 0).all()


def test_regularisation_over_attributes():
    """--reg-over mean: the step takes the loss divided by the number of attributes; the log shows the sum."""
    encoder, classifier = frozen_stages()
    found = []
    for over in ("sum", "mean"):
        t = trainer(kind="multi-label", encoder=encoder, classifier=classifier, reg_over=over)
        CPU.reseed(1)
        stats = t.regularise()
        found.append((stats["H_y_given_e"].item(), measure_gradient(t.decoder).item()))
    assert found[0][0] == found[1][0] and found[0][1] == pytest.approx(3 * found[1][1], rel=1e-4)


OTHERS = [
    dict(disc="patch"), dict(per_class=True), dict(loss="hinge"), dict(loss="lsgan"), dict(reg_every=0),
    dict(reg_mode="joint"), dict(orth="exact"), dict(orth="none"), dict(r1=0.0), dict(r1=1.0), dict(augment="none"),
    dict(augment="cutout"), dict(reg_clip=True), dict(lr=0.01), dict(beta1=0.5), dict(batch=6), dict(penalty="r1r2"),
    dict(start="torch"), dict(reg_augment="none"), dict(loss="lsgan-published"), dict(loss="hinge-v1"),
    dict(blur=False), dict(tanh_slope=1.0),
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_each_option_changes_the_weights(other):
    encoder, classifier = frozen_stages()
    states = []
    for options in ({}, other):
        t = trainer(encoder=encoder, classifier=classifier, **options)
        # Bases that are not orthonormal, so that the penalty on them does something.
        t.decoder.generator.blocks[0].subspace.U.data.mul_(1.1)
        real, y = torch.rand(8, 3, 32, 32) * 2 - 1, torch.eye(3)[torch.arange(8) % 3]
        CPU.reseed(1)
        t.iteration(0, real[: t.batch], y[: t.batch])
        states.append([checkpoints.fingerprint(n.state_dict()) for n in (t.decoder, t.D)])
    assert states[0] != states[1]


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), 0.0])
def test_a_limit_from_an_overflowed_update_stops_the_regularisation(norm):
    """In fp16 the adversarial update is skipped where it overflows, and leaves a gradient without a norm."""
    encoder, classifier = frozen_stages()
    t = trainer(encoder=encoder, classifier=classifier)
    t.regularise(torch.tensor(norm))
    assert measure_gradient(t.decoder) < 1e-6 and all(p.isfinite().all() for p in t.decoder.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_stays_near_fp32(dtype):
    """Same weights, same numbers: losses of one iteration agree to the precision of the dtype."""
    encoder, classifier = frozen_stages()
    real, y = torch.rand(8, 3, 32, 32) * 2 - 1, torch.eye(3)[torch.arange(8) % 3]
    stats = []
    for run in (CPU, training.Run(torch.device("cpu"), dtype, 0)):
        # Cutout and translation leave exact zeros, where the leaky ReLU's slope, and R1, hang on a bias of 1e-6.
        options = OPTIONS | {"lr": 1e-6, "augment": "color"}
        t = gan.Trainer(options, run, torch.eye(3), "one-hot", encoder, classifier)
        run.reseed(1)
        stats.append(t.iteration(0, real, y))
    for name, value in stats[0].items():
        assert stats[1][name].item() == pytest.approx(value.item(), rel=0.05, abs=0.02), name
    assert t.step_g.scaler.is_enabled() == (dtype is torch.float16)


@pytest.mark.parametrize("disc", ["global", "patch"])
def test_penalties_in_bf16_and_in_fp32_give_the_same_gradient(disc):
    """With fp16 they are in fp32, as the whole step of D then is."""
    real, y = torch.rand(8, 3, 32, 32) * 2 - 1, torch.eye(3)[torch.arange(8) % 3]
    found = {}
    for dtype in (None, torch.bfloat16, torch.float16):
        t = trainer(disc=disc, penalty="r1r2", r1=1.0, augment="color", projection=disc == "global")
        t.run = training.Run(torch.device("cpu"), dtype, 0)
        t.fake = lambda: (0.5 * real.flip(0), y.flip(0))  # else the decoder's own precision would count too
        t.step_d.step = lambda total: total.backward()
        torch.manual_seed(0)
        r1 = t.discriminate(real, y, penalised=True)["r1"].item()
        found[dtype] = torch.cat([p.grad.flatten() for p in t.D.parameters()]), r1
    (exact, r1), (bf16, r1_bf16), (fp16, _) = found.values()
    assert torch.cosine_similarity(exact, bf16, dim=0) > 0.99 and 0.95 < bf16.norm() / exact.norm() < 1.05
    assert r1_bf16 != r1 and r1_bf16 == pytest.approx(r1, rel=0.05)
    torch.testing.assert_close(fp16, exact)


def test_names_and_sizes_that_there_are_not():
    x = torch.zeros(2, 3, 32, 32)
    for wrong in (
        lambda: gan.loss_d("wgan", x, x),
        lambda: gan.loss_g("wgan", x),
        lambda: gan.build_discriminator("pach", 32),
        lambda: gan.augment(x, "colour"),
        lambda: gan.Generator(48),
        lambda: gan.Generator(4),
    ):
        with pytest.raises(ValueError, match=r"no |power of two"):
            wrong()


# The command.


@pytest.fixture
def run_folder(class_run, tmp_path):
    return copy_run(class_run, tmp_path / "run")


def digest(path):
    return checkpoints.fingerprint(checkpoints.load(path, "gan")["ema"])


def test_command_writes_what_it_says(command, class_folder, run_folder):
    command("gan", "--data", class_folder, "--outdir", run_folder, "--smoke")
    for name in ("gan.pt", "gan.json", "stats.jsonl", "samples/00000064.png"):
        assert (run_folder / name).exists(), name
    assert list((run_folder / "tensorboard" / "gan").iterdir()) and list((run_folder / "snapshots").iterdir())
    lines = [json.loads(line) for line in (run_folder / "stats.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["stage"] == "gan"][-1]
    assert last["images"] == 64 and all(math.isfinite(v) for v in last.values() if not isinstance(v, str))
    assert last["mi_bits"] <= math.log2(3) + 1e-6
    assert json.loads((run_folder / "gan.json").read_text())["size"] == 32
    assert Image.open(run_folder / "samples/00000064.png").size == (256, 96)

    network = gan.load(run_folder / "gan.pt")
    assert network.label_names == ["high", "low", "middle"] and network.labels == 3
    assert network.images_seen == 64 and network.real_labels.shape == (network.data["splits"]["train"], 3)
    assert network.classifier(network.encoder(torch.zeros(2, 3, 32, 32))).shape == (2, 3)
    y = torch.eye(3)
    together = network.generate(y, [5, 6, 7])
    alone = torch.cat([network.generate(y[i : i + 1], [5 + i]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)  # an image depends on its own seed alone
    assert (network.generate(y[:1], [5]) - network.generate(y[:1], [6])).abs().max() > 1e-3
    assert (network.generate(y[:1], [5], truncation=0.3) - together[:1]).abs().max() > 1e-3
    import trained

    one, other = (trained.features_of(str(run_folder / f), torch.device("cpu")) for f in ("encoder.pt", "gan.pt"))
    assert one.hash == other.hash  # statistics are of one encoder, whichever file it comes from


def test_resumed_run_equals_an_unbroken_one(command, class_folder, class_run, tmp_path):
    whole, broken = (copy_run(class_run, tmp_path / name) for name in ("whole", "broken"))
    common = ["--data", class_folder, "--smoke", "--snap", 0.032, "--kimg", 0.064]
    command("gan", *common, "--outdir", whole)
    state = checkpoints.load(whole / "snapshots" / "gan-00000064.pt", "gan")
    assert state["images_seen"] == 64
    with pytest.MonkeyPatch.context() as patch:  # the same run, ended after its first save
        save = checkpoints.save

        def save_once(path, state, **how):
            save(path, state)
            if path.name == "gan.pt":
                raise KeyboardInterrupt

        patch.setattr(checkpoints, "save", save_once)
        command("gan", *common, "--outdir", broken, code=130)
    assert checkpoints.load(broken / "gan.pt", "gan")["images_seen"] == 32
    command("gan", *common, "--outdir", broken)
    assert digest(broken / "gan.pt") == digest(whole / "gan.pt")
    assert "already" in command("gan", *common, "--outdir", broken).output
    assert digest(broken / "gan.pt") == digest(whole / "gan.pt")
    state = checkpoints.load(broken / "gan.pt", "gan", go_on=True)
    for name in (*gan.BEFORE, "penalty_every"):  # as a run saved it before there were these options
        del state["options"][name]
    checkpoints.save(broken / "gan.pt", state)
    longer = ["gan", *common[:-1], 0.072, "--outdir", broken, "--precision", "fp16"]  # which may change on the way
    assert "made with blur False, but here blur is True" in command(*longer, code=1).output
    older = ("--no-blur", "--reg-stretch", 1, "--tanh-slope", 0)
    assert "made with penalty_every 1, but here" in command(*longer, *older, code=1).output
    command(*longer, *older, "--penalty-every", 1)
    assert checkpoints.load(broken / "gan.pt", "gan")["images_seen"] == 72


@pytest.mark.long
def test_options_of_the_command_reach_the_run(command, class_folder, class_run, tmp_path):
    variants = [[], ["--unconditional"], ["--seed", "1"], ["--precision", OTHER_PRECISION], ["--no-projection"]]
    variants += [["--init", tmp_path / "0" / "gan.pt"], ["--width", 8]]
    seen = set()
    for i, variant in enumerate(variants):
        outdir = copy_run(class_run, tmp_path / str(i))
        said = command("gan", "--data", class_folder, "--outdir", outdir, "--smoke", "--kimg", 0.008, *variant).output
        assert "starts anew" not in said
        seen.add(digest(outdir / "gan.pt"))
        if i:
            shutil.rmtree(outdir)
    assert len(seen) == len(variants)
    for init, more, why in (
        (tmp_path / "0" / "snapshots" / "gan-00000008.pt", (), "holds none"),
        (tmp_path / "0" / "gan.pt", ("--no-projection",), "has another --projection"),
    ):
        outdir = copy_run(class_run, tmp_path / "init")
        options = ("--data", class_folder, "--outdir", outdir, "--smoke", "--kimg", 0.008, "--init", init)
        assert f"{why}: the discriminator starts anew" in command("gan", *options, *more).output
        assert "starts anew" not in command("gan", *options, *more).output  # that run is finished
        shutil.rmtree(outdir)
    for variant in (["--per-class"], ["--unconditional"]):  # whatever the size, which the data will tell
        row = json.loads(command("gan", "--data", class_folder, *variant, "--dry-run").output)
        assert row["projection"] is False and row["penalty"] == "r1r2" and row["width"] is None
    used, size = [], 32
    for variant in ([], ["--disc", "patch"], ["--unconditional"], ["--per-class"], ["--penalty", "r1"]):
        used.append(json.loads(command("gan", "--data", class_folder, "--size", size, *variant, "--dry-run").output))
    assert [o["projection"] for o in used] == [True, False, False, False, True]
    found = [[o[name] for name in ("penalty", "penalty_every", "beta1", "r1")] for o in (used[0], used[1], used[-1])]
    assert found == [["r1r2", 4, 0, 0.5], ["r1", 16, 0.5, 10 * (size / 256) ** 2], ["r1", 16, 0, 10]]
    outdir = copy_run(class_run, tmp_path / "snap")
    few = ("--kimg", 0.024, "--snap", 0.008, "--workers", 0)
    command("gan", "--data", class_folder, "--outdir", outdir, "--smoke", *few)
    assert len(list((outdir / "snapshots").iterdir())) == 3


def test_multi_label_run(command, attribute_folder, attribute_run, tmp_path):
    outdir = copy_run(attribute_run, tmp_path / "run")
    command("gan", "--data", attribute_folder, "--outdir", outdir, "--smoke", "--kimg", 0.032)
    network = gan.load(outdir / "gan.pt")
    assert network.label_kind == "multi-label" and network.label_names == ["Left", "Right", "Top"]
    assert set(network.real_labels.unique().tolist()) == {0.0, 1.0}
    result = command("gan", "--data", attribute_folder, "--outdir", outdir, "--per-class", "--no-resume", code=2)
    assert "--per-class" in result.output


def test_refusals(command, class_folder, attribute_folder, run_folder, tmp_path):
    def refused(*arguments, code=1):
        lines = command("gan", *arguments, code=code).output.strip().splitlines()
        return lines[-1]

    data = ["--data", class_folder]
    assert "run encoder.py" in refused(*data, "--outdir", tmp_path / "empty")
    assert "fingerprint" in refused("--data", attribute_folder, "--outdir", run_folder)
    assert "size" in refused(*data, "--outdir", run_folder, "--size", 64)
    assert "--augment" in refused(*data, "--outdir", run_folder, "--augment", "blur", code=2)
    assert "--device" in refused(*data, "--outdir", run_folder, "--device", "tpu9")
    assert "no/such" in refused("--data", "no/such", "--outdir", run_folder)
    command("gan", *data, "--outdir", run_folder, "--smoke")
    before = digest(run_folder / "gan.pt")
    assert "--no-resume" in refused(*data, "--outdir", run_folder, "--smoke", "--loss", "ns")
    (tmp_path / "junk.pt").write_bytes(b"not a checkpoint")
    assert "junk.pt" in refused(*data, "--outdir", run_folder, "--smoke", "--init", tmp_path / "junk.pt")
    assert digest(run_folder / "gan.pt") == before
    classifier = checkpoints.load(run_folder / "classifier.pt", "classifier")
    original = copy.deepcopy(classifier)
    classifier["model"]["weight"] += 1
    checkpoints.save(run_folder / "classifier.pt", classifier)
    assert "another classifier.pt" in refused(*data, "--outdir", run_folder, "--smoke", "--kimg", 1)
    checkpoints.save(run_folder / "classifier.pt", original)
    joint = ("--reg-mode", "joint", "--reg-clip")
    few = ("--disc", "patch", "--disc-layers", 4)
    assert "--disc-layers" in refused(*data, "--outdir", run_folder, *few, code=2)
    assert "--disc patch" in refused(*data, "--outdir", run_folder, "--disc-layers", 3, code=2)
    assert "--projection" in refused(*data, "--outdir", run_folder, "--disc", "patch", "--projection", code=2)
    assert "--reg-clip" in refused(*data, "--outdir", run_folder, "--smoke", *joint, code=2)
    alone = ("--unconditional", "--reg-mode", "joint")
    for without in (
        ("--reg-every", 0, "--reg-augment", "crop"),
        ("--reg-every", 0, "--reg-clip"),
        ("--unconditional", "--reg-stretch", 2),
        ("--unconditional", "--draw-y", "uniform"),
        ("--unconditional", "--reg-every", 1),
        ("--reg-over", "mean"),
        ("--reg-every", 0, "--reg-mode", "joint"),
        ("--r1", 0, "--penalty-every", 2),
        ("--augment", "color,none"),
    ):  # which would have no effect
        assert next(o for o in without[-2:] if "--" in str(o)) in refused(
            *data, "--outdir", run_folder, *without, code=2
        )
    assert "needs labels" in refused(*data, "--outdir", run_folder, "--smoke", *alone, code=2)
    encoder = checkpoints.load(run_folder / "encoder.pt", "encoder")
    next(iter(encoder["model"].values()))[0] += 1
    checkpoints.save(run_folder / "encoder.pt", encoder)
    assert "belongs to another encoder" in refused(*data, "--outdir", run_folder, "--smoke")
    with pytest.raises(click.ClickException, match=r"classifier\.py"):
        gan.load(run_folder / "classifier.pt")


def test_dry_run_touches_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = ("--data", "afhq", "--disc", "patch", "--loss", "lsgan-published", "--dry-run")
    options = json.loads(command("gan", *best).output)
    published = dict(
        size=256, batch=32, kimg=6400, lr=1e-4, beta1=0.5, beta2=0.99, reg_every=2, reg_mode="separate", r1=10
    )
    published |= dict(
        penalty_every=16, penalty="r1", orth="penalty", orth_weight=100, noise=512, basis=6, disc_layers=6
    )
    published |= dict(
        ema_half_life=10_000, augment="color,translation,cutout", reg_clip=False, draw_y="uniform", start="torch"
    )
    published |= dict(width=16, lr_decay=0, projection=False, reg_augment="none", reg_stretch=1, blur=False)
    published |= dict(tanh_slope=0)
    assert options["protocol"] == "paper" and {key: options[key] for key in published} == published
    celeba = json.loads(command("gan", "--data", "celeba", "--dry-run").output)
    published |= dict(size=128, batch=64, kimg=12_800, disc_layers=None, reg_over="mean")
    assert {key: celeba[key] for key in published} == published
    # Every setting can be overridden; the other protocol, and the paper's on other data, can be asked for.
    options = json.loads(command("gan", *best, "--penalty", "r1r2", "--disc-layers", 3, "--lr", 0.1).output)
    assert (options["penalty"], options["disc_layers"], options["lr"], options["r1"]) == ("r1r2", 3, 0.1, 0.25)
    for protocol, r1 in (("paper", 10), ("ours", 10 / 16)):  # the published weight at every size
        small = json.loads(command("gan", *best, "--size", 64, "--protocol", protocol).output)
        assert (small["penalty"], small["r1"]) == ("r1", r1)
    assert json.loads(command("gan", *best, "--protocol", "ours").output)["start"] == "he"
    assert json.loads(command("gan", "--protocol", "paper", "--dry-run").output)["start"] == "torch"
    assert json.loads(command("gan", "--dry-run").output)["start"] == "he"
    # On other data, length, rate and batch go by the size.
    names = ("width", "batch", "lr", "lr_decay", "kimg", "snap")
    for size, expected in ((32, (32, 16, 5e-4, 0.5, 80, 80 / 6)), (128, (16, 32, 1e-4, 0.5, 320, 320 / 6))):
        options = json.loads(command("gan", "--preset", "none", "--size", size, "--dry-run").output)
        assert tuple(options[name] for name in names) == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [[], ["--per-class"]])  # 4 images of 3 classes: some process has none of one
def test_two_processes_train_as_one_network(class_folder, run_folder, more):
    options = ("--data", class_folder, "--outdir", run_folder, "--smoke", "--kimg", 0.064, "--device", "cpu")
    done = run_script(ROOT / "gan.py", *options, *more, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    state = checkpoints.load(run_folder / "gan.pt", "gan")
    assert state["images_seen"] == 64 and state["iteration"] == 8


def test_metrics_of_clusters_made_again(command, class_folder, class_run, tmp_path):
    """Other clusters under the same name: not taken for the run's, and judged by another judge."""
    outdir, found = copy_run(class_run, tmp_path / "run"), []
    options = ["--data", class_folder, "--outdir", outdir, "--smoke", "--no-resume"]
    score = ["metrics", "--network", outdir / "gan.pt", "--metrics", "accuracy,information", "--smoke"]
    score += ["--features", "encoder", "--json", outdir / "m.json"]
    command("classifier", *options, "--attributes", "clusters:4")
    command("gan", *options, "--kimg", 0.016, "--loss", "ns")
    command(*score)
    found.append(json.loads((outdir / "m.json").read_text()))
    command("classifier", *options, "--attributes", "clusters:4", "--seed", 5)
    command(*score)
    found.append(json.loads((outdir / "m.json").read_text()))
    assert "mi_real_bits" in found[0] and "accuracy_judge" in found[0] and "jsd_bits" in found[0]
    assert "mi_real_bits" not in found[1] and "accuracy_judge" not in found[1]
    judges = {file.name for file in Path(os.environ["INFOSCC_CACHE"]).rglob("judge-*.pt")}
    command("gan", *options, "--kimg", 0.016, "--loss", "hinge")
    command(*score)
    found.append(json.loads((outdir / "m.json").read_text()))
    assert "mi_real_bits" in found[2]
    assert {file.name for file in Path(os.environ["INFOSCC_CACHE"]).rglob("judge-*.pt")} - judges
    assert "jsd_bits" not in found[2]  # that was the run before, started over


def test_a_run_whose_data_moved(command, class_folder, class_run, tmp_path):
    outdir = copy_run(class_run, tmp_path / "run")
    options = ["--outdir", outdir, "--smoke", "--kimg", 0.016]
    shutil.copytree(class_folder, tmp_path / "old" / "bars")
    command("gan", "--data", tmp_path / "old" / "bars", *options)
    (tmp_path / "old").rename(tmp_path / "new")
    score = ["metrics", "--network", outdir / "gan.pt", "--metrics", "fid", "--features", "encoder", "--smoke"]
    assert "--data" in command(*score, code=1).output
    assert " FD " in command(*score, "--data", tmp_path / "new" / "bars").output
    # The same images under another path: the run goes on.
    command("gan", "--data", f"{tmp_path}/new/../new/bars/", *options[:-1], 0.032)
    # Weights to start from are for a new run.
    line = command("gan", "--data", class_folder, *options, "--init", outdir / "gan.pt", code=1).output
    assert "made with init None" in line and "--no-resume" in line
