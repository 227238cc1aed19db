"""Every part that can be chosen by a word. A new one is a class in its room and a line here."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.infer
import torch

from guides import enumerated, flow
from guides.clustering import Clustering
from guides.committed import CommittedNormal
from guides.deterministic import Deterministic
from guides.discrete import BernoulliBits, OneHotCategoricals
from guides.exact import ExactPosterior
from guides.family import FamilyConditional
from guides.free import LocallyFitted
from guides.gaussian import DiagonalNormal, FullNormal, LowRankNormal, Unconditional
from guides.hierarchical import BottomUp, Ladder, TopDown
from guides.mixture import NormalMixture
from guides.quantized import Quantized
from guides.quantized_levels import QuantizedLevels
from guides.relaxed import concrete, straight_through, straight_through_mean
from guides.semi_amortized import SemiAmortized
from inference import datasets, stock
from inference.aggressive import aggressive
from inference.annealing import AnnealedELBO, BetaELBO
from inference.bounds import CIWAE, MIWAE, PIWAE, Renyi
from inference.clustering import VaDE
from inference.combined import CombinedELBO
from inference.em_trainer import em, variational_em
from inference.free_bits import FreeBits
from inference.infovae import InfoVAE
from inference.objectives import ELBO, IWAE
from inference.quantization import VectorQuantization
from inference.svi import svi
from inference.thermodynamic import TVO
from inference.wake_sleep import WakeSleep
from models import flow_prior, likelihoods, nets, priors, text, text_nets, vamp, vq_levels
from models.autoregressive_prior import AR1Prior
from models.codebook import Codebook
from models.conditional_vae import ConditionalModel, given_entries
from models.discrete import UniformBits, uniform_one_hots
from models.dvae import OneHotPrior, SoftEmbedding
from models.families import FamilyPrior
from models.gmm import GaussianMixture
from models.hierarchical import TwoLayerModel
from models.hmm import HMM
from models.implicit import Implicit
from models.kmeans import KMeans
from models.latent import LatentVariableModel
from models.latent_class import LatentClassModel
from models.local_nets import LocalDecoder, LocalEncoder
from models.masked_tokens import MaskedTransformer
from models.mixture_vae import MixtureVAE
from models.one_hot_mixture import one_hot_gmm
from models.pixel_decoder import PixelCNNLikelihood
from models.pixelcnn import PixelCNN
from models.ppca import PPCA
from models.tabular import TabularVAE
from models.tokens import MarkovTable, PositionTable
from models.transformer import CausalTransformer
from models.vq import CodePrior, UniformTokens, check_grid

Factory = Callable[..., Any]


def composed(event_shape: Any, prior: Factory, likelihood: Factory, latent_dim: int = 20) -> LatentVariableModel:
    """A prior and a likelihood, p(z) p(x|z); with neural nets, the variational autoencoder's model."""
    p_z = prior((latent_dim,))  # its draws may have a shape of their own: one-hot vectors, one for each latent
    return LatentVariableModel(p_z, likelihood(event_shape, p_z.event_shape))


def two_layer(
    event_shape: Any,
    prior: Factory,
    likelihood: Factory,
    latent_dim: int = 20,
    top_dim: int = 10,
    hidden: tuple[int, ...] = (100, 100),
    skip: bool = False,
) -> TwoLayerModel:
    """Two layers of latents, p(z2) p(z1|z2) p(x|z1) (Burda et al. 2016), or p(x|z1, z2) with model.skip=true."""
    middle = DiagonalNormal((latent_dim,), (top_dim,), partial(nets.MLP, hidden=hidden))
    return TwoLayerModel(prior((top_dim,)), middle, likelihood(event_shape, (latent_dim + top_dim * skip,)), skip=skip)


def conditional(
    event_shape: Any,
    prior: Factory,
    likelihood: Factory,
    latent_dim: int = 20,
    given: int = 1,
    side: str = "last",
    prior_hidden: tuple[int, ...] = (),
    decoder_sees_context: bool = True,
) -> ConditionalModel:
    """P(y|x), of the other entries given the first or last rows or columns (Sohn, Lee and Yan 2015).

    With model.prior_hidden=[100], P(z|x) is a normal read off what is given by such a net, in place of the prior.
    """
    mask = given_entries(event_shape, given, side)
    count = int(mask.sum())
    own = DiagonalNormal((latent_dim,), (count,), partial(nets.MLP, hidden=prior_hidden)) if prior_hidden else None
    p_z = own or prior((latent_dim,))
    width = p_z.event_shape.numel() + count * decoder_sees_context
    return ConditionalModel(p_z, likelihood(event_shape, (width,)), mask)


