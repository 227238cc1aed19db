"""Models with closed-form steps, with data for each."""

import numpy as np
import pytest
import torch
from torch import Tensor

from models.gmm import COVARIANCES, GaussianMixture
from models.hmm import HMM
from models.latent_class import LatentClassModel
from models.ppca import PPCA
from models.tabular import TabularVAE


def clouds(size=120, dimension=2, seed=0) -> Tensor:
    rng = np.random.default_rng(seed)
    centers = rng.normal(scale=2, size=(3, dimension))
    return torch.tensor(centers[rng.integers(3, size=size)] + rng.normal(size=(size, dimension)))


def bits(size=200) -> Tensor:
    rng = np.random.default_rng(0)
    prototypes = rng.uniform(0.1, 0.9, size=(3, 6))
    return torch.tensor((rng.uniform(size=(size, 6)) < prototypes[rng.integers(3, size=size)]).astype(float))


MODELS = {
    **{f"gmm {name}": (lambda name=name: GaussianMixture((2,), 3, name), clouds) for name in COVARIANCES},
    "gmm ridge": (lambda: GaussianMixture((2,), 3, ridge=2.0), clouds),
    "tabular": (lambda: TabularVAE((6,), 3), bits),
    "tabular pseudo": (lambda: TabularVAE((6,), 3, pseudo_count=0.5), bits),
    "latent class": (lambda: LatentClassModel((6,), 3, 2), bits),
    "latent class pseudo": (lambda: LatentClassModel((6,), 3, 2, pseudo_count=0.5), bits),
    "hmm gaussian": (lambda: HMM((2,), 2), clouds),
    "hmm categorical": (lambda: HMM((6,), 2, "categorical", 2), bits),
}
ENUMERABLE = pytest.mark.parametrize("name", list(MODELS))
MODELS["ppca"] = (lambda: PPCA((3,), 1), lambda: clouds(dimension=3))
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def started(name, seed=0):
    make, data = MODELS[name]
    model, x = make(), data()
    model.initialize(x, torch.Generator().manual_seed(seed))
    return model, x
