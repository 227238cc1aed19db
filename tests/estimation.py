"""Two models small enough to know every gradient exactly, with parameters of its own for each datum.

As no two data share a parameter, one backward pass gives as many independent draws of the gradient as there are rows:
means, standard errors and variances of estimators come from a single step. The exact gradients are differentiated sums
over all states, or Gauss-Hermite sums, written here and independent of the packages under test.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn


def _rows(values, count):
    return nn.Parameter(torch.tensor(values).expand(count, *torch.tensor(values).shape).clone())


class _PerDatum(PyroModule):
    """Parameters ``(N, *shape)``, the same in each row."""

    def __init__(self, count, **values):
        super().__init__()
        for name, value in values.items():
            setattr(self, name, _rows(value, count))


# --- Two bits behind three pixels -------------------------------------------------------------------------------

BITS = {
    "model": {
        "prior": [0.4, -0.7],
        "weight": [[1.5, -0.4], [-1.0, 0.8], [0.3, 1.2]],
        "bias": [-0.3, 0.2, -0.5],
    },
    "guide": {"base": [1.9, -0.2], "slope": [[0.4, -0.8, 0.3], [0.9, 0.2, -0.5]]},
    "x": [1.0, 0.0, 1.0],
}


class BitsModel(_PerDatum):
    """z ~ Bernoulli(prior), x ~ Bernoulli(weight z + bias)."""

    def __init__(self, count):
        super().__init__(count, **BITS["model"])

    def forward(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior).to_event(1))
            logits = torch.einsum("npb,...nb->...np", self.weight, z) + self.bias
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class BitsGuide(_PerDatum):
    """z ~ Bernoulli(base + slope x)."""

    def __init__(self, count):
        super().__init__(count, **BITS["guide"])

    def forward(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            logits = self.base + torch.einsum("nbp,np->nb", self.slope, x)
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))


# --- Two one-hot vectors of three classes behind three pixels ----------------------------------------------------

CLASSES = {
    "model": {
        "prior": [[0.4, -0.7, 0.1], [0.0, 0.5, -0.3]],
        "weight": [[[1.5, -0.4, 0.2], [-0.6, 0.3, 0.9]], [[-1.0, 0.8, 0.5], [0.2, -1.1, 0.4]], [[0.3, 1.2, -0.8]] * 2],
        "bias": [-0.3, 0.2, -0.5],
    },
    "guide": {
        "base": [[1.2, -0.2, 0.1], [-0.5, 0.6, 0.3]],
        "slope": [[[0.4, -0.8, 0.3], [0.9, 0.2, -0.5]], [[0.1, 0.2, -0.4], [0.5, 0.3, 0.2]], [[-0.3, 0.1, 0.6]] * 2],
    },
    "x": [1.0, 0.0, 1.0],
}


class ClassesModel(_PerDatum):
    """z ~ two categoricals (prior), x ~ Bernoulli(weight z + bias)."""

    def __init__(self, count):
        super().__init__(count, **CLASSES["model"])

    def forward(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.OneHotCategorical(logits=self.prior).to_event(1))
            logits = torch.einsum("npvc,...nvc->...np", self.weight, z) + self.bias
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class ClassesGuide(_PerDatum):
    """z ~ two categoricals (base + slope x)."""

    def __init__(self, count):
        super().__init__(count, **CLASSES["guide"])

    def forward(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            logits = self.base + torch.einsum("npvc,np->nvc", self.slope, x)
            pyro.sample("z", dist.OneHotCategorical(logits=logits).to_event(1))


# --- One normal latent behind two numbers -----------------------------------------------------------------------

NORMAL = {
    "model": {"loc": 0.3, "log_scale": -0.2, "weight": [1.2, -0.7], "bias": [0.1, 0.4], "log_noise": -0.3},
    "guide": {"base": 0.2, "slope": [0.3, -0.1], "log_scale": -0.4},
    "x": [0.9, -0.6],
}


class NormalModel(_PerDatum):
    """z ~ N(loc, scale^2), x ~ N(weight z + bias, noise^2)."""

    def __init__(self, count):
        super().__init__(count, **NORMAL["model"])

    def forward(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()))
            mean = self.weight * z.unsqueeze(-1) + self.bias
            pyro.sample("x", dist.Normal(mean, self.log_noise.exp().unsqueeze(-1)).to_event(1), obs=x)


class NormalGuide(_PerDatum):
    """z ~ N(base + slope x, scale^2)."""

    def __init__(self, count):
        super().__init__(count, **NORMAL["guide"])

    def forward(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(self.base + (self.slope * x).sum(-1), self.log_scale.exp()))


PROGRAMS = {
    "bits": (BitsModel, BitsGuide, BITS),
    "classes": (ClassesModel, ClassesGuide, CLASSES),
    "normal": (NormalModel, NormalGuide, NORMAL),
}


def programs(kind, count):
    """Model, guide and data of so many rows."""
    model, guide, values = PROGRAMS[kind]
    return model(count), guide(count), torch.tensor(values["x"]).expand(count, -1).clone()


# --- What an estimator gives ------------------------------------------------------------------------------------


def gradient_draws(objective, kind, count, before=0):
    """Draws of the gradient of every number in model and guide, ``(N, P)`` by the names of their programs.

    ``before`` steps are taken first, for what an estimator remembers.
    """
    model, guide, x = programs(kind, count)
    for _ in range(before):
        objective.bound(model, guide, x)
    bound = objective.bound(model, guide, x)
    bound.sum().backward()
    return {
        "value": bound.detach().unsqueeze(-1),
        "model": torch.cat([p.grad.reshape(count, -1) for p in model.parameters()], -1),
        "guide": torch.cat([p.grad.reshape(count, -1) for p in guide.parameters()], -1),
    }


def deviations(draws, exact):
    """How many standard errors the mean of draws is from the exact answer, the largest over all entries."""
    error = draws.std(0) / math.sqrt(len(draws))
    return float(((draws.mean(0) - exact).abs() / (error + 1e-10)).max())


# --- What it should be ------------------------------------------------------------------------------------------


def _leaves(values):
    return {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}


def bits_log_joint(model, z, x):
    """log p(x|z) and log p(z) for bits ``(..., 2)`` and pixels ``(..., 3)``."""
    prior = dist.Bernoulli(logits=model["prior"]).log_prob(z).sum(-1)
    return dist.Bernoulli(logits=z @ model["weight"].T + model["bias"]).log_prob(x).sum(-1), prior


def bits_log_q(guide, z, x):
    return dist.Bernoulli(logits=guide["base"] + x @ guide["slope"].T).log_prob(z).sum(-1)


def all_bits(count):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=count)))


def _bits_terms(model, guide, particles):
    """Log-likelihood, log-prior and log q of all tuples of states, ``(K, T)`` each, and log-probabilities, ``(T,)``."""
    states, x = all_bits(2), torch.tensor(BITS["x"])
    log_likelihood, log_prior = bits_log_joint(model, states, x)
    return _tuples(log_likelihood, log_prior, bits_log_q(guide, states, x), particles)


def _classes_terms(model, guide, particles):
    x, eye = torch.tensor(CLASSES["x"]), torch.eye(3)
    states = torch.stack([torch.stack(pair) for pair in itertools.product(eye, eye)])  # (9, 2, 3)
    logits = torch.einsum("pvc,svc->sp", model["weight"], states) + model["bias"]
    log_likelihood = dist.Bernoulli(logits=logits).log_prob(x).sum(-1)
    log_prior = (model["prior"].log_softmax(-1) * states).sum((-1, -2))
    q = guide["base"] + torch.einsum("pvc,p->vc", guide["slope"], x)
    return _tuples(log_likelihood, log_prior, (q.log_softmax(-1) * states).sum((-1, -2)), particles)


def _tuples(log_likelihood, log_prior, log_q, particles):
    tuples = torch.tensor(list(itertools.product(range(len(log_q)), repeat=particles))).T  # (K, S^K)
    return (log_likelihood[tuples], log_prior[tuples], log_q[tuples]), log_q[tuples].sum(0).exp()


def _normal_terms(model, guide, particles):
    """The same with quadrature nodes for states; they move with the guide's parameters, and their weights do not."""
    nodes, weights = (torch.tensor(v) for v in _hermite(60 if particles < 3 else 16))
    grid = torch.cartesian_prod(*[nodes] * particles).reshape(-1, particles).T  # (K, T)
    weight = torch.cartesian_prod(*[weights] * particles).reshape(-1, particles).prod(-1)
    x = torch.tensor(NORMAL["x"])
    z = guide["base"] + (guide["slope"] * x).sum() + guide["log_scale"].exp() * grid
    return normal_log_densities(model, guide, z), weight


