"""Times of the fused ops against eager PyTorch and torch.compile, at the shapes of the networks at 64 px, batch 32.

Eager PyTorch is each op's own reference (impl='ref'), which already knows channels_last; torch.compile compiles it.
"""

import statistics

import torch
import torchvision
from torch import nn

import training
from ops import bias_lrelu, conv2d, conv_transpose2d, freeze, subspace_lrelu, tsne_forces, use_conv2d

from .timing import row, take_turns

BASIS = 7  # k + 1 convolved maps
SUBSPACE_SHAPES = [(32, 256, 4, 4), (32, 128, 8, 8), (32, 64, 16, 16), (32, 32, 32, 32), (32, 16, 64, 64)]  # generator
BIAS_SHAPES = [*SUBSPACE_SHAPES, (32, 256)]  # global discriminator
# Input, output channels, kernel, stride, transposed: a generator's convolutions, and those of both discriminators.
CONVOLUTIONS = [(shape, shape[1], 3, 1, False) for shape in SUBSPACE_SHAPES]
CONVOLUTIONS += [((B, C, H, H), C // 2, 3, 2, True) for B, C, H, _ in SUBSPACE_SHAPES[:-1]]
CONVOLUTIONS += [((32, 64, 16, 16), 128, 3, 2, False), ((32, 128, 16, 16), 256, 4, 2, False)]
CONVOLUTIONS += [((32, 256, 8, 8), 512, 4, 1, False), ((32, 16, 64, 64), 3, 7, 1, False)]
SECONDS = 1.0  # measured per shape and pass, all sides together


def op_rows(quick: bool) -> list[dict]:
    """A row for each op, shape, dtype, pass and implementation; ratio: to eager, `vs_compile`: to torch.compile.

    On the GPU where there is one. fp32, and bf16 for the passes that run in it.
    """
    # As in training: else page faults of the allocator would be timed too.
    training.keep_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # 10 turns at least, for quartiles.
    turns = dict(seconds=SECONDS / 4 if quick else SECONDS, turns=10, calls=4)
    turns["synchronize"] = torch.cuda.synchronize if device == "cuda" else lambda: None
    rows = elementwise_rows(quick, device, turns) + convolution_rows(quick, device, turns)
    rows += frozen_rows(quick, device, turns) + tsne_rows(quick, device, turns)
    return rows + trained_rows(quick, turns) if device == "cpu" else rows


def rows_of(times: dict[str, list[float]], what: str, **more) -> list[dict]:
    """A row for each side but eager, compared with it, and with torch.compile where that ran."""
    rows = []
    for name in [name for name in times if name != "eager"]:
        result = row(f"{what}: {name}", times[name], times["eager"], "eager", impl=name, **more)
        if "compile" in times:
            result["vs_compile"] = statistics.median(times["compile"]) / result["ours"]
            result["note"] = f"{result['vs_compile']:.2f} of compiled" if name != "compile" else ""
        rows.append(result)
    return rows


def random(seed: int, device: str, dtype: torch.dtype = torch.float32):
    """A function that makes normal tensors that want gradients, channels_last where they are 4-D."""
    make = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers for every device

    def randn(*size, grad: bool = True, dtype: torch.dtype = dtype) -> torch.Tensor:
        t = torch.randn(*size, generator=make).to(device, dtype)
        return (t.to(memory_format=torch.channels_last) if t.ndim == 4 else t).requires_grad_(grad)

    return randn


def elementwise_rows(quick: bool, device: str, turns: dict) -> list[dict]:
    """bias_lrelu and subspace_lrelu.

    Passes: 'forward' without gradient; 'forward+backward' to all that training differentiates (coef is noise); 'double
    backward' is forward, backward with create_graph and backward through that, as R1 does.
    """
    fused, rows = "triton" if device == "cuda" else "cpp", []
    for op, shapes in ((bias_lrelu, BIAS_SHAPES), (subspace_lrelu, SUBSPACE_SHAPES)):
        chosen = shapes[1:-1:2] if quick else shapes
        for shape, dtype in [(s, torch.float32) for s in chosen] + [(s, torch.bfloat16) for s in chosen]:
            randn = random(0, device, dtype)
            x, bias, g, gx = randn(*shape), randn(shape[1], dtype=torch.float32), randn(*shape), randn(*shape)
            inputs = (x, bias)
            if op is subspace_lrelu:
                coef = randn(shape[0], BASIS, grad=False, dtype=torch.float32)
                inputs = (x, coef, randn(BASIS, *shape[1:]), bias)
            # Else torch.compile would give up: it compiles one function eight times at most.
            torch._dynamo.reset()
            functions = {name: lambda *a, name=name, op=op: op(*a, impl=name) for name in ("ref", fused)}
            functions["eager"] = functions.pop("ref")
            # At its best: for this shape alone, and with an error where it would fall back to eager.
            functions["compile"] = torch.compile(functions["eager"], dynamic=False, fullgraph=True)
            for kind in ("forward", "forward+backward", "double backward"):
                # subspace_lrelu's is composed of PyTorch ops, no loss needs it; R1, which needs bias_lrelu's, is fp32.
                if kind == "double backward" and (op is subspace_lrelu or dtype != torch.float32):
                    continue
                sides = {
                    name: one_pass(kind, function, inputs, g, gx)
                    for name, function in functions.items()
                    if name != "compile" or kind != "double backward"  # torch.compile refuses it
                }
                what = f"{op.__name__} {'x'.join(map(str, shape))} {str(dtype)[6:]}, {kind}"
                more = dict(op=op.__name__, shape=list(shape), dtype=str(dtype)[6:], kind=kind)
                rows += rows_of(take_turns(sides, **turns), what, **more)
    return rows


def one_pass(kind: str, function, inputs: tuple, g: torch.Tensor, gx: torch.Tensor):
    """A call without arguments that runs one pass of the op."""
    wanted = [t for t in inputs if t.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    def backward() -> None:
        torch.autograd.grad(function(*inputs), wanted, g)

    def double_backward() -> None:
        first = torch.autograd.grad(function(*inputs), inputs[:1], g, create_graph=True)
        # By g: with the slope constant, dx depends on nothing else.
        torch.autograd.grad(first, g, gx)

    return {"forward": forward, "forward+backward": backward, "double backward": double_backward}[kind]


def convolution_rows(quick: bool, device: str, turns: dict) -> list[dict]:
    """Forward + backward of the convolutions in fp32, channels_last, with bias, against PyTorch's own."""
    rows = []
    for shape, outputs, k, stride, transposed in CONVOLUTIONS[1::5] if quick else CONVOLUTIONS:
        op, padding = conv_transpose2d if transposed else conv2d, 3 if k == 7 else 1
        options = dict(stride=stride, padding=padding) | (dict(output_padding=1) if transposed else {})
        randn = random(0, device)
        inputs = (randn(*shape), randn(*((shape[1], outputs) if transposed else (outputs, shape[1])), k, k))
        inputs += (randn(outputs),)
        # Made beforehand: a loss such as sum() would add passes of its own.
        g = randn(*op(*inputs, **options).shape)
        sides = {
            name: lambda op=op, impl=impl, inputs=inputs, options=options, g=g: torch.autograd.grad(
                op(*inputs, **options, impl=impl), inputs, g
            )
            for name, impl in (("eager", "ref"), ("auto", "auto"))
        }
        name, kind = f"{op.__name__} {k}x{k}/{stride}", "forward+backward"
        what = f"{name} {'x'.join(map(str, shape))} to {outputs} channels, {kind}"
        rows += rows_of(take_turns(sides, **turns), what, op=name, shape=list(shape), dtype="float32", kind=kind)
    return rows


def frozen_rows(quick: bool, device: str, turns: dict) -> list[dict]:
    """A frozen encoder, forward and gradient with respect to images at 64 px, against the network in eval mode."""
    rows = []
    for name in ("resnet18",) if quick else ("resnet18", "resnet50"):
        network = getattr(torchvision.models, name)().to(device, memory_format=torch.channels_last)
        # Features are what stages 2 and 3 take: no last layer.
        network.fc = nn.Identity()
        frozen = freeze(network.eval().requires_grad_(False), (3, 64, 64))
        x = random(0, device)(32, 3, 64, 64)
        sides = {
            side: lambda f=f, x=x: torch.autograd.grad(f(x).sum(), x)
            for side, f in (("eager", network), ("freeze", frozen))
        }
        what = f"{name} 32x3x64x64 float32, forward+backward"
        times = take_turns(sides, **turns | {"calls": 1})
        rows += rows_of(times, what, op="freeze", shape=[32, 3, 64, 64], dtype="float32", kind="forward+backward")
    return rows


def trained_rows(quick: bool, turns: dict) -> list[dict]:
    """An encoder in training, forward and backward of 128 views in fp32, as stage 1 runs it, against PyTorch's own."""
    rows = []
    for size in (32,) if quick else (32, 64):
        sides = {}
        x, g = random(0, "cpu")(128, 3, size, size, grad=False), torch.ones(128, 512)
        for side in ("eager", "use_conv2d"):
            network = torchvision.models.resnet18().to(memory_format=torch.channels_last)
            network.fc = nn.Identity()
            if side == "use_conv2d":
                use_conv2d(network)
            # Not the images' gradient, which training does without.
            weights = list(network.parameters())
            sides[side] = lambda f=network, weights=weights, x=x, g=g: torch.autograd.grad(f(x), weights, g)
        times = take_turns(sides, **turns | {"calls": 1})
        what = f"resnet18 128x3x{size}x{size} float32, training"
        rows += rows_of(times, what, op="use_conv2d", shape=[128, 3, size, size], dtype="float32", kind="training")
    return rows


def tsne_rows(quick: bool, device: str, turns: dict) -> list[dict]:
    """The forces of one iteration of t-SNE."""
    n, fused = 2000 if quick else 6000, "triton" if device == "cuda" else "cpp"
    randn = random(0, device)
    # Any numbers will do: the work depends on n alone.
    p, y = randn(n, n, grad=False).abs(), 3 * randn(3, n, grad=False)
    p += p.T.clone()  # affinities are symmetric
    sides = {name: lambda impl=impl: tsne_forces(p, y, impl=impl) for name, impl in (("eager", "ref"), (fused, fused))}
    times = take_turns(sides, **turns | {"turns": 3, "calls": 1})
    return rows_of(times, f"tsne_forces of {n} points", op="tsne_forces", shape=[n], dtype="float32", kind="forward")
