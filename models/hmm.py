"""Hidden Markov models with categorical or Gaussian emissions; every recursion in log space."""

import math
from collections.abc import Sequence
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

from models.distributions import CategoricalLevels
from models.nets import batch_shape
from models.tractable import DegenerateError, Statistics, check_finite, refuse_narrow, spread_rows

EMISSIONS = ("gaussian", "categorical")


class HMM(PyroModule):
    """A Markov chain of hidden states, each emitting one step of a sequence (Rabiner 1989).

    z_0 ~ initial, z_t ~ transition[z_{t-1}], x_t ~ emission[z_t]: the first state emits before any transition.
    The sites are ``z_0``, ``z_1``, ... and, in training mode, ``x_0``, ``x_1``, ..., so that enumeration costs as much
    as the forward algorithm; in evaluation mode one observed site ``x``, the same density.

    Args:
        event_shape: of one sequence, ``(T,)`` or, for vectors of D numbers, ``(T, D)``.
        states: number of hidden states, S.
        emission: gaussian (a mean and a standard deviation per state and entry) or categorical.
        symbols: number of symbols 0, ..., symbols - 1 of categorical emissions.
        held: of initial and transition those that are known: buffers, which neither gradients nor M steps change. Set
            them after construction; a chain over letters, say, is a language model.
    """

    e_step_guide: ClassVar[str] = "summed_out"

    def __init__(
        self,
        event_shape: Sequence[int],
        states: int = 3,
        emission: str = "gaussian",
        symbols: int = 0,
        held: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.event_shape, self.num_states, self.emission = torch.Size(event_shape), states, emission
        _check(self.event_shape, states, emission, symbols)
        self.support = "levels" if emission == "categorical" else "real"
        self.num_steps = self.event_shape[0]
        if unknown := [name for name in held if name not in ("initial", "transition")]:
            raise ValueError(f"held names what is known, of initial and transition, got {unknown[0]!r}")
        self.held = tuple(held)
        self._chain("initial", torch.zeros(states))
        self._chain("transition", torch.zeros(states, states))
        if emission == "categorical":
            self.symbol_logits = nn.Parameter(torch.randn(states, symbols))
        else:
            self.loc = nn.Parameter(torch.randn(states, *self.event_shape[1:]))
            self.log_scale = nn.Parameter(torch.zeros(states, *self.event_shape[1:]))

    def _chain(self, name: str, logits: Tensor) -> None:
        if name in self.held:
            self.register_buffer(f"{name}_logits", logits)
        else:
            setattr(self, f"{name}_logits", nn.Parameter(logits))

    @property
    def numbers_per_datum(self) -> int:
        """About how many numbers an E step makes for each datum."""
        return self.num_steps * (4 * self.num_states + self.num_states**2)

    # --- the program ---------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> list[Tensor]:
        """Run the program on sequences ``(N, *event_shape)``; returns the T states."""
        states: list[Tensor] = []
        with pyro.plate("data", x.shape[0], dim=-1):
            for t in pyro.markov(range(self.num_steps)):
                logits = self.initial_logits if t == 0 else self.transition_logits[states[-1]]
                states.append(pyro.sample(f"z_{t}", dist.Categorical(logits=logits)))
                if self.training:
                    pyro.sample(f"x_{t}", self._emission(states[-1]), obs=x[:, t])
            if not self.training:
                together = self._emission(torch.stack(torch.broadcast_tensors(*states), -1))  # batch (..., N, T)
                pyro.sample("x", together.to_event(1), obs=x)
        return states

    def sample_posterior(self, x: Tensor) -> list[Tensor]:
        """A guide program that draws the states from p(z|x), first to last."""
        emission = self.emission_log_prob(x)
        backward = self._backward(emission)
        states: list[Tensor] = []
        with pyro.plate("data", x.shape[0], dim=-1):
            for t in range(self.num_steps):
                before = self.initial_logits if t == 0 else self.transition_logits[states[-1]]
                logits = before.log_softmax(-1) + emission[:, t] + backward[:, t]
                states.append(pyro.sample(f"z_{t}", dist.Categorical(logits=logits)))
        return states

    def _emission(self, z: Tensor) -> dist.TorchDistribution:
        if self.emission == "categorical":
            return CategoricalLevels(logits=self.symbol_logits[z])
        return dist.Normal(self.loc[z], self.log_scale[z].exp()).to_event(len(self.event_shape) - 1)

    # --- exact inference -----------------------------------------------------------------------------------------

    def emission_log_prob(self, x: Tensor) -> Tensor:
        """log p(x_t|z_t) under every state, ``(N, *event_shape) -> (N, T, S)`` nats."""
        batch_shape(x, self.event_shape)
        if self.emission == "categorical":
            return self.symbol_logits.log_softmax(1).T[x.long()]
        rows = x.reshape(*x.shape[:2], 1, -1)  # (N, T, 1, D)
        loc, log_scale = self.loc.reshape(self.num_states, -1), self.log_scale.reshape(self.num_states, -1)
        standard = (rows - loc) * (-log_scale).exp()
        return -0.5 * standard.square().sum(-1) - (log_scale + 0.5 * math.log(2 * math.pi)).sum(-1)

    def _forward(self, emission: Tensor) -> Tensor:
        """log p(x_0, ..., x_t, z_t), ``(N, T, S)``."""
        transition = self.transition_logits.log_softmax(1)
        alpha = [self.initial_logits.log_softmax(0) + emission[:, 0]]
        for t in range(1, emission.shape[1]):
            alpha.append((alpha[-1].unsqueeze(2) + transition).logsumexp(1) + emission[:, t])
        return torch.stack(alpha, 1)

    def _backward(self, emission: Tensor) -> Tensor:
        """log p(x_{t+1}, ..., x_{T-1} | z_t), ``(N, T, S)``."""
        transition = self.transition_logits.log_softmax(1)
        beta = [torch.zeros_like(emission[:, 0])]
        for t in range(emission.shape[1] - 1, 0, -1):
            beta.append((transition + (emission[:, t] + beta[-1]).unsqueeze(1)).logsumexp(2))
        return torch.stack(beta[::-1], 1)

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) in nats by the forward algorithm, ``(N,)``."""
        return self._forward(self.emission_log_prob(x))[:, -1].logsumexp(1)

    def smoothed(self, x: Tensor) -> Tensor:
        """p(z_t|x), ``(N, T, S)``."""
        emission = self.emission_log_prob(x)
        return (self._forward(emission) + self._backward(emission)).softmax(2)

    @torch.no_grad()
    def viterbi(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest states, int64 ``(N, T)``, and their log p(x, z), ``(N,)`` nats (Viterbi 1967)."""
        emission, transition = self.emission_log_prob(x), self.transition_logits.log_softmax(1)
        best, came_from = self.initial_logits.log_softmax(0) + emission[:, 0], []
        for t in range(1, self.num_steps):
            score, source = (best.unsqueeze(2) + transition).max(1)
            best = score + emission[:, t]
            came_from.append(source)
        log_joint, state = best.max(1)
        path = [state]
        for source in reversed(came_from):
            path.append(source.gather(1, path[-1].unsqueeze(1)).squeeze(1))
        return torch.stack(path[::-1], 1), log_joint

    # --- Baum-Welch ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def e_step(self, x: Tensor, hard: bool = False) -> tuple[Statistics, Tensor]:
        """Expected counts (Baum et al. 1970), or those of the Viterbi path; see :class:`models.tractable.EMModel`."""
        if hard:
            path, evidence = self.viterbi(x)
            states = F.one_hot(path, self.num_states).to(self.initial_logits.dtype)
            pairs = torch.einsum("nti,ntj->ij", states[:, :-1], states[:, 1:])
            return self._statistics(x, states, pairs, states.new_zeros(())), evidence
        emission = self.emission_log_prob(x)
        alpha, beta = self._forward(emission), self._backward(emission)
        evidence = alpha[:, -1].logsumexp(1)
        log_states = alpha + beta - evidence[:, None, None]
        # p(z_t, z_{t+1} | x), (N, T - 1, S, S)
        arrive = (emission + beta)[:, 1:].unsqueeze(2) + self.transition_logits.log_softmax(1)
        pairs = (alpha[:, :-1].unsqueeze(3) + arrive - evidence[:, None, None, None]).exp()
        states = log_states.exp()
        entropy = torch.special.entr(pairs).sum() - torch.special.entr(states[:, 1:-1]).sum()
        if self.num_steps == 1:
            entropy = torch.special.entr(states).sum()
        return self._statistics(x, states, pairs.sum((0, 1)), entropy), evidence

    def _statistics(self, x: Tensor, states: Tensor, pairs: Tensor, entropy: Tensor) -> Statistics:
        """Sums of what the M step needs, for states ``(N, T, S)`` and pairs of successive states ``(S, S)``."""
        sums = {"initial": states[:, 0].sum(0), "transition": pairs, "entropy": entropy}
        flat = states.flatten(0, 1)  # (N T, S)
        if self.emission == "categorical":
            symbols = F.one_hot(x.long().flatten(), self.symbol_logits.shape[1]).to(flat.dtype)
            sums["symbols"] = flat.T @ symbols
        else:
            rows = x.reshape(flat.shape[0], -1)  # (N, T, D) -> (N T, D)
            sums |= {"count": flat.sum(0), "first": flat.T @ rows, "second": flat.T @ rows.square()}
        return {name: value.double() for name, value in sums.items()}

    def expected_log_joint(self, statistics: Statistics) -> Tensor:
        """See :class:`models.tractable.EMModel`."""
        total = (statistics["initial"] * self.initial_logits.double().log_softmax(0)).sum()
        total = total + (statistics["transition"] * self.transition_logits.double().log_softmax(1)).sum()
        if self.emission == "categorical":
            return total + (statistics["symbols"] * self.symbol_logits.double().log_softmax(1)).sum()
        loc, log_scale = (p.double().reshape(self.num_states, -1) for p in (self.loc, self.log_scale))
        count = statistics["count"].unsqueeze(1)
        scatter = statistics["second"] - 2 * loc * statistics["first"] + count * loc.square()
        normalizer = count * (log_scale + 0.5 * math.log(2 * math.pi))
        return total - (0.5 * scatter * (-2 * log_scale).exp() + normalizer).sum()

    @torch.no_grad()
    def m_step(self, statistics: Statistics) -> None:
        """Probabilities to normalized counts, Gaussians to weighted moments; see :class:`models.tractable.EMModel`.

        Raises:
            DegenerateError: a state without data, or whose data do not vary.
        """
        used = statistics["symbols"].sum(1) if self.emission == "categorical" else statistics["count"]
        empty = (used <= 10 * torch.finfo(self.initial_logits.dtype).eps * used.sum()).nonzero().flatten().tolist()
        if empty:
            raise DegenerateError(
                f"state {empty[0]} of {self.num_states} is empty: no step belongs to it any more; try fewer states, "
                "more restarts, or another start"
            )
        if self.emission == "categorical":
            self.symbol_logits.copy_(_log_frequencies(statistics["symbols"]))
        else:
            self._fit_gaussians(statistics)
        for name in ("initial", "transition"):
            if name not in self.held:
                getattr(self, f"{name}_logits").copy_(_log_frequencies(statistics[name]))

    def _fit_gaussians(self, statistics: Statistics) -> None:
        count = statistics["count"].unsqueeze(1)
        loc, square = statistics["first"] / count, statistics["second"] / count
        variance = square - loc.square()
        constant = (variance <= 10 * torch.finfo(self.loc.dtype).eps * square).any(1).nonzero().flatten().tolist()
        if constant:
            raise DegenerateError(
                f"the {float(count[constant[0]]):.3g} steps of state {constant[0]} do not vary, where a Gaussian has "
                "no likeliest scale; try fewer states, more restarts, or leave out what is constant"
            )
        self.loc.copy_(loc.reshape(self.loc.shape))
        self.log_scale.copy_((variance.log() / 2).reshape(self.loc.shape))

    @torch.no_grad()
    def initialize(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        """Random transitions that prefer to stay; emissions near the data's, at random."""
        check_finite(x)

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, device=x.device, dtype=like.dtype)

        if "initial" not in self.held:
            self.initial_logits.zero_()
        if "transition" not in self.held:
            eye = torch.eye(self.num_states, device=x.device)
            self.transition_logits.copy_(eye + 0.1 * noise(self.transition_logits))
        if self.emission == "categorical":
            self._check_symbols(x)
            symbols = x.long().flatten()
            ones = torch.ones(symbols.shape, dtype=torch.float64, device=x.device)
            counts = ones.new_ones(self.symbol_logits.shape[1]).index_add_(0, symbols, ones)
            self.symbol_logits.copy_(counts.log() + noise(self.symbol_logits))
            return
        rows = x.reshape(x.shape[0] * self.num_steps, -1)
        variance = rows.var(0, correction=0)
        varying = variance > 10 * torch.finfo(x.dtype).eps * rows.square().mean(0)
        if not bool(varying.all()):
            refuse_narrow(rows, ~varying, "leave them out")
        self.loc.copy_(spread_rows(rows, self.num_states, generator).reshape(self.loc.shape))
        self.log_scale.copy_((variance.log() / 2).reshape(self.loc.shape[1:]).expand_as(self.loc))

    def _check_symbols(self, x: Tensor) -> None:
        symbols = self.symbol_logits.shape[1]
        if not bool(((x >= 0) & (x < symbols) & (x == x.round())).all()):
            raise ValueError(f"categorical emissions take the symbols 0 to {symbols - 1}; the data hold others")


def _check(event_shape: torch.Size, states: int, emission: str, symbols: int) -> None:
    if emission not in EMISSIONS:
        raise ValueError(f"emission must be one of {', '.join(EMISSIONS)}, got {emission!r}")
    if len(event_shape) not in (1, 2) or (emission == "categorical" and len(event_shape) != 1):
        raise ValueError(
            f"a sequence is of shape (T,), or (T, D) with gaussian emissions, got {tuple(event_shape)} with {emission}"
        )
    if states < 1 or (emission == "categorical" and symbols < 1):
        raise ValueError(
            f"states and, for categorical emissions, symbols must be at least 1, got {states} and {symbols}"
        )


def _log_frequencies(counts: Tensor) -> Tensor:
    """Logits of normalized counts along the last dimension; one that was never left stays uniform.

    The floor keeps an impossible move's logit finite, so that gradients stay so too.
    """
    total = counts.sum(-1, keepdim=True)
    uniform = torch.full_like(counts, 1 / counts.shape[-1])
    return torch.where(total > 0, counts / total.clamp(min=1e-300), uniform).clamp(min=1e-300).log()