def normal_log_densities(model, guide, z):
    x = torch.tensor(NORMAL["x"])
    mean = model["weight"] * z.unsqueeze(-1) + model["bias"]
    log_likelihood = dist.Normal(mean, model["log_noise"].exp()).log_prob(x).sum(-1)
    log_prior = dist.Normal(model["loc"], model["log_scale"].exp()).log_prob(z)
    center = guide["base"] + (guide["slope"] * x).sum()
    return log_likelihood, log_prior, dist.Normal(center, guide["log_scale"].exp()).log_prob(z)


def _hermite(points):
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return nodes, weights / weights.sum()


TERMS = {"bits": _bits_terms, "classes": _classes_terms, "normal": _normal_terms}


def exact(kind, formula, particles):
    """Value and gradient of the expectation of ``formula(log_likelihood, log_prior, log_q)``, each ``(K, T)``."""
    values = PROGRAMS[kind][2]
    model, guide = _leaves(values["model"]), _leaves(values["guide"])
    terms, probability = TERMS[kind](model, guide, particles)
    expectation = (probability * formula(*terms)).sum()
    return {"value": expectation.detach(), **gradients(expectation, model, guide)}


def gradients(target, model, guide):
    """The gradient of a number with respect to all of model and guide, flat; zero where there is none."""
    result = {}
    for name, leaves in (("model", model), ("guide", guide)):
        found = torch.autograd.grad(target, list(leaves.values()), retain_graph=True, allow_unused=True)
        pairs = zip(found, leaves.values(), strict=True)
        result[name] = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
    return result


