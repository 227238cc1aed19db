"""Parts of a graph written so that a compiler makes less of them, to rounding the same."""

import math

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten
LANES = 16  # float32 numbers in the widest registers
MOST_FACTORS = 64  # factors between 1 and 2 whose product is far from the largest float32
_RESHAPES = (aten.view.default, aten._unsafe_view.default)


def fuse_bernoulli(graph: GraphModule) -> int:
    """Let log-probabilities of bits, where all that is done with them is to sum them, be :func:`log_bernoulli`.

    Returns how many sums were replaced.
    """
    found = [(node, terms) for node in graph.graph.nodes if (terms := _summed_bits(node)) is not None]
    for node, terms in found:
        with graph.graph.inserting_before(node):
            shape = list(node.args[0].meta["val"].shape)
            fused = graph.graph.call_function(log_bernoulli, (terms.args[0], terms.args[1], shape))
        node.replace_all_uses_with(fused)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return len(found)


def log_bernoulli(logits: Tensor, x: Tensor, shape: list[int]) -> Tensor:
    """log p(x) of independent bits in nats, both reshaped to ``shape`` and summed over its last dimension.

    The sum of log(1 + exp(-abs(logit))) is the logarithm of products of up to 64 factors between 1 and 2: one
    logarithm instead of 64, at an error of that many roundings.
    """
    factors = _factors(shape[-1])
    grouped = [*shape[:-1], factors, shape[-1] // factors]  # (..., D) -> (..., factors, D / factors)
    logits, x = logits.reshape(grouped), x.reshape(grouped)
    linear = (logits * x - logits.clamp(min=0)).sum(-2)
    curved = (1 + (-logits.abs()).exp()).prod(-2)
    return (linear - curved.log()).sum(-1)


def _factors(size: int) -> int:
    """How many factors go into a product: many, and if possible as many products as fill whole registers."""
    divisors = [d for d in range(1, min(size, MOST_FACTORS) + 1) if size % d == 0]
    return max(divisors, key=lambda d: (math.gcd(size // d, LANES) == LANES, d))


def _summed_bits(node: Node) -> Node | None:
    """The log-probabilities of bits that a node sums over its last dimension and nobody else looks at."""
    if node.target is not aten.sum.dim_IntList or len(node.args) != 2 or node.args[1] != [-1] or node.kwargs:
        return None
    term = node.args[0]
    while isinstance(term, Node) and term.target in _RESHAPES and len(term.users) == 1:
        term = term.args[0]
    if not isinstance(term, Node) or term.target is not aten.neg.default or len(term.users) > 1:
        return None
    loss = term.args[0]
    if not isinstance(loss, Node) or loss.target is not aten.binary_cross_entropy_with_logits.default:
        return None
    alone = len(loss.users) == 1 and tuple(loss.args[2:]) == (None, None, 0)
    return loss if alone else None
