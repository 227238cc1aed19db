"""Posterior draws as an ArviZ file."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from inference.particles import Program, decode, particles


def import_arviz() -> Any:
    """ArviZ, imported when it is needed (it takes a second) and without its notice about the line after this one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def write_posterior(path: Path, model: Program, guide: Program, x: torch.Tensor, draws: int) -> None:
    """Write ``posterior.nc``, to be opened by ``arviz.from_netcdf``; the file appears whole or not at all.

    Groups: ``posterior`` (every latent site, chain x draw x datum x event), ``posterior_predictive`` and
    ``observed_data`` (``x``), ``log_likelihood`` (log p(x|z) in nats, chain x draw x datum). The draws are
    independent, from the guide.
    """
    arviz = import_arviz()
    scored = [particles(model, guide, x) for _ in range(draws)]  # one by one: the likelihoods of all may be large
    latents = {
        name: torch.stack([part.latents[name].value.reshape(x.shape[0], *latent.q.event_shape) for part in scored])
        for name, latent in scored[0].latents.items()
    }
    log_likelihood = torch.cat([part.log_likelihood for part in scored])  # (1, N) each
    predicted = torch.stack([decode(model, {n: z[i] for n, z in latents.items()}, x).sample() for i in range(draws)])
    data = arviz.from_dict(
        posterior={name: z.cpu().numpy()[None] for name, z in latents.items()},
        posterior_predictive={"x": predicted.cpu().numpy()[None]},
        observed_data={"x": x.cpu().numpy()},
        log_likelihood={"x": log_likelihood.cpu().numpy()[None]},
    )
    temporary = path.with_name(f".{path.name}.partial")
    try:
        data.to_netcdf(str(temporary), engine="h5netcdf")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
