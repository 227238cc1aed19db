"""The study of discrete latents, in small; the numbers of its own."""

import json
import math

import pytest
import torch

from guides.amortized import Amortized
from guides.discrete import BernoulliBits, OneHotCategoricals
from guides.enumerated import Enumerated
from inference.config import ConfigError
from inference.console import Quiet
from inference.particles import encode
from inference.stock import TraceEnum
from inference.studies import run_study
from inference.studies.discrete import active, enumerated_elbo, perplexity
from models.discrete import UniformOneHots
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli
from models.nets import Linear

TINY = ["trainer.steps=3", "evaluation.particles=4", "evaluation.draws=2", "encoder.hidden=[8]", "decoder.hidden=[8]"]


def test_it_compares_every_way_to_train_at_the_same_parameters(tmp_path):
    ways = ["study.estimators=[score,rebar,vimco,enumerated]", "study.bits=3"]
    small = ["study.variables=0", "study.data=10", "study.repeats=20", "study.jobs=1", f"run.dir={tmp_path / 's'}"]
    page = run_study(["discrete", *TINY, *ways, *small], Quiet())
    rows = {row["estimator"]: row for row in json.loads((tmp_path / "s" / "table.json").read_text())}
    assert list(rows) == ["score", "rebar", "vimco", "enumerated"]
    assert rows["enumerated"]["variance"] < 1e-9 < rows["rebar"]["variance"] < rows["score"]["variance"]
    assert abs(rows["enumerated"]["squared_bias"]) < 1e-4
    assert abs(rows["rebar"]["squared_bias"]) < 5 * rows["rebar"]["squared_bias_stderr"]
    assert rows["vimco"]["squared_bias"] is None
    for row in rows.values():
        assert row["test/nll"] < -row["test/elbo"] + 1
        assert 1 <= row["perplexity"] <= 2
        assert 0 <= row["active_codes"] <= 3
    text = page.read_text()
    assert text.count("<img") == 1
    assert "exact enumeration" in text
    best = min(rows.values(), key=lambda row: row["test/nll"])
    assert f"−{best['test/nll']:.2f}\u202f±\u202f{best['test/nll_stderr']:.2f}" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["study.estimators=[reinforce]"], "no reinforce; accepted: score, "),
        (["study.estimators=[arm]"], "study.at=rebar is none of study.estimators: arm"),
        (["study.bits=0", "study.variables=0"], "above 0"),
    ],
)
def test_a_bad_comparison_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_study(["discrete", *options, f"run.dir={tmp_path}"], Quiet())


def test_the_bound_by_summing_over_states_is_that_of_pyro():
    model = LatentVariableModel(UniformOneHots((2, 3)), Bernoulli((5,), (2, 3), Linear))
    guide = Amortized(OneHotCategoricals((2, 3), (5,), Linear))
    x = torch.randint(0, 2, (4, 5)).double()
    bound = enumerated_elbo(model, encode(guide, x)["z"], x).sum()
    loss = TraceEnum(max_plate_nesting=1).differentiable_loss(model, Enumerated(guide.core), x)
    assert float(bound.detach()) == pytest.approx(-float(loss.detach()), abs=1e-10)


def test_codes_are_counted_over_the_data():
    guide = Amortized(BernoulliBits((3,), (1,), Linear))
    net = guide.core.net.output
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[200.0], [0.0], [0.0]]))
        net.bias.copy_(torch.tensor([0.0, 0.0, -200.0]))
    x = torch.tensor([[1.0], [-1.0]])  # the first bit tells them apart, the second is a coin, the third is never set
    assert perplexity(guide, x) == pytest.approx((2 + 2 + 1) / 3)
    assert active(guide, x) == 1
    assert active(guide, x[:1]) == 0
    assert math.isfinite(perplexity(guide, x[:1]))
