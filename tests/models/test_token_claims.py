"""What tokens know of each other and of their class, as differences of code lengths that are informations."""

import math

import pytest
import torch
from sklearn.metrics import mutual_info_score

from inference.codes import token_nll
from inference.token_statistics import adjacent_information
from models.tokens import MarkovTable, PositionTable


def rows(count, stay):
    """Rows of five bits that keep their value with probability ``stay``, the first one fair."""
    flips = (torch.rand(count, 1, 5) > stay).long()
    flips[:, :, 0] = torch.randint(2, (count, 1))
    return flips.cumsum(-1) % 2


@pytest.mark.row("0.38")
def test_independent_tokens_cost_held_out_data_the_information_between_neighbours():
    """Each of the four pairs costs log 2 - H(stay) more; of tokens that are independent, nothing."""
    for stay, exact in ((0.8, math.log(2) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2)), (0.5, 0.0)):
        train, test = rows(4000, stay), rows(4000, stay)
        information = adjacent_information(train, 2, torch.Generator().manual_seed(0))
        table, markov = PositionTable((1, 5), 2), MarkovTable((1, 5), 2)
        table.fit(train)
        markov.fit(train)
        extra = token_nll(table, test) - token_nll(markov, test)  # nats of each held-out row
        error = float(extra.std()) / math.sqrt(len(test))
        assert abs(float(extra.mean()) - 4 * exact) < 5 * error + 1e-3
        assert information.low < exact < information.high
        assert (information.low > 0) == (exact > 0)
        assert (float(extra.mean()) > 5 * error) == (exact > 0)


@pytest.mark.row("4.23")
def test_a_label_as_the_first_token_saves_what_it_tells_of_the_next():
    """One sequence of a label and tokens under one prior: given the label the tokens cost less, by I(label; first)."""
    labels = torch.randint(2, (3000, 1, 1))
    tokens = rows(3000, 0.7)
    copied = torch.rand(3000, 1, 1) < 0.8
    tokens = torch.where(copied, (tokens + tokens[:, :, :1] + labels) % 2, tokens)  # the first one is the label
    joint = torch.cat([labels, tokens], -1)  # (N, 1, 1 + 5)
    alone, prefixed, label = MarkovTable((1, 5), 2), MarkovTable((1, 6), 2), PositionTable((1, 1), 2)
    for prior, seen in ((alone, tokens), (prefixed, joint), (label, labels)):
        prior.fit(seen, smoothing=1e-9)
    given = token_nll(prefixed, joint) - token_nll(label, labels)
    saved = float((token_nll(alone, tokens) - given).mean())
    first = mutual_info_score(labels.flatten(), tokens[:, 0, 0])
    assert saved == pytest.approx(first, abs=1e-6)
    assert first > 0.1
