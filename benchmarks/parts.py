"""The same models made of this project's parts: model, guide, objective."""

from functools import partial
from typing import Any

from torch import nn

from benchmarks.by_hand import (
    CODE_DIM,
    CODES,
    COMMITMENT,
    COMPONENTS,
    FEATURES,
    FLOW_HIDDEN,
    FLOWS,
    GRID,
    HIDDEN,
    LATENT,
    PARTICLES,
    PIXELS,
    PSEUDO_INPUTS,
)

Parts = tuple[nn.Module, nn.Module, Any]


def vae(latent: int = LATENT, particles: int = 1) -> Parts:
    """The variational autoencoder; with several particles, the importance-weighted one."""
    from inference.objectives import ELBO, IWAE
    from models.priors import StandardNormal

    guide = _amortized(_diagonal(latent))
    return _composed(StandardNormal((latent,)), latent), guide, ELBO() if particles == 1 else IWAE(particles)


def iaf() -> Parts:
    """Inverse autoregressive maps in the guide."""
    from guides.flow import InverseAutoregressivePosterior
    from inference.objectives import ELBO
    from models.priors import StandardNormal

    core = InverseAutoregressivePosterior((LATENT,), (PIXELS,), _net(), FLOWS, (FLOW_HIDDEN,), FEATURES)
    return _composed(StandardNormal((LATENT,)), LATENT), _amortized(core), ELBO()


def vamp() -> Parts:
    """The VampPrior."""
    from inference.objectives import ELBO
    from models.vamp import VampPrior

    core, prior = _diagonal(LATENT), VampPrior((LATENT,), (PIXELS,), components=PSEUDO_INPUTS)
    prior.look_through(core)
    return _composed(prior, LATENT), _amortized(core), ELBO()


def gmm(components: int = COMPONENTS) -> Parts:
    """A mixture of diagonal normals, summed out."""
    from guides.enumerated import SummedOut
    from inference.stock import TraceEnum
    from models.gmm import GaussianMixture

    model = GaussianMixture((PIXELS,), components, "diagonal")
    return model, SummedOut(model), TraceEnum(max_plate_nesting=1)


def vq() -> Parts:
    """Vector quantization."""
    from guides.quantized import Quantized
    from inference.quantization import VectorQuantization
    from models.codebook import Codebook
    from models.latent import LatentVariableModel
    from models.likelihoods import Bernoulli
    from models.vq import CodePrior

    shape = (CODE_DIM, *GRID)
    model = LatentVariableModel(CodePrior(Codebook(CODES, CODE_DIM), GRID), Bernoulli((PIXELS,), shape, _net()))
    return model, _amortized(Quantized(shape, (PIXELS,), _net(), model)), VectorQuantization(COMMITMENT)


PARTS = {"vae": vae, "iaf": iaf, "iwae": partial(vae, particles=PARTICLES), "vamp": vamp, "gmm": gmm, "vq": vq}


def _net() -> Any:
    from models.nets import MLP

    return partial(MLP, hidden=(HIDDEN, HIDDEN))


def _diagonal(latent: int) -> Any:
    from guides.gaussian import DiagonalNormal

    return DiagonalNormal((latent,), (PIXELS,), _net())


def _amortized(core: Any) -> nn.Module:
    from guides.amortized import Amortized

    return Amortized(core)


def _composed(prior: Any, latent: int) -> nn.Module:
    from models.latent import LatentVariableModel
    from models.likelihoods import Bernoulli

    return LatentVariableModel(prior, Bernoulli((PIXELS,), (latent,), _net()))
