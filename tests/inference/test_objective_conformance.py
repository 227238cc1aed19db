"""Every objective by its word, with every gradient, for a normal and a discrete guide: it trains, or says why not."""

import inspect
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference import checkpoint
from inference.annealing import AnnealedELBO
from inference.catalog import CATALOG
from inference.config import load
from inference.console import Console
from inference.engine import SVI, SharedOptimizer
from inference.experiment import train
from inference.objectives import ELBO, GRADIENTS, IWAE, Objective
from inference.particles import StructureError
from models import likelihoods
from models.latent import LatentVariableModel
from models.nets import MLP
from models.priors import LearnedNormal

# Pyro's own take no gradient estimator, and neither do objectives that are about one kind of latent.
WORDS = [word for word, factory in CATALOG["objective"].items() if "gradient" in inspect.signature(factory).parameters]
SMALL = {"particles": 4, "groups": 2, "partitions": 2}
GUIDES = ("normal", "bits")
NEEDS_BITS = {"muprop", "rebar", "relax", "arm"}
NEEDS_PATH = {"reparameterized", "stl", "dreg"}
MEANS = {"elbo", "beta", "annealed", "infovae", "combined"}  # of the draws, by a Monte-Carlo KL


class BitsModel(PyroModule):
    def __init__(self):
        super().__init__()
        self.prior = nn.Parameter(torch.zeros(2))
        self.net = nn.Linear(2, 5)

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)


class BitsGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 2)

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=self.net(x)).to_event(1))


def programs(kind):
    if kind == "bits":
        return BitsModel(), BitsGuide()
    net = lambda i, o: MLP(i, o, (4,))  # noqa: E731
    model = LatentVariableModel(LearnedNormal((2,)), likelihoods.Bernoulli((5,), (2,), net))
    return model, Amortized(DiagonalNormal((2,), (5,), net))


def make(word, gradient, **options):
    factory = CATALOG["objective"][word]
    taken = inspect.signature(factory).parameters
    small = {name: value for name, value in SMALL.items() if name in taken}
    objective = factory(**{**small, **options}, gradient=gradient)
    objective.prepare((5,), (2,))
    return objective


def accepted(word, gradient, kind):
    """Which pairs are valid, stated here once more."""
    if word == "wake_sleep":
        return gradient == "weighted" or (gradient == "dreg" and kind == "normal")
    if gradient == "weighted":
        return False
    if gradient == "covariance":
        return word == "tvo"
    if gradient in (NEEDS_PATH if kind == "bits" else NEEDS_BITS):
        return False
    if gradient == "stl":
        return word in MEANS
    if gradient == "dreg":
        return word in MEANS | {"iwae", "renyi", "miwae", "ciwae", "piwae"}
    if word == "infovae":
        return gradient == "reparameterized"
    if gradient == "loo":
        return word in MEANS | {"free_bits"}
    if gradient in ("vimco", "vimco_arithmetic"):
        return word not in MEANS | {"free_bits"}
    return gradient != "nvil_normalized" or word in MEANS


def two_steps(objective, kind):
    """Names of the parameters with a finite gradient at every step, and of all."""
    model, guide = programs(kind)
    x = torch.randint(0, 2, (6, 5)).double()
    parts = nn.ModuleDict({"model": model, "guide": guide, "objective": objective})
    optimizer = SharedOptimizer(parts.parameters(), torch.optim.Adam, 0.01)
    svi = SVI(model, guide, optimizer, objective)
    names = set(dict(parts.named_parameters()))
    for progress in (0.0, 0.5):
        svi.at(progress)
        loss = svi.loss_and_grads(model, guide, x)
        assert loss.isfinite()
        names &= {n for n, p in parts.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
        optimizer(batch_size=6)
        optimizer.zero_grad()
    return names, set(dict(parts.named_parameters()))


@pytest.mark.row("5.7")
@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("gradient", [*GRADIENTS, "weighted"])
@pytest.mark.parametrize("word", WORDS)
def test_it_trains_or_says_why_not(word, gradient, kind):
    if not accepted(word, gradient, kind):
        with pytest.raises(ValueError) as refusal:
            two_steps(make(word, gradient), kind)
        assert len(str(refusal.value)) > 40
        assert "\n" not in str(refusal.value)
        return
    trained, every = two_steps(make(word, gradient), kind)
    assert trained == every
    assert len(every) >= 5


def test_the_default_of_every_objective_trains_on_a_normal_guide():
    for word in WORDS:
        objective = CATALOG["objective"][word]()
        objective.prepare((5,))
        trained, every = two_steps(objective, "normal")
        assert trained == every, word


@pytest.mark.parametrize("word", ["wake_sleep"])
@pytest.mark.parametrize("phase", ["sleep", "both"])
@pytest.mark.parametrize("kind", GUIDES)
def test_the_other_phases_train_too(word, phase, kind):
    trained, every = two_steps(make(word, "weighted", phase=phase), kind)
    assert trained == every


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("word", WORDS)
def test_without_gradients_nothing_is_remembered_and_the_loss_is_minus_the_bound(word, kind):
    gradient = inspect.signature(CATALOG["objective"][word]).parameters["gradient"].default
    gradient = "score_average" if gradient == "reparameterized" and word != "infovae" else gradient
    if word == "infovae" and kind == "bits":
        return
    objective, (model, guide) = make(word, gradient), programs(kind)
    x = torch.randint(0, 2, (6, 5)).double()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    torch.manual_seed(0)
    loss = objective.loss(model, guide, x)
    assert not loss.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    torch.manual_seed(0)
    bound = objective.bound(model, guide, x)
    assert bound.shape == (6,)
    torch.testing.assert_close(-bound.sum().detach(), loss)


# --- In other people's hands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["elbo", "iwae", "piwae"])
def test_pyros_own_svi_trains_model_guide_and_baseline(word):
    """Both programs call their net ``net``, which Pyro's SVI would take for one."""
    objective = make(word, "nvil")
    model, guide = programs("bits")
    parts = nn.ModuleDict({"model": model, "guide": guide, "objective": objective})
    before = {name: p.detach().clone() for name, p in parts.named_parameters()}
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=objective)
    for _ in range(2):
        svi.step(torch.randint(0, 2, (6, 5)).double())
    assert any("baseline" not in name and name.startswith("objective") for name in before)
    for name, parameter in parts.named_parameters():
        assert not torch.equal(parameter, before[name]), name


