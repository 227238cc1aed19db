"""Generative models p(x, z): Pyro programs, and the conditionals they are made of."""
