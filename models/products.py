"""Matrix products on the CPU by the faster of the libraries that torch carries."""

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

MIN_FLOP = 4_000_000  # below this a product is done before the detour pays


@cache
def onednn_is_faster() -> bool:
    """Whether torch multiplies by MKL, has oneDNN too, and runs on a processor where that was measured to be faster."""
    available = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise") and "AuthenticAMD" in _processor()


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, ``(N, D), (M, D), (M,) -> (N, M)``; large ones in single precision by oneDNN if faster.

    Not differentiable where that is taken, so that it is taken only where no gradient is asked for.
    """
    large = 2 * x.numel() * weight.shape[0] >= MIN_FLOP
    single = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if large and single and not torch.is_grad_enabled() and onednn_is_faster():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def squared_norms(x: Tensor) -> Tensor:
    """Sums of squares over the last dimension, ``(*batch, D) -> (*batch,)``."""
    return x.square().sum(-1) if torch.is_grad_enabled() else torch.linalg.vector_norm(x, dim=-1).square_()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text()[:1000] if cpuinfo.is_file() else platform.processor()
