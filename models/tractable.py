"""What expectation maximization asks of a model, and the error of data that leave its maximum undefined."""

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from models.products import squared_norms

# Expected sufficient statistics, summed over data, in float64 whatever the data are: sums of many, which the M step
# subtracts from one another. Those of two sets of data are those of their union when added key by key.
Statistics = dict[str, Tensor]


class DegenerateError(ValueError):
    """The likelihood has no maximum, or EM no way to it from here; the message says what to try."""


class EMModel(Protocol):
    """A model whose posterior and whose maximum under a given posterior have closed forms.

    ``statistics`` contain ``entropy``, the sum over the data of H(q), so that the free energy of Neal and Hinton (1998,
    equation 5), F(q, theta) = E_q log p(x, z; theta) + H(q), is ``expected_log_joint(statistics)
    + statistics["entropy"]``, in nats summed over the data, and costs no pass over them.

    Attributes:
        e_step_guide: the word of the guide that is its E step.
    """

    e_step_guide: ClassVar[str]

    def e_step(self, x: Tensor, hard: bool = False) -> tuple[Statistics, Tensor]:
        """Statistics of data ``(N, *event_shape)`` under their posterior, and log p(x), ``(N,)`` nats.

        Hard: under its mode alone, and the log p(x, z) of that.
        """
        ...

    def m_step(self, statistics: Statistics) -> None:
        """Set the parameters to the maximum of :meth:`expected_log_joint`, of a penalized one if there is a prior."""
        ...

    def expected_log_joint(self, statistics: Statistics) -> Tensor:
        """E_q log p(x, z) in nats, summed over the data, ``()``; a function of the parameters, with their gradient."""
        ...

    def initialize(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        """Start from data, at random where there is a choice."""
        ...


def check_finite(x: Tensor) -> None:
    """Raise ValueError where data ``(N, *event_shape)`` are none, or hold NaN or infinity; one wait for the device."""
    if x.shape[0] == 0:
        raise ValueError("there are no data: at least one row is needed")
    if bool(torch.isfinite(x.sum())):
        return
    bad = ~torch.isfinite(x.reshape(x.shape[0], -1)).all(1)  # (N, *event) -> (N, D)
    if count := int(bad.sum()):
        first = int(bad.nonzero()[0, 0])
        raise ValueError(f"{count} of {x.shape[0]} data hold NaN or infinity, the first is row {first}; leave them out")


def refuse_narrow(x: Tensor, narrow: Tensor, remedy: str) -> None:
    """Refuse rows ``x`` (N, D) for columns ``narrow`` (D,) whose variance is none, or none that can be told.

    Raises:
        DegenerateError: with ``remedy`` where the columns are constant; always.
    """
    check_overflow(x.square().sum())
    constant = narrow & (x.amax(0) == x.amin(0))
    columns = (constant if bool(constant.any()) else narrow).nonzero().flatten().tolist()
    what = "all columns" if len(columns) == x.shape[1] else f"columns {columns[:5]}"
    if bool(constant.any()):
        raise DegenerateError(f"{what} of {x.shape[0]} data are constant, where a Gaussian has no scale; {remedy}")
    raise DegenerateError(
        f"{what} of {x.shape[0]} data vary by too little for their size: {_name(x)} keeps too few digits of the "
        f"variance; try {'' if x.dtype == torch.float64 else 'float64 or '}standardized data"
    )


def check_overflow(squares: Tensor) -> None:
    """Raise DegenerateError where a sum of squares ``()`` of finite data is not finite."""
    if not bool(torch.isfinite(squares)):
        raise DegenerateError(
            f"squares of these numbers, or the sum of them, overflow {_name(squares)}; standardize the data"
        )


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def spread_rows(x: Tensor, count: int, generator: torch.Generator | None = None, repeats: bool = False) -> Tensor:
    """``count`` rows of ``x`` (N, D) far from one another, ``(count, D)`` (k-means++, Arthur and Vassilvitskii 2007).

    Args:
        x: what is chosen from.
        count: how many.
        generator: of the choice.
        repeats: whether to begin again where there are fewer distinct rows.

    Raises:
        DegenerateError: there are, and it may not; or squared distances overflow.
    """
    first = torch.randint(x.shape[0], (1,), generator=generator, device=x.device)
    chosen = [x[first]]
    nearest = _distances(x, chosen[0])
    while len(chosen) < count:
        check_overflow(nearest.sum())
        if not bool(nearest.max() > 0):
            if repeats:
                return torch.cat([*chosen, *[x[first]] * (count - len(chosen))])
            raise DegenerateError(
                f"{x.shape[0]} data have only {len(chosen)} distinct rows, too few to start {count} components at; "
                f"try at most {len(chosen)} components"
            )
        row = x[torch.multinomial(nearest, 1, generator=generator)]
        nearest = torch.minimum(nearest, _distances(x, row))
        chosen.append(row)
    return torch.cat(chosen)


def _distances(x: Tensor, row: Tensor) -> Tensor:
    """Squared Euclidean distances of rows ``(N, D)`` from one, ``(N,)``, without a difference of large numbers."""
    return torch.cat([squared_norms(some - row) for some in x.split(max(1, 2**19 // x.shape[1]))])


def squared_distances(x: Tensor, points: Tensor) -> Tensor:
    """Squared Euclidean distances of rows ``(N, D)`` and ``(K, D)``, ``(N, K)``, by one matrix product."""
    half = points.square().sum(1) / 2 - x @ points.T
    return (x.square().sum(1, keepdim=True) + 2 * half).clamp(min=0)
