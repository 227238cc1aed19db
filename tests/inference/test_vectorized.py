"""Runs that train together end as if each had been alone."""

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from inference.annealing import AnnealedELBO, BetaELBO
from inference.compiled import CompiledSVI
from inference.engine import SVI
from inference.objectives import ELBO, IWAE
from inference.particles import validation
from inference.vectorized import VectorizedSVI
from tests.inference.engines import PIXELS, batches, losses, pair, parameters, shared, vae_svi

RUNS = 3


class Relaxed(nn.Module):
    """A guide and a model with a relaxed latent, at a temperature that is a plain number."""

    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature
        self.net = nn.Linear(PIXELS, 2)

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            temperature = torch.tensor(self.temperature)
            pyro.sample("z", dist.RelaxedBernoulli(temperature, logits=self.net(x)).to_event(1))


class RelaxedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, PIXELS)

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            prior = dist.RelaxedBernoulli(torch.tensor(0.5), logits=x.new_zeros(2)).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)


def relaxed(kind, run):
    torch.manual_seed(run)
    model, guide = RelaxedModel(), Relaxed(0.3 + 0.2 * run)
    return kind(model, guide, shared(model, guide), ELBO())


GRIDS = {
    "seed": lambda kind, run: vae_svi(kind, ELBO(), seed=run),
    "seed, particles": lambda kind, run: vae_svi(kind, IWAE(3), seed=run),
    "weight": lambda kind, run: vae_svi(kind, BetaELBO(0.5 + run)),
    "annealed weight": lambda kind, run: vae_svi(kind, AnnealedELBO(0.2 + 0.3 * run)),
    "clipped": lambda kind, run: vae_svi(kind, ELBO(), seed=run, clip=0.2),
    "temperature": relaxed,
}


def train_together(make, xs, seed=1, inductor=False, batch_size=None, mapped=None):
    runs = [make(CompiledSVI, run) for run in range(RUNS)]
    generators = [torch.Generator().manual_seed(seed + run) for run in range(RUNS)]
    together = VectorizedSVI(runs, generators, batch_size, inductor, mapped)
    found = []
    with validation(False):
        for i, x in enumerate(xs):
            for number, run in enumerate(runs):
                run.at(i / len(xs))
                run.optim.set_learning_rate(0.05 / (1 + i + number))
            found.append(together.step([x.roll(number, 0) for number in range(RUNS)]))
    return together, torch.stack(found, 1)


def train_alone(make, xs, seed=1):
    runs, found = [], []
    for number in range(RUNS):
        runs.append(make(SVI, number))
        rates = [0.05 / (1 + i + number) for i in range(len(xs))]
        found.append(losses(runs[-1], [x.roll(number, 0) for x in xs], seed + number, rates))
    return runs, torch.stack(found)


def check(together, found, alone, expected, tolerance=1e-10):
    assert together.why_eager is None
    assert together._together is not None
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    for run, other in zip(together.runs, alone, strict=True):
        torch.testing.assert_close(parameters(run), parameters(other), rtol=tolerance, atol=tolerance)
        for name, tensor in other.optim.tensors().items():
            torch.testing.assert_close(run.optim.tensors()[name], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("mapped", [True, False])
def test_runs_end_as_if_alone(grid, mapped):
    xs = batches(5)
    together, found = train_together(GRIDS[grid], xs, mapped=mapped)
    alone, expected = train_alone(GRIDS[grid], xs)
    check(together, found, alone, expected)
    assert (train_alone(GRIDS[grid], xs, seed=2)[1] - expected).abs().max() > 1e-3
    assert (expected[1:] - expected[:-1]).abs().min() > 1e-6  # the runs are not the same run


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("mapped", [True, False])
def test_compiled_by_inductor(dtype, tolerance, mapped):
    torch.set_default_dtype(dtype)
    xs = batches(5)
    together, found = train_together(GRIDS["weight"], xs, inductor=True, mapped=mapped)
    check(together, found, *train_alone(GRIDS["weight"], xs), tolerance)


def test_batches_of_another_size_step_one_run_after_another():
    xs = [*batches(4, last=3), *batches(2, last=1)]
    together, found = train_together(GRIDS["seed"], xs, batch_size=4)
    check(together, found, *train_alone(GRIDS["seed"], xs))


def test_a_run_taken_out_continues_alone():
    xs = batches(6)
    together, _ = train_together(GRIDS["seed"], xs[:3])
    alone, _ = train_alone(GRIDS["seed"], xs[:3])
    expected = losses(alone[1], xs[3:], seed=9)
    torch.testing.assert_close(losses(together.runs[1], xs[3:], seed=9), expected, rtol=1e-9, atol=0)


def test_a_loaded_checkpoint_is_continued():
    xs = batches(8)
    together, _ = train_together(GRIDS["seed"], xs[:4])
    run = together.runs[1]
    kept = {name: tensor.clone() for name, tensor in run.optim.tensors().items()}
    programs = [{k: t.clone() for k, t in p.state_dict().items()} for p in (run.model, run.guide)]
    noise = [generator.get_state() for generator in together.generators]

    def proceed():
        with validation(False):
            return torch.stack([together.step([x] * RUNS) for x in xs[4:]], 1)[1]

    expected = proceed()
    for program, state in zip((run.model, run.guide), programs, strict=True):
        program.load_state_dict(state)
    run.optim.load_tensors(kept)
    for generator, state in zip(together.generators, noise, strict=True):
        generator.set_state(state)
    torch.testing.assert_close(proceed(), expected, rtol=1e-10, atol=0)
    assert together.why_eager is None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda kind, run: vae_svi(kind, IWAE(2 + run)), "differ"),
        (lambda kind, run: vae_svi(kind, BetaELBO(1.0) if run else ELBO()), "differ"),
        (
            lambda kind, run: vae_svi(
                kind, ELBO(), factory=lambda ps, lr: torch.optim.Adam(ps, lr, (0.5 + run / 10, 0.9))
            ),
            "differ in more than their learning rates",
        ),
    ],
)
def test_runs_that_differ_otherwise_step_one_after_another_and_say_why(make, reason, caplog):
    xs = batches(3)
    with caplog.at_level(logging.WARNING, "inference"):
        together, found = train_together(make, xs)
    assert reason in together.why_eager
    assert len([record for record in caplog.records if record.name == "inference.vectorized"]) == 1
    torch.testing.assert_close(found, train_alone(make, xs)[1], rtol=1e-10, atol=0)


def test_one_generator_for_each_run():
    model, guide = pair()
    svi = CompiledSVI(model, guide, shared(model, guide), ELBO())
    with pytest.raises(ValueError, match="a generator for each: 1 and 0 given"):
        VectorizedSVI([svi], [])
