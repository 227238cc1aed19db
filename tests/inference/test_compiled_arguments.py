"""Numbers among the arguments of a compiled step may change as in Pyro."""

import logging
import math

import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
from pyro import poutine

from inference import compiled as compiled_module
from tests.inference.engines import batches, plain
from tests.inference.test_compiled import PIXELS, StockVAE, ours_is_pyros


class Annealed(StockVAE):
    """Pyro's idiom: both programs scale the latent's density by a number that is an argument."""

    def __init__(self, of=lambda beta: beta):
        super().__init__()
        self.of = of

    def model(self, x, beta):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=self.of(beta)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x, beta):
        with poutine.scale(scale=self.of(beta)):
            super().guide(x)


def trained(of, betas, loss=pyro.infer.Trace_ELBO, named=False):
    """``train(kind)`` of :func:`ours_is_pyros`, with a beta for each step."""

    def train(kind):
        pyro.clear_param_store()
        vae, values = Annealed(of), []
        svi = kind(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), loss())
        for x, beta in zip(batches(len(betas)), betas, strict=True):
            values.append(float(svi.step(x, beta=beta) if named else svi.step(x, beta)))
        made.append(svi)
        return svi, (torch.tensor(values), torch.cat([p.detach().flatten() for p in vae.parameters()]))

    made = []
    return train, made


@pytest.mark.parametrize("loss", [pyro.infer.Trace_ELBO, pyro.infer.TraceMeanField_ELBO])
@pytest.mark.parametrize("named", [False, True])
def test_fifty_values_are_one_graph(loss, named):
    betas = [(step + 1) / 50 for step in range(50)]
    train, made = trained(lambda beta: beta, betas, loss, named)
    assert ours_is_pyros(train) > 0
    assert len(made[-1]._graphs) == 1
    other, _ = trained(lambda beta: beta, betas[::-1], loss)
    torch.manual_seed(0)
    with pyro.settings.context(module_local_params=False):
        assert (other(pyro.infer.SVI)[1][0] - train(pyro.infer.SVI)[1][0]).abs().max() > 1e-3


def test_a_float_that_stays_is_a_constant_until_it_changes():
    train, made = trained(lambda beta: beta, [0.5] * 4 + [0.6, 0.7, 0.7, 0.8, 1])
    assert ours_is_pyros(train) > 0
    assert [len([leaf for leaf in key[1] if leaf is float]) for key in made[-1]._graphs] == [0, 1, 0]


PLAIN = {
    "branch": (lambda beta: beta if beta > 0.5 else 0.1, "needs a tensor's value on the host"),
    "math": (lambda beta: 1 + math.log(1 + beta), "needs a tensor's value on the host"),
    "float": (lambda beta: float(beta), "needs a tensor's value on the host"),
    "list": (lambda beta: torch.tensor([1.0, beta])[1], "its operations differ from call to call"),
    "type": (lambda beta: beta if isinstance(beta, float) else range(beta), "can be converted to an index"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_where_the_program_needs_the_number_there_is_a_graph_for_each_value(name, monkeypatch, caplog):
    of, reason = PLAIN[name]
    with caplog.at_level(logging.INFO, "inference"):
        train, made = trained(of, [0.2, 0.4, 0.6, 0.6, 0.4, 0.8])
        assert ours_is_pyros(train) > 0
    assert len(made[-1]._graphs) == 3
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("a graph for each value of argument 2: ")
    assert reason in said
    monkeypatch.setattr(compiled_module, "MAX_GRAPHS", 3)
    train, made = trained(of, [0.2, 0.4, 0.6, 0.8, 1.0], named=True)
    with pyro.settings.context(module_local_params=False):
        train(plain)
    assert made[-1].why_eager.startswith("argument 'beta' changes from step to step: ")
    assert reason in made[-1].why_eager


def test_integers_are_constants(monkeypatch):
    monkeypatch.setattr(compiled_module, "MAX_GRAPHS", 3)
    train, made = trained(lambda beta: beta, [1, 2, 3, 4, 5, 6])
    with pyro.settings.context(module_local_params=False):
        train(plain)
    assert made[-1].why_eager.startswith("argument 2 changes from step to step: what is neither")


def test_steps_without_arguments():
    data = batches(1)[0]

    def train(kind):
        loc = torch.nn.Parameter(torch.zeros(PIXELS))

        def model():
            mean = pyro.param("loc", loc)
            with pyro.plate("data", len(data)):
                pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=data)

        svi = kind(model, lambda: None, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
        return svi, (torch.tensor([float(svi.step()) for _ in range(5)]), pyro.param("loc").detach())

    assert ours_is_pyros(train) > 0
