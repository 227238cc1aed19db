"""Small VQ-VAEs, and what they are made of computed without the programs."""

from functools import partial

import torch
from torch import nn

from guides.amortized import Amortized
from guides.quantized import Quantized
from models import likelihoods
from models.codebook import Codebook
from models.latent import LatentVariableModel
from models.nets import MLP
from models.vq import CodePrior

IMAGE = (1, 4, 4)


class Same(nn.Module):
    """The identity between shapes of one size."""

    def __init__(self, in_shape, out_shape):
        super().__init__()
        self.dims, self.out_shape = len(in_shape), tuple(out_shape)

    def forward(self, x):
        return x.reshape(*x.shape[: x.dim() - self.dims], *self.out_shape)


def pair(codes=3, dim=2, grid=(2, 2), shape=IMAGE, encoder=None, decoder=None, likelihood=None, **options):
    mlp = partial(MLP, hidden=(8,))
    codebook = Codebook(codes, dim, **options)
    with torch.no_grad():
        codebook.vectors.normal_()
    latent = (dim, *grid)
    likelihood = likelihood or likelihoods.FixedGaussian
    model = LatentVariableModel(CodePrior(codebook, grid), likelihood(shape, latent, decoder or mlp))
    return model, Amortized(Quantized(latent, shape, encoder or mlp, model))


def parts(model, guide, x):
    """Encoder output, codes' vectors and log p(x|z_q), computed without the programs; a gradient for each leaf."""
    z_e = guide.core.net(x).detach().requires_grad_()
    rows = z_e.detach().movedim(1, -1).reshape(-1, z_e.shape[1])
    codebook = model.prior.codebook.vectors.detach()
    codes = torch.tensor([min(range(len(codebook)), key=lambda k: float((r - codebook[k]).norm())) for r in rows])
    codes = codes.reshape(x.shape[0], *z_e.shape[2:])
    z_q = codebook[codes].movedim(-1, 1).clone().requires_grad_()
    return z_e, codes, z_q, model.likelihood(z_q).log_prob(x)
