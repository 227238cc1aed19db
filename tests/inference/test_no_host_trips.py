"""A step's loss and gradient on a GPU neither read it nor bring anything to it: no recording could hold that.

Tensors on ``meta`` stand for a GPU's: they have no values that a program could ask for.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inference.assemble import assemble, start_from_data
from inference.capture import _without_waits
from inference.config import load
from inference.parameters import in_modules
from inference.particles import validation

SMALL = ("encoder.hidden=[8]", "decoder.hidden=[8]", "model.latent_dim=4")
RUNS = [
    ("guide=free", *SMALL),
    ("guide=semi_amortized", *SMALL),
    ("guide=iaf", "prior=spline", "objective=iwae", *SMALL),
    ("guide=mixture", "prior=vamp", "objective=combined", *SMALL),
    ("guide=bits", "prior=bits", "objective=elbo", "objective.gradient=relax", *SMALL),
    ("guide=concrete", "prior=bits", *SMALL),
    ("model=conditional", *SMALL),
    ("model=two_layer", "guide=ladder"),
    ("model=gmm_vae", "guide=clustering", "objective=trace_enum"),
    ("model=vq", "guide=quantized", "tokens=masked"),
    ("model=tabular", "guide=enumerated", "objective=trace_enum"),
]


class Trips(TorchDispatchMode):
    """Notes operations between host and device, and what is drawn on the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        places = {t.device.type for t in given if t.dim() > 0}  # a single number may come from anywhere,
        moved = {t.device.type for t in given} == {"cpu"}  # unless it is what is brought
        made = {t.device.type for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        noisy = torch.Tag.nondeterministic_seeded in func.tags and "cpu" in made
        if noisy or len(places | made) > 1 or (moved and "meta" in made):
            self.found.append(str(func))
        return result


def trips(model, guide, objective, x):
    parts = [part.to("meta") if isinstance(part, nn.Module) else part for part in (model, guide, objective)]
    x = x.to("meta")
    with validation(False), _without_waits(), Trips() as watch:
        loss = parts[2].differentiable_loss(*parts[:2], x)
        parameters = [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]
        torch.autograd.grad(loss, list(dict.fromkeys(parameters)), allow_unused=True)
    return watch.found


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
@in_modules()
def test_a_step_stays_on_the_device(words):
    setup = assemble(load([*words, "device=cpu"]))
    start_from_data(setup)
    x = setup.source("train").fixed(torch.arange(20))
    with validation(False):
        setup.objective.differentiable_loss(setup.model, setup.guide, x)
    assert trips(setup.model, setup.guide, setup.objective, x) == []


def test_trips_are_noticed():
    x = torch.ones(3, device="meta")
    with Trips() as watch:
        x * torch.tensor(2.0) + torch.ones(3).to(x)
        x * torch.rand(())
    assert watch.found == ["aten._to_copy.default", "aten.rand.default"]
    with pytest.raises(NotImplementedError):
        x[x > 0]
