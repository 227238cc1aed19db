"""Hand-written Pyro programs that the tests run: what a user writes who has none of our parts."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from inference.enumeration import placed as at  # noqa: F401  (the guide with its latents at given values)


class TableModel(PyroModule):
    """z ~ Categorical(prior), x ~ independent Bernoulli(logits[z]): the program of an oracle ``DiscreteVAE``."""

    def __init__(self, oracle):
        super().__init__()
        self.log_prior = nn.Parameter(torch.tensor(oracle.prior).log())
        self.logits = nn.Parameter(torch.tensor(oracle.pixel_logits))

    def forward(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=self.log_prior))
            pyro.sample("x", dist.Bernoulli(logits=self.logits[z]).to_event(1), obs=x)


class TableGuide(PyroModule):
    """A free categorical for each datum: the rows of a table ``(N, S)`` of probabilities."""

    def __init__(self, table, enumerate=None):
        super().__init__()
        self.log_q = nn.Parameter(torch.as_tensor(table).log())
        self.infer = {} if enumerate is None else {"enumerate": enumerate}

    def forward(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Categorical(logits=self.log_q), infer=self.infer)


class HierarchicalModel(PyroModule):
    """top ~ N(0, I), bottom ~ N(A top, 1/4), x ~ N(tanh(B bottom), s^2)."""

    def __init__(self, data_dim=5, bottom=3, top=2):
        super().__init__()
        self.top = top
        self.a, self.b = nn.Linear(top, bottom), nn.Linear(bottom, data_dim)
        self.log_scale = nn.Parameter(torch.tensor(-0.3))

    def forward(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            top = pyro.sample("top", dist.Normal(torch.zeros(self.top), 1).to_event(1))
            bottom = pyro.sample("bottom", dist.Normal(self.a(top), 0.5).to_event(1))
            return pyro.sample("x", dist.Normal(self.b(bottom).tanh(), self.log_scale.exp()).to_event(1), obs=x)


class HierarchicalGuide(PyroModule):
    """q(top|x) q(bottom|top, x), in the model's order unless told otherwise."""

    def __init__(self, data_dim=5, bottom=3, top=2, upwards=False):
        super().__init__()
        self.upwards = upwards
        sizes = {"top": top, "bottom": bottom}
        self.order = ["bottom", "top"] if upwards else ["top", "bottom"]
        first, second = self.order
        self.first = nn.Linear(data_dim, 2 * sizes[first])
        self.second = nn.Linear(data_dim + sizes[first], 2 * sizes[second])

    def forward(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            first = pyro.sample(self.order[0], _normal(self.first(x)))
            context = torch.cat([x.expand(*first.shape[:-1], x.shape[-1]), first], -1)
            pyro.sample(self.order[1], _normal(self.second(context)))


def _normal(parameters):
    loc, log_scale = parameters.chunk(2, -1)
    return dist.Normal(loc, (0.3 * log_scale).exp()).to_event(1)


class SubsampledModel(PyroModule):
    """The linear model x ~ N(W z + m, s^2 I) for all of ``x``, of which it looks at ``batch`` rows at a time."""

    def __init__(self, data_dim=3, latent_dim=2, batch=2):
        super().__init__()
        self.batch, self.latent_dim = batch, latent_dim
        self.decoder = nn.Linear(latent_dim, data_dim)
        self.log_scale = nn.Parameter(torch.tensor(-0.5))

    def forward(self, x, subsample=None):
        with pyro.plate("data", x.shape[0], subsample_size=self.batch, subsample=subsample, dim=-1) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent_dim), 1).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.log_scale.exp()).to_event(1), obs=x[index])


class SubsampledGuide(PyroModule):
    """A diagonal normal read off the same rows; ``noise`` (N, Q), where given, is that of each datum for good."""

    def __init__(self, data_dim=3, latent_dim=2, batch=2, noise=None):
        super().__init__()
        self.batch, self.noise = batch, noise
        self.encoder = nn.Linear(data_dim, 2 * latent_dim)

    def forward(self, x, subsample=None):
        with pyro.plate("data", x.shape[0], subsample_size=self.batch, subsample=subsample, dim=-1) as index:
            loc, log_scale = self.encoder(x[index]).chunk(2, -1)
            q = dist.Normal(loc, log_scale.exp()) if self.noise is None else Frozen(loc, log_scale, self.noise[index])
            pyro.sample("z", q.to_event(1))


class Frozen(dist.Normal):
    """A normal whose reparameterized draw has given noise."""

    def __init__(self, loc, log_scale, noise):
        super().__init__(loc, log_scale.exp())
        self.noise = noise

    def expand(self, batch_shape, _instance=None):
        return Frozen(*(t.expand(batch_shape) for t in (self.loc, self.scale.log(), self.noise)))

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise


def gradients(loss, *programs):
    """The gradient of a loss with respect to every parameter, as one flat vector; zero where there is none."""
    parameters = [p for program in programs for p in program.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found)])  # noqa: B905
