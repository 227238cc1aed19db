"""What runs a captured graph: Inductor's kernels, and on a GPU a CUDA graph around them."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from inference.capture import CannotCapture, Captured
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
        inputs: the very tensors that every replay reads and writes, all on one device.

    Raises:
        CannotCapture: the function waits for the device, or moves something to it.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
        self.inputs = list(inputs)
        self.device = self.inputs[0].device
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), torch.random.fork_rng([self.device]):
                for _ in range(3):  # kernels are loaded and tuned on copies, so that nothing is trained yet
                    function(*[copy_of(tensor) for tensor in inputs])
            torch.cuda.current_stream().wait_stream(side)
            noise = torch.cuda.get_rng_state()
            self.graph = torch.cuda.CUDAGraph()
            try:  # of this thread alone: another one may be reading data ahead into pinned memory
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self.outputs = list(function(*self.inputs))
            except RuntimeError as error:
                self._leave(noise)
                raise CannotCapture(f"a CUDA graph cannot record it: {_telling_line(error)}") from error

    def _leave(self, noise: Tensor) -> None:
        """A recording that fails leaves the generator in the middle of it, where eager steps could not draw."""
        fresh = torch.Generator(self.device)
        fresh.set_state(noise)
        torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)

    def __call__(self) -> list[Tensor]:
        """Replay; the outputs are copies, for the next replay overwrites its own."""
        with torch.cuda.device(self.device):
            self.graph.replay()
        return [output.clone() for output in self.outputs]


def copy_of(tensor: Tensor) -> Tensor:
    """A copy that lies in memory as the tensor does, gaps included; one that is expanded, nobody can write into."""
    if any(stride == 0 < size - 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return tensor.detach()
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor.detach())


def elsewhere(captured: Captured, device: torch.device) -> list[int]:
    """Places of the tensors that a graph reads from another device than the one it is recorded on.

    A recording would keep the values that they had, so that it has to read copies of them.

    Raises:
        CannotCapture: the graph writes into one of them, or draws random numbers elsewhere.
    """
    nodes = list(captured.graph.graph.nodes)
    for node in nodes:
        value = node.meta.get("val")
        noisy = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if noisy and isinstance(value, Tensor) and value.device != device:
            raise CannotCapture(f"{node.target} draws on {value.device}, and a recording is of {device} alone")
    held = [node for node in nodes if node.op == "placeholder"][: len(captured.tensors)]
    places = [i for i, tensor in enumerate(captured.tensors) if tensor.device != device]
    for i in places:
        if is_written(held[i]) or captured.tensors[i].requires_grad:
            where = captured.tensors[i].device
            raise CannotCapture(f"it writes into a tensor on {where}, and a recording is of {device} alone")
    return places


def is_written(node: Node) -> bool:
    """Whether an operation writes into the tensor, or into a view of it."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)  # none: one is taken out of several views
        if schema is None or user.target.is_view:  # type: ignore[union-attr]
            if is_written(user):
                return True
        elif any(
            a.is_write and node in tree_leaves(given) for a, given in zip(schema.arguments, user.args, strict=False)
        ):
            return True
    return False


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
