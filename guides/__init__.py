"""Variational families q(z|x): amortized Pyro guides, and the conditionals at their core."""

import models  # noqa: F401  (one Pyro setting for both packages lives there)
