"""Pyro's enumeration, for models that do not say themselves which of their latents to sum out."""

from typing import Any

import pyro.infer
from pyro.infer import config_enumerate

from inference.structure import Program


class TraceEnum(pyro.infer.TraceEnum_ELBO):
    """``TraceEnum_ELBO`` that sums out every discrete latent of the model that the guide leaves to it.

    What the guide draws or enumerates is as with Pyro's own.
    """

    def _get_traces(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        return super()._get_traces(config_enumerate(model, default="parallel"), guide, args, kwargs)
