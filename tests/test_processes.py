"""Several processes compute what one computes on the whole batch: gradients, to the rounding of float64."""

import pytest
import torch
from conftest import ROOT, run_script

# Run plainly and under torchrun: does every update on its part of the same batch, and saves the gradients of rank 0.
GRADIENTS = """
import os, sys, torch
root, out, *cases = sys.argv[1:]
sys.path.insert(0, root)
import encoder, gan, training

run = training.start(os.environ.get("INFOSCC_TEST_DEVICE", "cpu"), "fp32")  # bench/gpu.py asks for cuda
torch.set_default_dtype(torch.float64)
single = torch.Tensor.float
torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else single(x)  # stage 1 computes its losses in single
B = 8
mine = slice(run.rank * B // run.world, (run.rank + 1) * B // run.world)
torch.manual_seed(0)
images, latents = torch.rand(B, 3, 32, 32) * 2 - 1, torch.randn(B, 1000)
# Each class is in both halves, in one of them, or (the last) nowhere.
y_real, y_fake = torch.eye(4)[[0, 1, 0, 1, 0, 2, 0, 0]], torch.eye(4)[[2, 2, 0, 1, 0, 0, 0, 1]]
images, latents, y_real, y_fake = (t.to(run.device) for t in (images, latents, y_real, y_fake))
found = {}

def note(case, network, *scalars):
    found[case] = {n: None if p.grad is None else p.grad.to("cpu", copy=True) for n, p in network.named_parameters()}
    found[case] |= {n: b.to("cpu", torch.float64, copy=True) for n, b in network.named_buffers()}

def train_gan(case, disc, per_class):
    few = {"disc_layers": 2} if disc == "patch" else {}
    options = gan.default_options(32, batch=B, disc=disc, per_class=per_class, lr=1e-30, augment="none", r1=1.0,
                                  width=8, **few)
    trainer = gan.Trainer(options, run, torch.eye(4), "one-hot")
    for network in (trainer.decoder, trainer.D):
        network.double()
    width = trainer.decoder.latent_width
    trainer.fake = lambda how=None: (trainer.decoder(y_fake[mine], latents[mine, :width]), y_fake[mine])
    for update in ("discriminate", "penalise", "generate"):
        getattr(trainer, update)(*([] if update == "generate" else [images[mine], y_real[mine]]))
        note(f"{case} {update}", trainer.decoder if update == "generate" else trainer.D)

def train_encoder(case, method):
    network = encoder.Encoder("resnet18", "imagenet", norm_layer=training.BatchNorm).to(run.device).double()
    class Data(list):
        def batches(self, *_):
            yield images[mine], None
    class Log:
        add = step = write = lambda *_, **__: {}
    training.to_float, encoder.augment = (lambda x: x), (lambda x, *_: x + 0.1 * views.pop()[mine])
    views = [torch.randn(B, 3, 32, 32).to(run.device) for _ in range(2)]
    options = encoder.PRESETS[""] | dict(method=method, batch=B, lr=1e-30, workers=0, smoke=False)
    encoder.train(network, Data(range(B)), run, options, {}, B, Log(), lambda *_: None)
    note(case, network)

for case in cases:
    torch.manual_seed(1)
    kind, *rest = case.split("-")
    train_encoder(case, *rest) if kind == "encoder" else train_gan(case, rest[0], "class" in rest)
if run.rank == 0:
    torch.save(found, out)
"""
CASES = ["encoder-simclr", "encoder-byol", "gan-global", "gan-patch", "gan-global-class", "gan-patch-class"]


@pytest.fixture(scope="module")
def gradients(shared) -> tuple[dict, dict]:
    """Gradients and buffers of every case, by one process and by two."""

    def compute(folder) -> None:
        folder.mkdir()
        (folder / "work.py").write_text(GRADIENTS)
        for name, processes in (("one", 1), ("two", 2)):
            done = run_script(folder / "work.py", ROOT, folder / name, *CASES, processes=processes)
            assert done.returncode == 0, done.stderr[-3000:]

    folder = shared("gradients", compute)
    return tuple(torch.load(folder / name, weights_only=True) for name in ("one", "two"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.long
def test_two_processes_equal_one_on_the_whole_batch(gradients, case):
    """Batch statistics, losses and R1's double backward are of the whole batch; so is who has a gradient at all."""
    one, two = gradients
    updates = [name for name in one if name.split()[0] == case]
    assert len(updates) == (1 if case.startswith("encoder") else 3)
    for update in updates:
        assert one[update].keys() == two[update].keys()
        scale = max(g.abs().max().item() for g in one[update].values() if g is not None)
        assert scale > 0
        for name, expected in one[update].items():
            found = two[update][name]
            assert (found is None) == (expected is None), (update, name)
            if found is not None:
                torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11 * scale, msg=f"{update} {name}")
