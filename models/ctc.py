"""Connectionist temporal classification: labels whose alignment to the steps of a sequence is summed out."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

IMPOSSIBLE = -1e30  # in place of minus infinity, whose logaddexp has no gradient


def collapse(path: Tensor, blank: int = 0) -> list[int]:
    """The labels of a path ``(T,)``: repeats merged, then blanks dropped."""
    return [int(label) for label in torch.unique_consecutive(path) if label != blank]


def ctc_log_likelihood(
    log_probs: Tensor,
    labels: Tensor,
    num_steps: Tensor | None = None,
    num_labels: Tensor | None = None,
    blank: int = 0,
) -> Tensor:
    """log p(labels) in nats, ``(N,)``: the forward algorithm in log space (Graves et al. 2006, section 4.1).

    The sum over all paths that :func:`collapse` to the labels; minus infinity where there is none.

    Args:
        log_probs: log-probability of each symbol at each step, ``(N, T, V)``.
        labels: int64 ``(N, L)``, without blanks.
        num_steps: how many steps of each sequence count, ``(N,)``; T unless given.
        num_labels: how many labels of each row count, ``(N,)``; L unless given.
        blank: which symbol is the blank.
    """
    places, may_skip = _lattice(log_probs, labels, blank)
    emitted = log_probs.gather(2, places.unsqueeze(1).expand(-1, log_probs.shape[1], -1))  # (N, T, 2 L + 1)
    alpha = torch.full_like(emitted[:, 0], IMPOSSIBLE)
    alpha = torch.cat([emitted[:, 0, :2], alpha[:, 2:]], 1)
    for t in range(1, log_probs.shape[1]):
        after = _moved(alpha, may_skip) + emitted[:, t]
        alpha = after if num_steps is None else torch.where((t < num_steps).unsqueeze(1), after, alpha)
    counts = torch.full_like(places[:, 0], labels.shape[1]) if num_labels is None else num_labels.to(places)
    on_blank = alpha.gather(1, 2 * counts.unsqueeze(1)).squeeze(1)
    on_label = alpha.gather(1, (2 * counts - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    total = torch.where(counts > 0, torch.logaddexp(on_blank, on_label), on_blank)
    return torch.where(total < IMPOSSIBLE / 2, -torch.inf, total)


def _lattice(log_probs: Tensor, labels: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """The symbol at each of 2 L + 1 places (labels between blanks), and whether the place two before leads there."""
    if log_probs.dim() != 3 or labels.dim() != 2 or log_probs.shape[0] != labels.shape[0] or log_probs.shape[1] == 0:
        raise ValueError(
            f"expected log_probs (N, T, V) with T at least 1 and labels (N, L), got {tuple(log_probs.shape)} and "
            f"{tuple(labels.shape)}"
        )
    places = labels.new_full((labels.shape[0], 2 * labels.shape[1] + 1), blank)
    places[:, 1::2] = labels
    two_before = torch.cat([places[:, :2], places[:, :-2]], 1)[:, : places.shape[1]]
    may_skip = (places != blank) & (places != two_before)
    may_skip[:, :2] = False
    return places, may_skip


def _moved(alpha: Tensor, may_skip: Tensor) -> Tensor:
    """One transition: stay, go to the next place, or skip the blank between two different labels."""
    out = alpha.new_full((alpha.shape[0], 1), IMPOSSIBLE)
    stay_or_step = torch.logaddexp(alpha, torch.cat([out, alpha[:, :-1]], 1))
    skipped = torch.cat([out, out, alpha[:, :-2]], 1)[:, : alpha.shape[1]]
    return torch.logaddexp(stay_or_step, torch.where(may_skip, skipped, IMPOSSIBLE))


class CTC(PyroModule):
    """p(y) of labels y under given symbol probabilities, as a Pyro program whose latents are the path's places.

    Site ``z_t`` is the place in the lattice of labels and blanks after step t; all paths have the same base measure and
    a factor scores symbols and moves, so that enumeration of the sites gives :func:`ctc_log_likelihood`.

    Args:
        log_probs: log-probability of each symbol at each step, ``(T, V)``.
        blank: which symbol is the blank.
    """

    def __init__(self, log_probs: Tensor, blank: int = 0) -> None:
        super().__init__()
        self.log_probs, self.blank = log_probs, blank

    def forward(self, labels: Tensor) -> None:
        """Run the program on labels ``(N, L)``."""
        log_probs = self.log_probs.expand(labels.shape[0], *self.log_probs.shape)
        places, may_skip = _lattice(log_probs, labels, self.blank)
        data, count = torch.arange(labels.shape[0], device=labels.device), places.shape[1]
        logits = self.log_probs.new_zeros(count)
        before = None
        with pyro.plate("data", labels.shape[0], dim=-1):
            for t in pyro.markov(range(self.log_probs.shape[0])):
                z = pyro.sample(f"z_{t}", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
                move = z if before is None else z - before
                allowed = (move == 0) | (move == 1) | ((move == 2) & may_skip[data, z])
                if before is None:
                    allowed = z < 2
                score = log_probs[data, t, places[data, z]] + torch.tensor(count).log()  # undoes the uniform 1/count
                if t == self.log_probs.shape[0] - 1:
                    allowed = allowed & (z >= count - 2)
                pyro.factor(f"step_{t}", torch.where(allowed, score, IMPOSSIBLE))
                before = z

    def log_evidence(self, labels: Tensor) -> Tensor:
        """log p(y) in nats, ``(N, L) -> (N,)``."""
        return ctc_log_likelihood(
            self.log_probs.expand(labels.shape[0], *self.log_probs.shape), labels, blank=self.blank
        )
