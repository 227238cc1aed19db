"""Mixtures of Gaussians with full, tied, diagonal or spherical covariances."""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn

from models.mixture import FiniteMixture
from models.products import affine, squared_norms
from models.tractable import DegenerateError, Statistics, check_finite, refuse_narrow, spread_rows, squared_distances

COVARIANCES = ("full", "tied", "diagonal", "spherical")
MOST_PAIRED = 128  # dimensions of which all products of two are listed for each datum


class IndependentNormals(dist.Independent):
    """``Normal.to_event``, which squares and sums first and works with constants once for each event.

    An enumerated mixture scores each datum under each component, so that passes over the entries are what it costs.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        dims, (loc, scale) = self.reinterpreted_batch_ndims, (self.base_dist.loc, self.base_dist.scale)
        squares = sum_rightmost(((value - loc) / scale).square(), dims)
        log_scale = sum_rightmost(scale.log(), dims)
        return -0.5 * (squares + self.event_shape.numel() * math.log(2 * math.pi)) - log_scale


class GaussianMixture(FiniteMixture):
    """A mixture of Gaussians, fitted by gradients or by EM (Dempster, Laird and Rubin 1977, section 4.3).

    Args:
        event_shape: shape of one datum, D numbers.
        components: how many, K.
        covariance: full, tied (one full matrix for all components), diagonal, or spherical.
        ridge: r of the penalty ``-r/2 sum_k tr(covariance_k^-1)`` on the log-likelihood, in squared units of the data.
            It adds r to each diagonal entry of a component's scatter, so that no covariance is singular (Ormoneit and
            Tresp 1998); 0 for plain maximum likelihood.
    """

    shift: Tensor

    def __init__(
        self, event_shape: Sequence[int], components: int = 3, covariance: str = "full", ridge: float = 0.0
    ) -> None:
        super().__init__(event_shape, components)
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance must be one of {', '.join(COVARIANCES)}, got {covariance!r}")
        if not 0 <= ridge < math.inf:
            raise ValueError(f"ridge must be 0 or a positive number, got {ridge}")
        size = self.event_shape.numel()
        self.dense = covariance in ("full", "tied")  # whether covariances have entries off the diagonal
        if self.dense and len(self.event_shape) != 1:
            raise ValueError(
                f"covariance={covariance} is for rows of numbers, not for data of shape {tuple(event_shape)}; take "
                "diagonal or spherical"
            )
        self.covariance, self.ridge = covariance, ridge
        matrices = 1 if covariance == "tied" else components
        self.loc = nn.Parameter(torch.randn(components, size))
        self.log_scale = nn.Parameter(torch.zeros(matrices, 1 if covariance == "spherical" else size))
        if self.dense:
            self.lower = nn.Parameter(torch.zeros(matrices, size, size))  # what is above its diagonal is ignored
        # Moments are taken about this point: near the data, so that variances do not cancel.
        self.register_buffer("shift", torch.zeros(size))

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factors of the covariances, ``(K, D, D)``."""
        return self._factors().expand(self.num_states, -1, -1)

    @property
    def covariances(self) -> Tensor:
        """``(K, D, D)``."""
        return self.scale_tril @ self.scale_tril.mT

    @property
    def numbers_per_datum(self) -> int:
        size = self.event_shape.numel()
        pairs = size * (size + 1) // 2 if size <= MOST_PAIRED else size
        return self.num_states * size + pairs if self.dense else super().numbers_per_datum

    def log_prior(self) -> Tensor:
        """The penalty that ``ridge`` puts on the parameters, ``()`` nats."""
        inverse = self._inverse_factors() if self.dense else (-self.log_scale).exp().expand(-1, self.loc.shape[1])
        return -0.5 * self.ridge * inverse.double().square().sum()

    def component(self, z: Tensor) -> dist.TorchDistribution:
        """See :class:`FiniteMixture`."""
        if self.dense:
            return dist.MultivariateNormal(self.loc[z], scale_tril=self.scale_tril[z])
        scale = self.log_scale.exp()
        loc, scale = self.loc[z], (scale.expand_as(self.loc) if self.covariance == "spherical" else scale)[z]
        if len(self.event_shape) != 1:  # (..., D) -> (..., *event_shape)
            loc, scale = (each.reshape(*z.shape, *self.event_shape) for each in (loc, scale))
        return IndependentNormals(dist.Normal(loc, scale), len(self.event_shape))

    def log_likelihood(self, x: Tensor) -> Tensor:
        """See :class:`FiniteMixture`."""
        return -0.5 * self._mahalanobis(x - self.shift, self.loc - self.shift) - self._log_normalizers()

    def _log_normalizers(self) -> Tensor:
        """Half log det(2 pi covariance), ``(K,)`` or ``(1,)``."""
        size = self.loc.shape[1]
        return self.log_scale.expand(-1, size).sum(1) + 0.5 * size * math.log(2 * math.pi)

    def _mahalanobis(self, x: Tensor, loc: Tensor) -> Tensor:
        """Squared distances ``(N, K)`` of ``x`` (N, D) from ``loc`` (K, D), in units of each covariance."""
        if self.covariance == "full":
            inverse = self._inverse_factors()  # (K, D, D)
            whitened = affine(x, inverse.flatten(0, 1), -(inverse @ loc.unsqueeze(2)).flatten())  # (N, K D)
            return squared_norms(whitened.unflatten(1, loc.shape))  # (N, K D) -> (N, K, D) -> (N, K)
        if self.covariance == "tied":
            inverse = self._inverse_factors()[0]
            return squared_distances(x @ inverse.T, loc @ inverse.T)
        precision = (-2 * self.log_scale).exp()
        if self.covariance == "spherical":
            return squared_distances(x, loc) * precision.squeeze(1)
        cross = x @ (loc * precision).T
        return (x.square() @ precision.T - 2 * cross + (loc.square() * precision).sum(1)).clamp(min=0)

    def _factors(self) -> Tensor:
        """Cholesky factors, ``(K, D, D)``, or ``(1, D, D)`` of a tied covariance."""
        diagonal = self.log_scale.exp().expand(-1, self.loc.shape[1]).diag_embed()
        return self.lower.tril(-1) + diagonal if self.dense else diagonal

    def _inverse_factors(self) -> Tensor:
        factors = self._factors()
        identity = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
        return torch.linalg.solve_triangular(factors, identity.expand_as(factors), upper=False)

    def component_statistics(self, x: Tensor, q: Tensor) -> Statistics:
        """See :class:`FiniteMixture`; moments are about :attr:`shift`."""
        x = x - self.shift
        return {"first": (q.T @ x).double(), "second": self._second(x, q).double()}

    def _second(self, x: Tensor, q: Tensor) -> Tensor:
        """Second moments: ``(K, D(D+1)/2)`` lower triangles, ``(D, D)``, ``(K, D)`` or ``(K,)`` by covariance."""
        if self.covariance == "full":
            return _second_by_pairs(x, q) if x.shape[1] <= MOST_PAIRED else _second_by_component(x, q)
        if self.covariance == "tied":
            return x.T @ x
        return q.T @ x.square() if self.covariance == "diagonal" else q.T @ x.square().sum(1)

    def _scatter(self, statistics: Statistics, loc: Tensor) -> Tensor:
        """Sums of squares about ``loc`` (K, D): ``(M, D, D)``, of diagonals ``(K, D)``, of traces over D ``(K, 1)``."""
        count, first, second = statistics["count"], statistics["first"], statistics["second"]
        if not self.dense:
            squares = count.unsqueeze(1) * loc.square() - 2 * loc * first
            if self.covariance == "diagonal":
                return second + squares
            return (second + squares.sum(1)).unsqueeze(1) / loc.shape[1]
        cross = first.unsqueeze(2) * loc.unsqueeze(1)
        outer = (count.unsqueeze(1) * loc).unsqueeze(2) * loc.unsqueeze(1)
        about = outer - cross - cross.mT  # (K, D, D)
        return about.sum(0, keepdim=True) + second if self.covariance == "tied" else about + self._unpacked(second)

    def _unpacked(self, triangles: Tensor) -> Tensor:
        size = self.loc.shape[1]
        row, column = torch.tril_indices(size, size, device=triangles.device)
        full = triangles.new_zeros(triangles.shape[0], size, size)
        full[:, row, column] = triangles
        full[:, column, row] = triangles
        return full

    def expected_log_likelihood(self, statistics: Statistics) -> Tensor:
        """See :class:`FiniteMixture`."""
        scatter = self._scatter(statistics, self.loc.double() - self.shift.double())
        if self.dense:
            factors = self._factors().double()
            spread = torch.cholesky_solve(scatter, factors).diagonal(dim1=1, dim2=2).sum()
        else:
            times = self.loc.shape[1] if self.covariance == "spherical" else 1
            spread = times * (scatter * (-2 * self.log_scale.double()).exp()).sum()
        return -0.5 * spread - (statistics["count"] * self._log_normalizers().double()).sum()

    def fit_components(self, statistics: Statistics) -> None:
        """See :class:`FiniteMixture`."""
        count = statistics["count"]
        loc = statistics["first"] / count.unsqueeze(1)
        size = count.sum().reshape(1) if self.covariance == "tied" else count
        scatter = self._scatter(statistics, loc)
        if self.dense:
            covariance = (scatter + self.ridge * torch.eye(loc.shape[1]).to(scatter)) / size[:, None, None]
            factors, failed = torch.linalg.cholesky_ex(covariance)
            scale = factors.diagonal(dim1=1, dim2=2)
        else:
            factors, scale = None, ((scatter + self.ridge) / size.unsqueeze(1)).sqrt()
            failed = torch.zeros_like(size)
        self._check_scales(scale, failed, count, statistics)
        if factors is not None:
            self.lower.copy_(factors)
        self.log_scale.copy_(scale.log())
        self.loc.copy_(loc + self.shift)

    def _check_scales(self, scale: Tensor, failed: Tensor, count: Tensor, statistics: Statistics) -> None:
        """A variance that is rounding error of the moments it is the difference of is none."""
        second = statistics["second"]
        if self.covariance == "tied":
            moments = second.diagonal() / count.sum()
        elif self.covariance == "full":
            moments = self._unpacked(second).diagonal(dim1=1, dim2=2) / count.unsqueeze(1)
        else:
            moments = second.reshape(self.num_states, -1) / count.unsqueeze(1)
        noise = 10 * torch.finfo(self.loc.dtype).eps * moments.amax(-1, keepdim=True)
        good = (failed == 0) & (scale.square() > noise).all(1)
        if bool(good.all()):
            return
        which = int((~good).nonzero()[0, 0])
        whose = "all components share a" if self.covariance == "tied" else f"component {which} has a"
        held = f"{float(count.sum() if self.covariance == 'tied' else count[which]):.3g}"
        raise DegenerateError(
            f"{whose} singular covariance: its {held} data do not spread in all {self.loc.shape[1]} dimensions; try "
            "fewer components, more restarts, a simpler covariance (spherical, tied, diagonal), model.ridge above 0, "
            "or leave out columns that are constant or repeat others"
        )

    @torch.no_grad()
    def initialize(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        """Equal weights, the data's variances, and means at data far from one another.

        Raises:
            DegenerateError: fewer distinct data than components, or, without a ridge, a column that is constant or
                varies by no more than rounding; or squares overflow.
        """
        check_finite(x)
        x = self._flat(x)
        mean = x.mean(0)
        variance = (x - mean).square().mean(0) + self.ridge / x.shape[0]
        noise = 10 * torch.finfo(x.dtype).eps * x.square().mean(0)
        varying = variance > noise if self.covariance != "spherical" else variance.sum() > noise.sum()
        if not bool(varying.all()):
            refuse_narrow(x, ~varying.expand_as(mean), "leave them out, or try model.ridge above 0")
        self.loc.copy_(spread_rows(x, self.num_states, generator))
        self.shift.copy_(mean)
        self.logits.zero_()
        scale = variance.mean().reshape(1) if self.covariance == "spherical" else variance
        self.log_scale.copy_((scale.log() / 2).expand_as(self.log_scale))
        if self.dense:
            self.lower.zero_()


def _second_by_pairs(x: Tensor, q: Tensor) -> Tensor:
    """Weighted second moments as lower triangles, ``(K, D(D+1)/2)``: all components in one product, each entry once."""
    rows = x.T.contiguous()  # (D, N)
    size = rows.shape[0]
    pairs = x.new_empty(size * (size + 1) // 2, x.shape[0])
    for i, some in enumerate(pairs.split(list(range(1, size + 1)))):
        torch.mul(rows[: i + 1], rows[i], out=some)
    return affine(q.T.contiguous(), pairs)


def _second_by_component(x: Tensor, q: Tensor) -> Tensor:
    """The same, one component after the other."""
    row, column = torch.tril_indices(x.shape[1], x.shape[1], device=x.device)
    return torch.stack([affine((x * weight.unsqueeze(1)).T, x.T)[row, column] for weight in q.T])
