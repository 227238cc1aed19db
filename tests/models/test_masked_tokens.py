"""Masked-token models: every conditional of a known joint, orders in the mean, draws in a few passes."""

import itertools
import math

import pytest
import torch

from models.masked_tokens import MaskedTransformer

GRID, CODES = (1, 3), 2
GRIDS = torch.tensor(list(itertools.product(range(CODES), repeat=3))).reshape(8, *GRID)


def joint():
    """A table of p(z1, z2, z3) without independences."""
    return (0.7 * torch.randn(8, generator=torch.Generator().manual_seed(3))).softmax(0).reshape(2, 2, 2)


def conditionals(p):
    """Of each pattern of hidden places, the grid's own tokens given the visible ones: exact, ``(8,)`` each."""
    table = {}
    for pattern in itertools.product([False, True], repeat=3):
        hidden = [place for place in range(3) if pattern[place]]
        for place in hidden:
            others = [other for other in hidden if other != place]
            marginal = p.sum(dim=others, keepdim=True) if others else p
            given = marginal / marginal.sum(dim=place, keepdim=True)
            table[pattern, place] = given.expand(2, 2, 2).reshape(8)
    return table


@pytest.mark.row("0.40")
def test_trained_conditionals_are_those_of_the_joint():
    """Trained on the whole joint under every pattern of hidden places, of which training otherwise draws one."""
    p = joint()
    patterns = [pattern for pattern in itertools.product([False, True], repeat=3) if any(pattern)]
    hidden = torch.tensor(patterns).view(7, 1, *GRID).expand(-1, 8, -1, -1).flatten(0, 1)  # (56, 1, 3)
    grids = GRIDS.repeat(7, 1, 1)
    model = MaskedTransformer(GRID, CODES, width=16, layers=1, heads=2)

    def own():
        log_p = model.predict(grids, hidden, None).log_softmax(-1)
        return log_p.gather(-1, grids.unsqueeze(-1)).squeeze(-1)

    def worst():
        found = own().detach().exp().view(7, 8, 3)
        exact = conditionals(p)
        return max(float((found[patterns.index(at), :, place] - exact[at, place]).abs().max()) for at, place in exact)

    assert worst() > 0.1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(700):
        optimizer.param_groups[0]["lr"] = 1e-2 if step < 500 else 1e-3
        optimizer.zero_grad()
        (-(p.reshape(-1).repeat(7) * (own() * hidden).flatten(1).sum(1)).sum()).backward()
        optimizer.step()
    assert worst() < 0.02


def test_training_scores_the_mean_over_all_orders():
    model = MaskedTransformer(GRID, CODES, width=8, layers=1, heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    grid = GRIDS[5:6]

    def in_order(order):
        total, hidden = 0.0, torch.ones(1, *GRID, dtype=torch.bool)
        for place in order:
            log_p = model.predict(grid, hidden, None).log_softmax(-1)
            total += float(log_p[0, 0, place, grid[0, 0, place]])
            hidden[0, 0, place] = False
        return total

    torch.set_grad_enabled(False)
    every = [in_order(order) for order in itertools.permutations(range(3))]
    exact = sum(every) / 6
    draws = model().log_prob(grid.expand(40_000, -1, -1))
    raster = float(model.eval()().log_prob(grid))
    torch.set_grad_enabled(True)
    error = float(draws.std()) / math.sqrt(len(draws))
    assert abs(raster - exact) > 10 * error
    assert abs(float(draws.mean()) - exact) < 5 * error
    assert raster == pytest.approx(every[0], abs=1e-12)


def test_filling_in_one_token_a_pass_or_all_at_once():
    model = MaskedTransformer((2, 2), CODES, context_codes=2, width=8, layers=1, heads=2)
    context = torch.tensor([0, 1]).repeat(50)
    for steps in (1, 3, 4):
        tokens = model.fill(100, steps, context)
        assert tokens.shape == (100, 2, 2)
        assert tokens.dtype == torch.long
        assert set(tokens.unique().tolist()) == {0, 1}


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="multiple of heads"):
        MaskedTransformer(GRID, CODES, width=6, heads=4)
