"""Variational families q(z|x): amortized Pyro guides, and the conditionals at their core."""
