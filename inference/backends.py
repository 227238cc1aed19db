"""What runs a captured graph: Inductor's kernels, and on a GPU a CUDA graph around them."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from inference.capture import CannotCapture
from inference.fusions import fuse_bernoulli
from inference.products import use_faster_products

Function = Callable[..., Sequence[Tensor]]


def retraced(function: Function, inputs: Sequence[Tensor]) -> GraphModule:
    """The graph of a function that is made of tensor operations alone; nothing is computed."""
    with _quiet():
        return make_fx(function, tracing_mode="fake")(*[tensor.detach() for tensor in inputs])


def compiled(graph: GraphModule, inputs: Sequence[Tensor]) -> Function:
    """The graph in Inductor's kernels; it may write into its inputs.

    Random numbers come from torch's generators, as in eager code.

    Raises:
        CannotCapture: there is no compiler on this machine, or it does not know some operation.
    """
    from torch._inductor import compile as inductor

    fuse_bernoulli(graph)
    use_faster_products(graph)
    on_cpu = all(tensor.device.type == "cpu" for tensor in inputs)
    options = {"fallback_random": True, "cpp_wrapper": on_cpu}  # the wrapper spares Python between kernels
    try:
        with torch.no_grad(), _quiet():
            return inductor(graph, [tensor.detach() for tensor in inputs], options=options)
    except Exception as error:  # whatever a compiler may say, the step can still run eagerly
        raise CannotCapture(f"the compiler failed: {type(error).__name__}: {_telling_line(error)}") from error


def is_recorded(device: torch.device) -> bool:
    """Whether functions on this device are recorded, and so read and write the same tensors each time."""
    return device.type == "cuda"


class Recorded:
    """A function of fixed tensors, recorded once into a CUDA graph and replayed as a single launch.

    Args:
        function: from tensors to tensors; it may write into its inputs.
        inputs: the very tensors that every replay reads and writes.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
        self.inputs = list(inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.random.fork_rng():
            for _ in range(3):  # kernels are loaded and tuned on copies, so that nothing is trained yet
                function(*[tensor.detach().clone() for tensor in inputs])
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.outputs = list(function(*self.inputs))
        except RuntimeError as error:
            raise CannotCapture(f"a CUDA graph cannot record it: {_telling_line(error)}") from error

    def __call__(self) -> list[Tensor]:
        """Replay; the outputs are copies, for the next replay overwrites its own."""
        self.graph.replay()
        return [output.clone() for output in self.outputs]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the compiler's remarks on operations that it hands to others, which are no concern of a run's."""
    loggers = [logging.getLogger(name) for name in ("torch._inductor", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _telling_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else ""
