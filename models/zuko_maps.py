"""zuko's maps, without what else its import does: it switches off the argument checks of every distribution."""
# ruff: noqa: E402

from torch.distributions import Distribution

_CHECKED = Distribution._validate_args

from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.transforms import AutoregressiveTransform, CouplingTransform, MonotonicRQSTransform

Distribution.set_default_validate_args(_CHECKED)

__all__ = [
    "AutoregressiveTransform",
    "CouplingTransform",
    "GeneralCouplingTransform",
    "MaskedAutoregressiveTransform",
    "MonotonicRQSTransform",
]