def gmm_vae(event_shape: Any, likelihood: Factory, latent_dim: int = 10, components: int = 10) -> MixtureVAE:
    """A cluster, a code near its centre, a datum: p(c) p(z|c) p(x|z) (Jiang et al. 2017); with guide=clustering."""
    return MixtureVAE(priors.MixturePrior((latent_dim,), components=components), likelihood(event_shape, (latent_dim,)))


def vq(
    event_shape: Any,
    likelihood: Factory,
    tokens: Factory,
    codes: int = 16,
    code_dim: int = 8,
    grid: tuple[int, int] = (2, 2),
    ema: bool = False,
    decay: float = 0.99,
    restart_below: float = 0.0,
) -> LatentVariableModel:
    """A grid of codes from one codebook (van den Oord et al. 2017), its prior by tokens=...; with guide=quantized."""
    height, width = check_grid(grid)
    codebook = Codebook(codes, code_dim, ema, decay, restart_below)
    prior = CodePrior(codebook, (height, width), tokens((height, width), codes))
    return LatentVariableModel(prior, likelihood(event_shape, (code_dim, height, width)))


def dvae(
    event_shape: Any,
    likelihood: Factory,
    tokens: Factory,
    codes: int = 16,
    code_dim: int = 8,
    grid: tuple[int, int] = (2, 2),
) -> LatentVariableModel:
    """A grid of one-hot codes embedded softly (Ramesh et al. 2021), their prior by tokens=...; with guide=concrete."""
    height, width = check_grid(grid)
    prior = OneHotPrior(tokens((height, width), codes), codes)
    return LatentVariableModel(prior, SoftEmbedding(likelihood(event_shape, (code_dim, height, width)), codes))


def trace_elbo(particles: int = 1) -> pyro.infer.ELBO:
    """Pyro's Trace_ELBO: Monte Carlo ELBO; score-function gradients where a site is not reparameterized."""
    return stock.Trace(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)


def trace_mean_field_elbo(particles: int = 1) -> pyro.infer.ELBO:
    """Pyro's TraceMeanField_ELBO: the KL in closed form where there is one."""
    return stock.TraceMeanField(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)


def trace_graph_elbo(particles: int = 1) -> pyro.infer.ELBO:
    """Pyro's TraceGraph_ELBO: score-function gradients with Rao-Blackwellization and baselines."""
    return stock.TraceGraph(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)


def trace_enum_elbo(particles: int = 1) -> pyro.infer.ELBO:
    """Pyro's TraceEnum_ELBO: sums over the guide's enumerated sites, and over discrete ones that only the model has."""
    return stock.TraceEnum(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)


def adam(parameters: Any, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> torch.optim.Adam:
    """Adam (Kingma and Ba 2015), all parameters in one fused step."""
    return torch.optim.Adam(parameters, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)


def adamax(parameters: Any, lr: float, beta1: float = 0.9, beta2: float = 0.999) -> torch.optim.Adamax:
    """Adamax (Kingma and Ba 2015, algorithm 2)."""
    return torch.optim.Adamax(parameters, lr=lr, betas=(beta1, beta2))


def adagrad(parameters: Any, lr: float, eps: float = 1e-10) -> torch.optim.Adagrad:
    """Adagrad (Duchi et al. 2011), the optimizer of the paper's Algorithm 1."""
    return torch.optim.Adagrad(parameters, lr=lr, eps=eps)


def sgd(parameters: Any, lr: float, momentum: float = 0.0) -> torch.optim.SGD:
    """Stochastic gradient descent, with momentum if asked."""
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum)


