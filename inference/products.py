"""Products of matrices by the faster of the libraries that torch carries.

On an AMD EPYC with AVX-512, one core reaches 100 GFLOP/s through ``torch.mm``, which calls MKL, and 200 to 230 through
oneDNN. Other processors of that maker are taken to be alike; on all others nothing is replaced. The choice depends on
the processor and on shapes alone, never on a measurement, so that a run repeats itself.
"""

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten
MIN_FLOP = 4_000_000  # below this a product is done before the detour through Python pays
_libraries: list[torch.library.Library] = []  # an operator lives as long as the library that defined it


def use_faster_products(graph: GraphModule) -> int:
    """Replace the large float32 products of a graph on the CPU, where oneDNN is the faster; returns how many."""
    if not onednn_is_faster():
        return 0
    nodes = [node for node in graph.graph.nodes if _is_large(node)]
    for node in nodes:
        *added, a, b = node.args[:3]
        with graph.graph.inserting_before(node):
            product = graph.graph.call_function(_operator(), (a, b))
            if added:
                product = graph.graph.call_function(aten.add.Tensor, (product, added[0]))
        node.replace_all_uses_with(product)
        graph.graph.erase_node(node)
    graph.recompile()
    return len(nodes)


@cache
def onednn_is_faster() -> bool:
    """Whether torch multiplies by MKL, has oneDNN too, and runs on a processor where that was measured to be faster."""
    available = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise") and "AuthenticAMD" in _processor()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text()[:1000] if cpuinfo.is_file() else platform.processor()


def _is_large(node: Node) -> bool:
    if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
        return False
    a, b = [arg.meta["val"] for arg in node.args if isinstance(arg, Node)][-2:]
    on_cpu = a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    return on_cpu and 2 * a.shape[0] * a.shape[1] * b.shape[1] >= MIN_FLOP


@cache
def _operator() -> torch._ops.OpOverload:
    library = torch.library.Library("lowerbound", "DEF")
    library.define("product(Tensor a, Tensor b) -> Tensor")
    library.impl("product", _product, "CPU")
    library.impl("product", lambda a, b: a.new_empty((a.shape[0], b.shape[1])), "Meta")
    _libraries.append(library)
    return torch.ops.lowerbound.product.default


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
