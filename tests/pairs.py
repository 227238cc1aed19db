"""Small models with guides of this project's parts, and one as its oracle."""

import torch

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from models import likelihoods
from models.latent import LatentVariableModel
from models.nets import MLP
from models.ppca import PPCA
from models.priors import LearnedNormal
from tests import oracles


def composed(event_shape=(5,), latent_dim=2):
    net = lambda i, o: MLP(i, o, (6,))  # noqa: E731
    prior = LearnedNormal((latent_dim,))
    with torch.no_grad():
        prior.loc.normal_()
        prior.log_scale.normal_()
    model = LatentVariableModel(prior, likelihoods.Bernoulli(event_shape, (latent_dim,), net))
    return model, Amortized(DiagonalNormal((latent_dim,), event_shape, net))


def binary(*shape):
    return torch.randint(0, 2, shape).double()


def linear(data_dim=3, latent_dim=2):
    model = PPCA((data_dim,), latent_dim)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
        model.likelihood.log_scale.fill_(-0.4)
    return model


def as_oracle(model):
    p = model.likelihood
    return oracles.LinearModel(p.weight.detach().numpy(), p.loc.detach().numpy(), p.scale.item())