CATALOG: dict[str, dict[str, Factory]] = {
    "data": {
        "digits": datasets.digits,
        "mnist": datasets.mnist,
        "omniglot": datasets.omniglot,
        "caltech": datasets.caltech,
        "frey": datasets.frey,
        "cifar10": datasets.cifar10,
        "faithful": datasets.faithful,
        "iris": datasets.iris,
        "file": datasets.file,
        "shakespeare": datasets.shakespeare,
        "lines": datasets.lines,
    },
    "model": {
        "composed": composed,
        "ppca": PPCA,
        "two_layer": two_layer,
        "vq": vq,
        "dvae": dvae,
        "vq_levels": vq_levels.vq_levels,
        "gmm": GaussianMixture,
        "gmm_onehot": one_hot_gmm,
        "gmm_vae": gmm_vae,
        "conditional": conditional,
        "tabular": TabularVAE,
        "latent_class": LatentClassModel,
        "hmm": HMM,
        "kmeans": KMeans,
    },
    "prior": {
        "standard": priors.StandardNormal,
        "normal": priors.LearnedNormal,
        "mixture": priors.MixturePrior,
        "vamp": vamp.VampPrior,
        "aggregated": vamp.AggregatedPosterior,
        "realnvp": flow_prior.CouplingPrior,
        "maf": flow_prior.AutoregressivePrior,
        "iaf": flow_prior.InverseAutoregressivePrior,
        "spline": flow_prior.SplinePrior,
        "ar1": AR1Prior,
        "family": FamilyPrior,
        "bits": UniformBits,
        "onehot": uniform_one_hots,
    },
    "tokens": {
        "uniform": UniformTokens,
        "table": PositionTable,
        "markov": MarkovTable,
        "pixelcnn": PixelCNN,
        "transformer": CausalTransformer,
        "masked": MaskedTransformer,
    },
    "likelihood": {
        "bernoulli": likelihoods.Bernoulli,
        "gaussian": likelihoods.FixedGaussian,
        "learned_gaussian": likelihoods.LearnedGaussian,
        "optimal_gaussian": likelihoods.OptimalGaussian,
        "diagonal_gaussian": DiagonalNormal,
        "categorical": likelihoods.Categorical,
        "logistic": likelihoods.DiscretizedLogistic,
        "pixelcnn": PixelCNNLikelihood,
        "lstm": text.LSTMLikelihood,
        "transformer": text.TransformerLikelihood,
        "implicit": Implicit,
    },
    "guide": {
        "diagonal": DiagonalNormal,
        "unconditional": Unconditional,
        "committed": CommittedNormal,
        "low_rank": LowRankNormal,
        "full": FullNormal,
        "mixture": NormalMixture,
        "planar": flow.PlanarPosterior,
        "sylvester": flow.SylvesterPosterior,
        "realnvp": flow.CouplingPosterior,
        "iaf": flow.InverseAutoregressivePosterior,
        "spline": flow.SplinePosterior,
        "free": LocallyFitted,
        "quantized": Quantized,
        "quantized_levels": QuantizedLevels,
        "bits": BernoulliBits,
        "onehot": OneHotCategoricals,
        "concrete": concrete,
        "straight_through": straight_through,
        "straight_through_mean": straight_through_mean,
        "semi_amortized": SemiAmortized,
        "deterministic": Deterministic,
        "exact": ExactPosterior,
        "enumerated": enumerated.amortized,
        "enumerated_exact": enumerated.exact,
        "enumerated_hard": enumerated.hard,
        "enumerated_uniform": enumerated.uniform,
        "summed_out": enumerated.SummedOut,
        "clustering": Clustering,
        "bottom_up": BottomUp,
        "top_down": TopDown,
        "ladder": Ladder,
        "family": FamilyConditional,
    },
    "objective": {
        "trace_elbo": trace_elbo,
        "trace_mean_field": trace_mean_field_elbo,
        "trace_graph": trace_graph_elbo,
        "trace_enum": trace_enum_elbo,
        "elbo": ELBO,
        "iwae": IWAE,
        "beta": BetaELBO,
        "annealed": AnnealedELBO,
        "free_bits": FreeBits,
        "infovae": InfoVAE,
        "combined": CombinedELBO,
        "renyi": Renyi,
        "miwae": MIWAE,
        "ciwae": CIWAE,
        "piwae": PIWAE,
        "tvo": TVO,
        "wake_sleep": WakeSleep,
        "vade": VaDE,
        "vq": VectorQuantization,
    },
    "inference": {"svi": svi, "aggressive": aggressive, "em": em, "variational_em": variational_em},
    "encoder": {
        "mlp": nets.MLP,
        "gated": nets.GatedMLP,
        "conv": nets.ConvEncoder,
        "local": LocalEncoder,
        "linear": nets.Linear,
        "gru": text_nets.GRUEncoder,
        "lstm": text_nets.LSTMEncoder,
    },
    "decoder": {
        "mlp": nets.MLP,
        "gated": nets.GatedMLP,
        "conv": nets.ConvDecoder,
        "local": LocalDecoder,
        "linear": nets.Linear,
        "skip": nets.SkipMLP,
    },
    "optimizer": {"adam": adam, "adamax": adamax, "adagrad": adagrad, "sgd": sgd},
}

DEFAULTS: dict[str, str] = {
    "data": "digits",
    "model": "composed",
    "prior": "standard",
    "tokens": "uniform",
    "guide": "diagonal",
    "objective": "trace_elbo",
    "inference": "svi",
    "encoder": "mlp",
    "decoder": "mlp",
    "optimizer": "adam",
}  # the likelihood's default is the data's
SUMMED = ("enumerated", "enumerated_exact", "enumerated_hard", "enumerated_uniform", "summed_out", "clustering")
OBJECTIVES = {  # the objective's default is the guide's, where one guide has an objective that goes with it alone
    **{"quantized": "vq", "quantized_levels": "vq", "concrete": "elbo", **dict.fromkeys(SUMMED, "trace_enum")},
    **dict.fromkeys(("straight_through", "straight_through_mean"), "trace_mean_field"),
}


def describe(factory: Factory) -> str:
    """The first line of a part's docstring."""
    return (factory.__doc__ or "").strip().splitlines()[0]
