"""Batch norm over the images of all processes, on any device, with gradients of any order.

    norm = BatchNorm(64)            in the place of torch.nn.BatchNorm2d; the same weights and state
    torchvision.models.resnet18(norm_layer=BatchNorm)

Statistics of a process's own images would make the result depend on the number of processes, and SimCLR's encoder
could tell by them which views belong together. torch.nn.SyncBatchNorm needs GPUs, and R1 differentiates twice, which
it does not allow.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm1d and nn.BatchNorm2d (Ioffe & Szegedy 2015), but in training over the images of all processes.

    x: [B, C] or [B, C, H, W]; B may differ between processes and be 0 in some. Returns the shape, dtype and memory
    format of x. With one process, and in eval mode, it is torch's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        return batch_norm(x, self, self.bias)


def batch_norm(x: Tensor, norm: nn.Module, bias: Tensor | None) -> Tensor:
    """x [B, C] or [B, C, H, W] by the weights, the state and the mode of `norm`, as `BatchNorm` computes it.

    bias: [C] to add, or None where the caller adds it.
    """
    if not (norm.training and dist.is_initialized() and dist.get_world_size() > 1):
        mean, var = norm.running_mean, norm.running_var
        return F.batch_norm(x, mean, var, norm.weight, bias, norm.training, norm.momentum, norm.eps)
    y, mean, var, n = _BatchNorm.apply(x, norm.weight, bias, norm.eps)
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (n / (n - 1)), norm.momentum)  # the unbiased variance, as torch keeps it
    return y


class _SumOverProcesses(torch.autograd.Function):
    """The sum of x over all processes, the same in each. Its gradient is the same sum, so every order exists."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, g):
        return _SumOverProcesses.apply(g.contiguous())


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C] and variance [C] of x over the images of all processes, and the number of values of a channel, []."""
    C, dims = x.shape[1], [d for d in range(x.ndim) if d != 1]
    if len(x):
        var, mean = torch.var_mean(x, dims, correction=0)
    else:  # zeros, but functions of x: every process must join every sum, in the backward passes too
        var = mean = x.sum(dims)
    # All processes' own moments, one row each, in one message. Sums of squares would lose digits where means are large.
    own = torch.cat((mean, var, mean.new_full((1,), x.numel() // C)))
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = _SumOverProcesses.apply(F.pad(own[None], (0, 0, rank, world - 1 - rank)))
    means, variances, counts = rows.split((C, C, 1), dim=1)
    n = counts.sum()
    mean = (counts * means).sum(0) / n
    return mean, (counts * (variances + (means - mean).square())).sum(0) / n, n


class _BatchNorm(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias by the moments of all processes; also returns the moments."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean, var, n = _moments(_full(x))
        ctx.save_for_backward(x, weight, mean, var, n)
        ctx.mark_non_differentiable(mean, var, n)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var, n

    @staticmethod
    def backward(ctx, g, *_):
        """Equations of Ioffe & Szegedy, section 3, in operations that autograd can differentiate again."""
        x, weight, mean, var, n = ctx.saved_tensors
        dtype, dims, shape = x.dtype, [d for d in range(x.ndim) if d != 1], (-1,) + (1,) * (x.ndim - 2)
        x, g = _full(x), _full(g)
        if torch.is_grad_enabled():  # create_graph=True: the moments depend on x
            mean, var, n = _moments(x)
        scale = (var + ctx.eps).rsqrt()
        normed = (x - mean.view(shape)) * scale.view(shape)
        dbias, dweight = g.sum(dims), (g * normed).sum(dims)
        means = _SumOverProcesses.apply(torch.stack((dbias, dweight))) / n
        dx = (scale * weight).view(shape) * (g - means[0].view(shape) - normed * means[1].view(shape))
        return dx.to(dtype), dweight, dbias if ctx.needs_input_grad[2] else None, None


def _full(x: Tensor) -> Tensor:
    """x in at least single precision."""
    return x if x.dtype == torch.float64 else x.float()
