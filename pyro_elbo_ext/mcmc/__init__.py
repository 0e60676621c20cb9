"""NUTS on an unchanged Pyro model."""

from pyro_elbo_ext.mcmc.nuts import run_nuts

__all__ = ["run_nuts"]
