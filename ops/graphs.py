"""Updates as CUDA graphs, for networks whose kernels take less time than their launches."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class CaptureError(RuntimeError):
    """An update does what no CUDA graph can, such as waiting for the device."""


class Graphs:
    """Calls updates; from its third call on, an update is replayed as one CUDA graph: one launch in place of hundreds.

    A graph repeats the same kernels on the same memory. So inputs are copied into fixed tensors. Weights, Adam's state
    and a learning rate that is a tensor may change; options and other values of Python stay as they were at the
    capture. Random numbers go on as without. Updates, flags and shapes of inputs that differ have graphs of their own.
    """

    EAGER = 2  # calls before: cuDNN chooses algorithms, Triton compiles, Adam makes its state

    def __init__(self, on: bool):
        self.on, self.calls, self.captured, self.pool = on, {}, {}, None

    def __call__(self, update: Callable[..., dict[str, Tensor]], *inputs: Tensor | None, **flags) -> dict[str, Tensor]:
        """update(*inputs, **flags), a dict of tensors, detached.

        Raises CaptureError if the update cannot be captured: torch's state is unusable then.
        """
        # A graph holds the branches that were taken at its capture, so each set of flags needs one of its own.
        key = update, *flags.items(), *(x if x is None else (x.shape, x.dtype) for x in inputs)
        self.calls[key] = self.calls.get(key, 0) + 1
        if not self.on or self.calls[key] <= self.EAGER:
            return {name: value.detach() for name, value in update(*inputs, **flags).items()}
        if key not in self.captured:
            self.captured[key] = self.capture(update, inputs, flags)
        graph, static, stats = self.captured[key]
        for own, x in zip(static, inputs, strict=True):
            if own is not None:
                own.copy_(x)
        graph.replay()
        return {name: value.clone() for name, value in stats.items()}  # the next graph may write over them

    def capture(self, update: Callable, inputs: Sequence[Tensor | None], flags: dict) -> tuple:
        """Record an update without running it: the graph, its input tensors and its results."""
        static, graph = [None if x is None else x.clone() for x in inputs], torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()  # one for all: results are read before the next replay
        try:
            # thread_local: the threads that prepare batches ask the device for pinned memory meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                stats = {name: value.detach() for name, value in update(*static, **flags).items()}
        except RuntimeError as error:
            # Leaving the capture raises an error over the first one, and it is the first that says why.
            why = str(error.__context__ or error).splitlines()[0]
            raise CaptureError(f"{update.__name__} cannot be a CUDA graph ({why})") from error
        return graph, static, stats

    def forget(self) -> None:
        """Capture anew: the tensors that graphs use have been replaced."""
        self.calls, self.captured = {}, {}
