"""Connectionist temporal classification against all paths, torch's own, and Pyro's enumeration."""

import itertools

import numpy as np
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from scipy.special import logsumexp

from models.ctc import CTC, collapse, ctc_log_likelihood


def all_paths(log_probs, labels):
    """log p(labels) as the sum over every path that collapses to them."""
    steps, symbols = log_probs.shape
    scores = [
        sum(float(log_probs[t, symbol]) for t, symbol in enumerate(path))
        for path in itertools.product(range(symbols), repeat=steps)
        if collapse(torch.tensor(path)) == labels
    ]
    return logsumexp(scores) if scores else -np.inf


def random_log_probs(size, steps=5, symbols=3):
    return torch.randn(size, steps, symbols).log_softmax(2)


LABELS = [[1, 2], [1, 1], [2, 1], [2, 2]]


@pytest.mark.row("3.6")
def test_the_forward_algorithm_is_the_sum_over_all_paths():
    log_probs = random_log_probs(4)
    total = ctc_log_likelihood(log_probs, torch.tensor(LABELS))
    for got, table, labels in zip(total, log_probs, LABELS, strict=True):
        assert float(got) == pytest.approx(all_paths(table, labels), abs=1e-9)


@pytest.mark.row("3.6")
def test_labels_of_all_lengths_have_total_probability_one():
    log_probs = random_log_probs(1, steps=4)
    total = 0.0
    for length in range(5):
        for labels in itertools.product([1, 2], repeat=length):
            rows = torch.tensor(labels, dtype=torch.int64).reshape(1, length)
            total += float(ctc_log_likelihood(log_probs, rows).exp())
    assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.row("3.6")
def test_it_is_torchs_loss_in_value_and_gradient():
    log_probs = random_log_probs(3, steps=9, symbols=6)
    labels = torch.tensor([[1, 2, 2, 5], [4, 4, 1, 0], [3, 0, 0, 0]])
    steps, counts = torch.tensor([9, 8, 5]), torch.tensor([4, 3, 1])
    # torch's gradient is that of logits behind a log_softmax, so both are taken there
    logits = torch.randn_like(log_probs).requires_grad_()
    ours = ctc_log_likelihood(logits.log_softmax(2), labels, steps, counts)
    theirs = -torch.nn.functional.ctc_loss(
        logits.log_softmax(2).transpose(0, 1), labels, steps, counts, reduction="none"
    )
    assert torch.allclose(ours, theirs, atol=1e-9)
    one, other = (torch.autograd.grad(total.sum(), logits)[0] for total in (ours, theirs))
    assert torch.allclose(one, other, atol=1e-9)


@pytest.mark.row("3.6")
def test_its_pyro_program_enumerates_to_the_same():
    log_probs, labels = random_log_probs(1)[0], torch.tensor(LABELS)
    model = CTC(log_probs)
    bound = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda y: None, labels)
    assert bound == pytest.approx(float(model.log_evidence(labels).sum()), abs=1e-8)


def test_labels_that_no_path_gives_are_impossible():
    log_probs = random_log_probs(1, steps=2).requires_grad_()
    assert all_paths(log_probs.detach()[0], [1, 1]) == -np.inf
    assert ctc_log_likelihood(log_probs, torch.tensor([[1, 1]])).item() == -np.inf
    assert ctc_log_likelihood(log_probs, torch.tensor([[1, 2, 1]])).item() == -np.inf
    assert torch.isfinite(
        torch.autograd.grad(ctc_log_likelihood(log_probs, torch.tensor([[1]])).sum(), log_probs)[0]
    ).all()
    with pytest.raises(ValueError, match=r"log_probs \(N, T, V\)"):
        ctc_log_likelihood(log_probs[0], torch.tensor([[1]]))
