"""What the updates of stage 3 would launch on a GPU, counted without one: a process of its own, which prints JSON.

    python tests/fake_device.py global

Tensors are fake: shapes and dtypes on a device named "gpu", without data. Autograd runs its backward passes for a
device that is not CUDA, so this one stands in for it: it takes the paths of the code that are not the CPU's, Triton's
kernels are counted in the place of being launched, and autocast casts what it casts on CUDA.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import training
from bench.gpu import Launches, count_updates, make_trainer

# The device, and its autocast: CUDA's list, as far as these networks go.
_setup_privateuseone_for_python_backend("gpu")
torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
usual = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
usual.fallback(torch.library.fallthrough_kernel)
own = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")


def in_16_bits(op):
    def call(*args, **kwargs):
        low = torch.get_autocast_dtype("gpu")
        args = [a.to(low) if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a for a in args]
        with torch.autocast("gpu", enabled=False):
            return op(*args, **kwargs)

    return call


for name in ("conv2d", "conv_transpose2d.input", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm"):
    packet, _, overload = name.partition(".")
    own.impl(name, in_16_bits(getattr(getattr(torch.ops.aten, packet), overload or "default")))


# What fake tensors do otherwise than real ones.


def convert(module, function, recurse=True):
    """nn.Module._apply without swapping tensors, which fake ones refuse."""
    for child in module.children():
        convert(child, function)
    for name, p in module._parameters.items():
        if p is not None:
            module._parameters[name] = torch.nn.Parameter(function(p.detach()), p.requires_grad)
    for name, b in module._buffers.items():
        if b is not None:
            module._buffers[name] = function(b)
    return module


torch.nn.Module._apply = convert
FakeTensorMode.__deepcopy__ = lambda self, memo: self  # copies of networks live in the same mode
torch.nn.utils.clip_grad._has_foreach_support = lambda *_: True  # it goes by the type of a tensor
training.entropy_bits = lambda labels: 1.0  # counts rows, at the start of a run
ops = [sys.modules[f"ops.{name}"] for name in ("bias_lrelu", "subspace_lrelu")]
for op in ops:
    op.choose = lambda impl, device: "triton"


class FakeLaunches(Launches):
    """All coins of the augmentation, which are the host's, fall on the side that costs more."""

    def call(self, function, args, kwargs):
        for t in args:
            if isinstance(t, FakeTensor):
                t.constant = None  # or moving a constant would need real memory on the device
        if function is torch.ops.aten._local_scalar_dense.default:
            return True
        return function(*args, **kwargs)


disc, dtype = sys.argv[1], getattr(torch, sys.argv[2])
with FakeTensorMode():
    run = training.Run(torch.device("gpu", 0), None if dtype is torch.float32 else dtype, 0)
    with FakeLaunches(run.device):
        trainer, real, y = make_trainer(run, 256, 8, disc, "resnet50")
    counted = count_updates(trainer, real, y, FakeLaunches, runs=False)
print(json.dumps({name: vars(c) | {"device": None, "total": c.total} for name, c in counted.items()}, default=str))