class ConstrainedGuide(PyroModule):
    """With a parameter under one of Pyro's constraints."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 2)
        self.scale = PyroParam(torch.ones(2), dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.net(x), self.scale).to_event(1))


@pytest.mark.parametrize("gradient", ["reparameterized", "stl", "dreg"])
def test_pyros_own_svi_trains_a_guide_that_scores_twice(gradient):
    model, _ = programs("normal")
    guide = ConstrainedGuide()
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=ELBO(2, gradient=gradient))
    svi.step(torch.rand(6, 5).round())
    for name, parameter in guide.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_an_elbo_module_owns_the_parameters_of_a_baseline():
    objective = make("elbo", "nvil")
    module = objective(*programs("bits"))
    assert {f"elbo.{name}" for name, _ in objective.named_parameters()} < set(dict(module.named_parameters()))
    module(torch.ones(6, 5)).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_one_estimator_can_be_shared_by_instance():
    estimator = GRADIENTS["score_average"](decay=0.5)
    first, second = ELBO(gradient=estimator), IWAE(3, gradient=estimator)
    assert first.gradient is second.gradient is estimator


class Doubled(Objective):
    """Somebody else's: from log-weights to a number per datum."""

    def combine(self, contributions):
        return 2 * contributions.logsumexp(0) - 2 * math.log(len(contributions))


@pytest.mark.parametrize("gradient", ["reparameterized", "score", "vimco"])
def test_an_objective_from_elsewhere_defines_one_line(gradient):
    trained, every = two_steps(Doubled(3, gradient=gradient), "normal")
    assert trained == every
    with pytest.raises(StructureError, match="no doubly reparameterized gradient of Doubled"):
        two_steps(Doubled(3, gradient="dreg"), "normal")


# --- In a run ----------------------------------------------------------------------------------------------------


def run(tmp_path, *options):
    arguments = ["trainer.steps=6", "trainer.log_every=2", "evaluation.particles=2", "evaluation.data=8"]
    config = load([*arguments, f"run.dir={tmp_path / 'run'}", "model.latent_dim=2", *options])
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return train(config, Console())
    finally:
        torch.set_default_dtype(dtype)


def test_a_run_keeps_what_its_objective_learns_and_remembers(tmp_path):
    folder = run(tmp_path, "objective=elbo", "objective.gradient=nvil")
    tensors, _ = checkpoint.load(folder / "checkpoint")
    kept = checkpoint.under("objective", tensors)
    assert float(kept["gradient.weight"]) > 0.4  # 1 - 0.9^6
    assert kept["gradient.net.net.1.weight"].shape == (100, 64)
    fresh = ELBO(gradient="nvil")
    fresh.prepare((1, 8, 8))
    fresh.load_state_dict(kept)
    assert float(fresh.gradient.average()) < -10


@pytest.mark.parametrize("gradient", ["rebar", "relax"])
def test_a_run_keeps_the_control_variate_that_it_learns(tmp_path, gradient):
    words = ["prior=bits", "guide=bits", "objective=elbo", f"objective.gradient={gradient}"]
    tensors, _ = checkpoint.load(run(tmp_path, *words) / "checkpoint")
    kept = checkpoint.under("objective", tensors)
    assert abs(float(kept["gradient.control.scale"]) - 1) > 1e-3
    fresh = ELBO(gradient=gradient)
    fresh.prepare((1, 8, 8), (2,))
    fresh.load_state_dict(kept)
    temperature, scale = fresh.gradient.control()
    assert float(scale.detach()) == pytest.approx(float(kept["gradient.control.scale"]))
    assert abs(float(temperature.detach()) - 0.5) > 1e-4


def test_a_run_says_in_each_row_what_the_weight_of_an_annealed_kl_is(tmp_path):
    folder = run(tmp_path, "objective=annealed", "objective.warmup=0.5")
    from inference.log import read_rows

    weights = [row["train/kl_weight"] for row in read_rows(folder / "metrics.jsonl")]
    assert weights[0] < 1
    assert weights[-1] == 1
    assert isinstance(CATALOG["objective"]["annealed"](), AnnealedELBO)
