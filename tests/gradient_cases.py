"""Bounds with their formulas, written once more, and what is asked of every estimator of their gradients."""

import math

from inference.annealing import BetaELBO
from inference.bounds import CIWAE, MIWAE, Renyi
from inference.objectives import ELBO, IWAE, Objective
from inference.thermodynamic import TVO
from tests.estimation import deviations, exact, gradient_draws, programs

ROWS = 20_000
LIMIT = 5  # standard errors


def log_mean_exp(values):
    return values.logsumexp(0) - math.log(len(values))


def elbo(likelihood, prior, q):
    return (likelihood + prior - q).mean(0)


def beta_elbo(likelihood, prior, q):
    return (likelihood - 2.5 * (q - prior)).mean(0)


def iwae(likelihood, prior, q):
    return log_mean_exp(likelihood + prior - q)


def renyi(likelihood, prior, q):
    return 2 * log_mean_exp(0.5 * (likelihood + prior - q))


def tempered(likelihood, prior, q):
    log_w = likelihood + prior - q
    return 0.25 * log_w.mean(0) + 0.75 * ((0.25 * log_w).softmax(0) * log_w).sum(0)


# objective, formula, and the number of draws that the formula is about
BOUNDS = {
    "elbo": (lambda g: ELBO(2, gradient=g), elbo, 1),
    "elbo_one": (lambda g: ELBO(1, gradient=g), elbo, 1),
    "elbo_analytic": (lambda g: ELBO(2, kl="analytic", gradient=g), elbo, 1),
    "beta": (lambda g: BetaELBO(2.5, 2, gradient=g), beta_elbo, 1),
    "iwae": (lambda g: IWAE(2, gradient=g), iwae, 2),
    "renyi": (lambda g: Renyi(0.5, 2, gradient=g), renyi, 2),
    "miwae": (lambda g: MIWAE(4, 2, gradient=g), iwae, 2),
    "ciwae": (lambda g: CIWAE(0.3, 2, gradient=g), lambda *t: 0.3 * elbo(*t) + 0.7 * iwae(*t), 2),
    "tvo": (lambda g: TVO(2, 2, first=0.25, gradient=g), tempered, 2),
}
LATENTS = {"bits": (2,), "classes": (2, 3)}
LINEAR = ("elbo", "elbo_one", "beta")
SCORES = ["score", "score_average", "nvil"]
CONTROLLED = ["muprop", "rebar", "relax", "arm"]
PATHWISE = [
    *((name, "reparameterized") for name in BOUNDS),
    *((name, "stl") for name in LINEAR),
    *((name, "dreg") for name in (*LINEAR, "iwae", "renyi", "miwae", "ciwae")),
]
SCORED = [
    *((name, g) for name in BOUNDS for g in SCORES),
    *((name, "loo") for name in BOUNDS if name in ("elbo", "elbo_analytic", "beta")),
    *((name, g) for name in ("iwae", "renyi", "miwae", "ciwae", "tvo") for g in ("vimco", "vimco_arithmetic")),
]


class LikelihoodOnly(Objective):
    """Defines from_particles and nothing else, as an objective from elsewhere may."""

    def from_particles(self, draws):
        return draws.log_likelihood.mean(0)


def draws_of(name, gradient, kind):
    objective = BOUNDS[name][0](gradient)
    objective.prepare((len(programs(kind, 1)[2][0]),), LATENTS.get(kind))
    return gradient_draws(objective, kind, ROWS, before=3)


def assert_right(draws, name, kind):
    truth = exact(kind, BOUNDS[name][1], BOUNDS[name][2])
    for part in ("value", "model", "guide"):
        assert deviations(draws[part], truth[part]) < LIMIT, part
