"""Information between neighbours, and classifiers trained on pictures of several kinds."""

import math

import pytest
import torch
from sklearn.metrics import mutual_info_score

from inference.token_statistics import adjacent_information, classification_accuracy, mean_squared_error


def chain(count, stay):
    """Grids of 2x5 bits whose rows are Markov chains that keep their value with probability ``stay``."""
    flips = (torch.rand(count, 2, 5) > stay).long()
    flips[:, :, 0] = torch.randint(2, (count, 2))
    return flips.cumsum(-1) % 2


def test_information_of_a_known_chain():
    tokens = chain(4000, 0.8)
    exact = math.log(2) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2)
    found = adjacent_information(tokens, 2, torch.Generator().manual_seed(0))
    assert found.low > 0.1
    assert found.low < exact < found.high
    assert found.high - found.low < 0.1 * exact
    plug_in = [mutual_info_score(tokens[:, r, c], tokens[:, r, c + 1]) for r in range(2) for c in range(4)]
    assert found.value == pytest.approx(sum(plug_in) / 8, abs=1e-3)


def test_independent_tokens_share_nothing_even_where_places_differ():
    """In few data relative frequencies find information where there is none; so do places of different habits."""
    tokens = torch.multinomial(torch.softmax(torch.randn(12, 30), -1), 60, replacement=True).T.reshape(60, 3, 4)
    naive = sum(mutual_info_score(tokens[:, r, c], tokens[:, r, c + 1]) for r in range(3) for c in range(3)) / 9
    assert naive > 0.5
    found = adjacent_information(tokens, 30, torch.Generator().manual_seed(0))
    assert found.low < 0 < found.high


def test_the_interval_covers():
    exact = math.log(2) + 0.7 * math.log(0.7) + 0.3 * math.log(0.3)
    hits = []
    for _ in range(30):
        found = adjacent_information(chain(400, 0.7), 2)
        hits.append(found.low < exact < found.high)
    assert sum(hits) >= 22  # 28.5 expected; five standard errors


def test_too_small_grids_are_refused():
    with pytest.raises(ValueError, match="two places"):
        adjacent_information(torch.zeros(100, 1, 1, dtype=torch.long), 2)
    assert adjacent_information(torch.randint(2, (100, 3, 1)), 2).high < 0.1


def test_accuracy_falls_with_the_quality_of_the_pictures():
    means = torch.rand(4, 1, 4, 4)
    labels = torch.arange(800) % 4

    def pictures(noise, names=labels):
        return (means[names] + noise * torch.randn(800, 1, 4, 4)), labels

    test = pictures(0.2)
    good, poor = (classification_accuracy(pictures(noise), test, steps=150) for noise in (0.2, 2.0))
    wrong = classification_accuracy(pictures(0.2, labels[torch.randperm(800)]), test, steps=150)
    assert good > 0.9
    assert good > poor + 0.02
    assert poor > wrong
    assert abs(wrong - 0.25) < 0.2
    assert classification_accuracy(pictures(0.2), test, steps=150) > 0.9


def test_squared_errors_are_of_a_range_of_one():
    a, b = torch.zeros(3, 1, 2, 2), 8 * torch.ones(3, 1, 2, 2)
    assert mean_squared_error([a[:1], a[1:]], [b[:1], b[1:]], 16.0) == 0.25
