"""The same models in NumPyro."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import torch
from jax import lax, random
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

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


def _uniform(fan_in: int, fan_out: int) -> Any:
    return lambda key: random.uniform(key, (fan_in, fan_out), minval=-1, maxval=1) / jnp.sqrt(fan_in)


def net(name: str, x: Any, fan_in: int, fan_out: int) -> Any:
    """Two hidden layers."""
    widths = (fan_in, HIDDEN, HIDDEN, fan_out)
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        weight = numpyro.param(f"{name}.{i}.weight", _uniform(before, after))
        x = x @ weight + numpyro.param(f"{name}.{i}.bias", jnp.zeros(after))
        x = jnp.tanh(x) if i < len(widths) - 2 else x
    return x


def _pixels(z: Any, x: Any, fan_in: int) -> None:
    numpyro.sample("x", dist.Bernoulli(logits=net("decoder", z, fan_in, PIXELS)).to_event(1), obs=x)


def _vae(latent: int = LATENT) -> tuple[Any, Any]:
    def model(x: Any) -> None:
        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latent), 1.0).to_event(1))
            _pixels(z, x, latent)

    def guide(x: Any) -> None:
        with numpyro.plate("data", x.shape[0]):
            numpyro.sample("z", _encoded(x, latent))

    return model, guide


def _encoded(x: Any, latent: int = LATENT) -> Any:
    loc, log_scale = jnp.split(net("encoder", x, PIXELS, 2 * latent), 2, axis=-1)
    return dist.Normal(loc, jnp.exp(log_scale)).to_event(1)


class _Map(dist.transforms.Transform):
    """An inverse autoregressive map, which knows its derivative from the drawing."""

    domain = codomain = dist.constraints.real_vector

    def __init__(self, function: Any) -> None:
        self.function = function

    def call_with_intermediates(self, z: Any) -> Any:
        shift, log_scale = self.function(z)
        return z * jnp.exp(log_scale) + shift, log_scale

    def __call__(self, z: Any) -> Any:
        return self.call_with_intermediates(z)[0]

    def log_abs_det_jacobian(self, z: Any, y: Any, intermediates: Any = None) -> Any:
        return (self.function(z)[1] if intermediates is None else intermediates).sum(-1)

    def tree_flatten(self) -> Any:
        return (), ((), {"function": self.function})


def _masked(name: str, backwards: bool, features: Any) -> Any:
    order = jnp.arange(LATENT)[::-1] if backwards else jnp.arange(LATENT)
    degrees = jnp.arange(FLOW_HIDDEN) % (LATENT - 1)
    seen = jnp.concatenate([order, jnp.full(FEATURES, -1)])
    mask_in, mask_out = degrees >= seen[:, None], jnp.tile(order, 2) > degrees[:, None]
    first = numpyro.param(f"{name}.first", _uniform(LATENT + FEATURES, FLOW_HIDDEN)) * mask_in
    last = numpyro.param(f"{name}.last", _uniform(FLOW_HIDDEN, 2 * LATENT)) * mask_out
    biases = numpyro.param(f"{name}.bias", jnp.zeros(FLOW_HIDDEN)), numpyro.param(f"{name}.out", jnp.zeros(2 * LATENT))

    def function(z: Any) -> Any:
        hidden = jax.nn.elu(jnp.concatenate([z, features], -1) @ first + biases[0])
        return jnp.split(hidden @ last + biases[1], 2, axis=-1)

    return function


def _iaf() -> tuple[Any, Any]:
    def guide(x: Any) -> None:
        with numpyro.plate("data", x.shape[0]):
            out = net("encoder", x, PIXELS, 2 * LATENT + FEATURES)
            loc, log_scale, features = jnp.split(out, [LATENT, 2 * LATENT], axis=-1)
            base = dist.Normal(loc, jnp.exp(log_scale)).to_event(1)
            maps = [_Map(_masked(f"map{i}", bool(i % 2), features)) for i in range(FLOWS)]
            numpyro.sample("z", dist.TransformedDistribution(base, maps))

    return _vae()[0], guide


def _vamp() -> tuple[Any, Any]:
    def model(x: Any) -> None:
        inputs = numpyro.param("pseudo_inputs", lambda key: random.uniform(key, (PSEUDO_INPUTS, PIXELS)))
        prior = dist.MixtureSameFamily(dist.Categorical(logits=jnp.zeros(PSEUDO_INPUTS)), _encoded(inputs))
        with numpyro.plate("data", x.shape[0]):
            _pixels(numpyro.sample("z", prior), x, LATENT)

    return model, _vae()[1]


def _gmm(components: int = COMPONENTS) -> tuple[Any, Any]:
    def model(x: Any) -> None:
        logits = numpyro.param("logits", jnp.zeros(components))
        loc = numpyro.param("loc", lambda key: random.uniform(key, (components, PIXELS)))
        log_scale = numpyro.param("log_scale", jnp.zeros((components, PIXELS)))
        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            numpyro.sample("x", dist.Normal(loc[z], jnp.exp(log_scale)[z]).to_event(1), obs=x)

    return model, lambda x: None


def _vq() -> tuple[Any, Any]:
    size = CODE_DIM * math.prod(GRID)

    def model(x: Any) -> None:
        codebook = numpyro.param(
            "codebook", lambda k: random.uniform(k, (CODES, CODE_DIM), minval=-1, maxval=1) / CODES
        )
        inputs = net("encoder", x, PIXELS, size).reshape(x.shape[0], -1, CODE_DIM)
        distances = ((inputs[..., None, :] - codebook) ** 2).sum(-1)
        vectors = codebook[distances.argmin(-1)]
        losses = (lax.stop_gradient(inputs) - vectors) ** 2 + COMMITMENT * (inputs - lax.stop_gradient(vectors)) ** 2
        z = (inputs + lax.stop_gradient(vectors - inputs)).reshape(x.shape[0], size)
        with numpyro.plate("data", x.shape[0]):
            numpyro.factor("losses", -losses.sum((-2, -1)))
            _pixels(z, x, size)

    return model, lambda x: None


PROGRAMS = {"vae": _vae, "iaf": _iaf, "iwae": _vae, "vamp": _vamp, "gmm": _gmm, "vq": _vq}


def svi(case: str, *, particles: int = PARTICLES, **options: int) -> Any:
    """NumPyro's SVI for a case."""
    losses = {"iwae": RenyiELBO(alpha=0, num_particles=particles), "gmm": TraceEnum_ELBO(max_plate_nesting=1)}
    return SVI(*PROGRAMS[case](**options), numpyro.optim.Adam(1e-3), losses.get(case) or Trace_ELBO())


def _array(x: Tensor) -> Any:
    """What JAX takes without a copy through the host."""
    return x.numpy() if x.device.type == "cpu" else jnp.from_dlpack(x)


def train(case: str, scan: bool, **options: int) -> Any:
    """Steps over batches: one jitted call for each, or one ``lax.scan`` that sees all batches beforehand."""
    made = svi(case, **options)
    update = jax.jit(made.update)
    run = jax.jit(lambda state, xs: lax.scan(made.update, state, xs))
    state: Any = None

    def steps(batches: Sequence[Tensor]) -> None:
        nonlocal state
        if state is None:
            state = made.init(random.PRNGKey(0), jnp.asarray(_array(batches[0])))
        if scan:
            state, _ = run(state, _array(torch.stack(list(batches))))
        else:
            for x in batches:
                state, _ = update(state, _array(x))
        jax.block_until_ready(state)

    return steps
