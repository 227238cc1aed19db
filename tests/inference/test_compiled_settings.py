"""Numbers that programs find in settings around them may change: a compiled step never goes on with old ones."""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
from pyro import poutine
from torch import nn

from inference import compiled as compiled_module
from tests.inference.engines import PIXELS, batches, plain
from tests.inference.test_compiled import ours_is_pyros


@dataclass(frozen=True)
class Settings:
    beta: float = 1.0


class Namespace:
    beta = 1.0


namespace, simple, entries, settings = Namespace(), SimpleNamespace(beta=1.0), {"beta": 1.0}, Settings()
module = ModuleType("settings_of_a_script")
module.beta = 1.0


def annealed(x, beta):
    with pyro.plate("data", len(x)), poutine.scale(scale=beta):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(PIXELS)), 1.0).to_event(1), obs=x)


def by_object():
    def change(beta):
        namespace.beta = beta

    change(1.0)
    return lambda x: annealed(x, namespace.beta), change


def by_helper():
    return lambda x: annealed(x, helped()), by_namespace()[1]


def helped():
    return sum(simple.beta for _ in range(2)) / 2


def by_namespace():
    def change(beta):
        simple.beta = beta

    return lambda x: annealed(x, simple.beta), change


def by_class():
    def change(beta):
        Namespace.beta = beta

    return lambda x: annealed(x, Namespace.beta), change


def by_dictionary():
    return lambda x: annealed(x, entries["beta"]), lambda beta: entries.update(beta=beta)


def by_another_object():
    def change(beta):
        global settings
        settings = Settings(beta)

    return lambda x: annealed(x, settings.beta), change


def by_module():
    def change(beta):
        module.beta = beta

    return lambda x: annealed(x, module.beta), change


def by_enclosed_number():
    weight = 1.0

    def change(beta):
        nonlocal weight
        weight = beta

    return lambda x: annealed(x, weight), change


def by_enclosed_settings():
    own = {"beta": 1.0}
    return lambda x: annealed(x, own["beta"]), lambda beta: own.update(beta=beta)


def by_attribute():
    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.settings = {"beta": 1.0}

        def forward(self, x):
            annealed(x, self.settings["beta"])

    program = Program()
    return program, lambda beta: program.settings.update(beta=beta)


WAYS = [value for name, value in list(globals().items()) if name.startswith("by_")]


def trained(way, betas, made):
    def train(kind):
        (model, change), values = way(), []
        change(betas[0])
        svi = kind(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
        made.append(svi)
        for x, beta in zip(batches(len(betas)), betas, strict=True):
            change(beta)
            values.append(float(svi.step(x)))
        return svi, (torch.tensor(values), pyro.param("loc").detach())

    return train


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_settings_are_watched(way, monkeypatch):
    made = []
    ours_is_pyros(trained(way, [1.0, 1.0, 1.0, 0.5, 0.5, 1.0], made))
    assert len(made[-1]._graphs) == 2
    monkeypatch.setattr(compiled_module, "MAX_GRAPHS", 2)
    with pyro.settings.context(module_local_params=False):
        pyro.clear_param_store()
        trained(way, [0.1, 0.1, 0.2, 0.3, 0.4], made)(plain)
    name = "weight" if way is by_enclosed_number else "beta"
    assert f"'{name}' changes from step to step" in made[-1].why_eager


def test_large_dictionaries_and_expanded_tensors_are_no_settings():
    vocabulary, ones = {str(i): i for i in range(1000)}, torch.ones(1).expand(PIXELS)
    made = []
    way = lambda: (lambda x: annealed(x * ones, vocabulary["1"]), lambda beta: None)  # noqa: E731
    ours_is_pyros(trained(way, [1.0] * 4, made))
    assert len(made[-1]._places()) < 50
    assert "settings_of_a_script" not in sys.modules
