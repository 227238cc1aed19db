"""Optimizers of Pyro and torch take the same steps in a compiled graph: parameters after 20 of them, at equal noise."""

import pyro.infer
import pyro.optim
import pytest
import torch

from tests.inference.engines import batches, losses, plain
from tests.inference.test_compiled import StockVAE, ours_is_pyros

OPTIMIZERS = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.05}),
    "amsgrad": lambda: pyro.optim.Adam({"lr": 0.05, "amsgrad": True, "betas": (0.5, 0.7)}),
    "maximize": lambda: pyro.optim.Adam({"lr": 0.01, "maximize": True, "weight_decay": 0.1}),
    "clipped adam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9, "clip_norm": 0.2}),
    "centered": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "centered_variance": True, "weight_decay": 0.1}),
    "clip norm": lambda: pyro.optim.Adam({"lr": 0.05}, {"clip_norm": 0.3}),
    "clip value": lambda: pyro.optim.SGD({"lr": 0.01}, {"clip_value": 0.2}),
    "clip both": lambda: pyro.optim.SGD({"lr": 0.01}, {"clip_norm": 0.5, "clip_value": 0.2}),
    "clip by name": lambda: pyro.optim.SGD({"lr": 0.01}, lambda module, name: CLIPS[name.split(".")[-1]]),
    "options by name": lambda: pyro.optim.Adam(lambda name: {"lr": 0.05 if "bias" in name else 0.01}),
    "rmsprop": lambda: pyro.optim.RMSprop({"lr": 0.01}),
    "rmsprop centered": lambda: pyro.optim.RMSprop({"lr": 0.01, "centered": True, "weight_decay": 0.1}),
    "rmsprop momentum": lambda: pyro.optim.RMSprop({"lr": 0.01, "momentum": 0.9, "alpha": 0.9}),
    "nesterov": lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "radam": lambda: pyro.optim.RAdam({"lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.9)}),
    "radam decoupled": lambda: pyro.optim.RAdam({"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "nadam": lambda: pyro.optim.NAdam({"lr": 0.05, "weight_decay": 0.1}),
    "exponential": lambda: pyro.optim.ExponentialLR(scheduled(gamma=0.8)),
    "step": lambda: pyro.optim.StepLR(scheduled(step_size=2, gamma=0.5)),
    "lambda": lambda: pyro.optim.LambdaLR(scheduled(lr_lambda=lambda epoch: 1 / (1 + epoch))),
    "plateau": lambda: pyro.optim.ReduceLROnPlateau(scheduled(patience=0, factor=0.5)),
    "one cycle": lambda: pyro.optim.OneCycleLR(scheduled(max_lr=0.1, total_steps=30, cycle_momentum=False)),
}
CLIPS = {"weight": {"clip_norm": 0.3}, "bias": {"clip_value": 0.1}}


def scheduled(**options):
    return {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, **options}


def trained(make, made):
    def train(kind):
        vae, optimizer = StockVAE(), make()
        svi = kind(vae.model, vae.guide, optimizer, pyro.infer.Trace_ELBO())
        made.append((svi, torch.cat([p.detach().flatten() for p in vae.parameters()])))
        values = []
        for epoch in range(4):
            values.append(losses(svi, batches(5), seed=epoch))
            if isinstance(optimizer, pyro.optim.PyroLRScheduler):
                plateau = type(next(iter(optimizer.optim_objs.values()))).__name__ == "ReduceLROnPlateau"
                optimizer.step(*([1.0] if plateau else []))  # a loss that no longer falls
        return svi, (torch.cat(values), torch.cat([p.detach().flatten() for p in vae.parameters()]))

    return train


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps_are_pyros(name):
    made = []
    assert ours_is_pyros(trained(OPTIMIZERS[name], made)) > 0
    svi, before = made[-1]
    after = torch.cat([p.detach().flatten() for p in svi.optim.optim_objs])
    assert len(svi._graphs) == 1
    assert after.shape == before.shape


def test_a_schedule_of_the_momentum_runs_eagerly():
    made = []
    train = trained(lambda: pyro.optim.OneCycleLR(scheduled(max_lr=0.1, total_steps=30)), made)
    with pyro.settings.context(module_local_params=False):
        train(plain)
    assert made[0][0].why_eager == "OneCycleLR with cycle_momentum changes more than the learning rate"