def exact_thermodynamic(kind, temperatures, widths):
    """Value and gradient of the sum of ``widths`` times the mean log-weight under q^(1-b) p^b, by states or a grid."""
    values = PROGRAMS[kind][2]
    model, guide = _leaves(values["model"]), _leaves(values["guide"])
    if kind == "bits":
        states, x = all_bits(2), torch.tensor(BITS["x"])
        likelihood, prior = bits_log_joint(model, states, x)
        q = bits_log_q(guide, states, x)
    else:
        likelihood, prior, q = normal_log_densities(model, guide, torch.linspace(-12, 12, 20_001))
    log_weight = likelihood + prior - q
    total = sum(
        width * ((q + b * log_weight).softmax(0) * log_weight).sum()
        for b, width in zip(temperatures, widths, strict=True)
    )
    return {"value": total.detach(), **gradients(total, model, guide)}


def log_evidence(kind):
    """log p(x), by summing over states or a grid."""
    values = PROGRAMS[kind][2]
    model = {name: torch.tensor(value) for name, value in values["model"].items()}
    guide = {name: torch.tensor(value) for name, value in values["guide"].items()}
    if kind == "bits":
        likelihood, prior = bits_log_joint(model, all_bits(2), torch.tensor(BITS["x"]))
        return float((likelihood + prior).logsumexp(0))
    grid = torch.linspace(-12, 12, 20_001)
    likelihood, prior, _ = normal_log_densities(model, guide, grid)
    return float((likelihood + prior).logsumexp(0) + (grid[1] - grid[0]).log())
