"""Generative models p(x, z): Pyro programs, and the conditionals they are made of."""

import pyro

# Parameters belong to the module that uses them, never to Pyro's global store: two models of one name would
# otherwise share weights silently, and a checkpoint could not tell whose they are.
pyro.settings.set(module_local_params=True)
