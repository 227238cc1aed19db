"""The same variational autoencoder in NumPyro."""

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

WIDTHS = {"encoder": (784, 200, 200, 100), "decoder": (50, 200, 200, 784)}


def _svi() -> Any:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def net(name: str, x: Any) -> Any:
        widths = WIDTHS[name]
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):

            def initial(key: Any, shape: tuple[int, int] = (fan_in, fan_out)) -> Any:
                return jax.random.uniform(key, shape, minval=-1, maxval=1) / jnp.sqrt(shape[0])

            weight = numpyro.param(f"{name}.{i}.weight", initial)
            bias = numpyro.param(f"{name}.{i}.bias", jnp.zeros(fan_out))
            x = x @ weight + bias
            x = jnp.tanh(x) if i < len(widths) - 2 else x
        return x

    def model(x: Any) -> None:
        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(50), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=net("decoder", z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        with numpyro.plate("data", x.shape[0]):
            loc, log_scale = jnp.split(net("encoder", x), 2, axis=-1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    return numpyro.infer.SVI(model, guide, numpyro.optim.Adam(1e-3), numpyro.infer.Trace_ELBO())


def numpyro_update() -> Any:
    """One jitted call for each step."""
    import jax
    import jax.numpy as jnp

    svi = _svi()
    update = jax.jit(svi.update)
    state: Any = None

    def steps(batches: Sequence[Tensor]) -> None:
        nonlocal state
        if state is None:
            state = svi.init(jax.random.PRNGKey(0), jnp.asarray(batches[0].numpy()))
        for x in batches:
            state, _ = update(state, x.numpy())
        jax.block_until_ready(state)

    return steps


def numpyro_scan() -> Any:
    """One call for all steps, which sees all batches beforehand."""
    import jax
    import jax.numpy as jnp
    import torch

    svi = _svi()
    run = jax.jit(lambda state, xs: jax.lax.scan(svi.update, state, xs))
    state: Any = None

    def steps(batches: Sequence[Tensor]) -> None:
        nonlocal state
        if state is None:
            state = svi.init(jax.random.PRNGKey(0), jnp.asarray(batches[0].numpy()))
        state, _ = run(state, torch.stack(list(batches)).numpy())
        jax.block_until_ready(state)

    return steps
