"""Products of matrices by the faster of the libraries that torch carries.

On an AMD EPYC with AVX-512, one core reaches 100 GFLOP/s through ``torch.mm``, which calls MKL, and 200 to 230 through
oneDNN. Other processors of that maker are taken to be alike; on all others nothing is replaced. The choice depends on
the processor and on shapes alone, never on a measurement, so that a run repeats itself.
"""

from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from models.products import MIN_FLOP, onednn_is_faster

aten = torch.ops.aten
_SINGLE = (aten.mm.default, aten.addmm.default)
_BATCHES = (aten.bmm.default, aten.baddbmm.default)
_WITH_BIAS = (aten.addmm.default, aten.baddbmm.default)
_libraries: list[torch.library.Library] = []  # an operator lives as long as the library that defined it


def use_faster_products(graph: GraphModule) -> int:
    """Replace the large float32 products of a graph on the CPU, where oneDNN is the faster; returns how many.

    The bias that is added to a product, and a hyperbolic tangent that nothing comes before, are computed with it.
    """
    if not onednn_is_faster():
        return 0
    nodes = [node for node in graph.graph.nodes if _is_large(node)]
    for node in nodes:
        *bias, a, b = node.args[:3] if node.target in _WITH_BIAS else node.args
        last = _only_tanh_after(node) if node.target in _SINGLE else None
        with graph.graph.inserting_before(node):
            if node.target in _SINGLE:
                rest = (bias[0] if bias else None, "none" if last is None else "tanh")
                product = graph.graph.call_function(_operator(), (a, b, *rest))
            else:
                product = graph.graph.call_function(_batch_operator(), (a, b))
                if bias:
                    product = graph.graph.call_function(aten.add.Tensor, (product, bias[0]))
        if last is not None:  # what reshapes the product now reshapes its tangent
            before = cast(Node, last.args[0])
            last.replace_all_uses_with(product if before is node else before)
            graph.graph.erase_node(last)
        node.replace_all_uses_with(product)
        graph.graph.erase_node(node)
    graph.recompile()
    return len(nodes)


def _only_tanh_after(node: Node) -> Node | None:
    """The hyperbolic tangent that is all that becomes of a product, perhaps in another shape."""
    while len(node.users) == 1:
        (node,) = node.users
        if node.target is aten.tanh.default:
            return node
        if node.target not in (aten.view.default, aten._unsafe_view.default):
            return None
    return None


def _is_large(node: Node) -> bool:
    if node.target not in (*_SINGLE, *_BATCHES) or node.kwargs:
        return False
    a, b = [arg.meta["val"] for arg in node.args if isinstance(arg, Node)][-2:]
    bias = node.args[0].meta["val"] if node.target is aten.addmm.default else None  # type: ignore[union-attr]
    on_cpu = a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    vector = bias is None or bias.dim() == 1
    return on_cpu and vector and 2 * a.shape[-2] * a.shape[-1] * b.shape[-1] >= MIN_FLOP


@cache
def _operator() -> torch._ops.OpOverload:
    library = torch.library.Library("lowerbound", "FRAGMENT")
    library.define("product(Tensor a, Tensor b, Tensor? bias, str activation) -> Tensor")
    library.impl("product", _product, "CPU")
    library.impl("product", lambda a, b, bias, activation: a.new_empty((a.shape[0], b.shape[1])), "Meta")
    _libraries.append(library)
    return torch.ops.lowerbound.product.default


@cache
def _batch_operator() -> torch._ops.OpOverload:
    library = torch.library.Library("lowerbound", "FRAGMENT")
    library.define("products(Tensor a, Tensor b) -> Tensor")
    library.impl("products", _products, "CPU")
    library.impl("products", lambda a, b: a.new_empty((a.shape[0], a.shape[1], b.shape[2])), "Meta")
    _libraries.append(library)
    return torch.ops.lowerbound.products.default


def _product(a: Tensor, b: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    if bias is None and a.stride(0) == 1 and a.numel() > b.numel() + a.shape[0] * b.shape[1]:
        # oneDNN copies a first factor that lies the other way round, as in the gradient of a layer's weights. Where
        # that is much, the other factor goes first and the product is turned.
        return torch.ops.mkldnn._linear_pointwise(b.t(), a, None, activation, [], "").t().contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, activation, [], "")


def _products(a: Tensor, b: Tensor) -> Tensor:
    """``(N, I, J) (N, J, K) -> (N, I, K)``, one after another."""
    return torch.stack([_product(left, right, None, "none") for left, right in zip(a, b, strict=True)])
