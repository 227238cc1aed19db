"""Generative models p(x, z): Pyro programs, and the conditionals they are made of."""

import pyro
import torch

# Parameters belong to the module that uses them, never to Pyro's global store: two models of one name would
# otherwise share weights silently, and a checkpoint could not tell whose they are.
pyro.settings.set(module_local_params=True)

# Pyro 1.9's SVI.step asks every parameter it saw for its unconstrained value, and finds none on the plain
# nn.Parameters of module-local mode. They are unconstrained, so each is its own.
if not hasattr(torch.nn.Parameter, "unconstrained"):
    torch.nn.Parameter.unconstrained = lambda parameter: parameter  # type: ignore[attr-defined]
