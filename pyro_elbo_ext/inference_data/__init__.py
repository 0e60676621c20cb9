"""Pyro runs as ArviZ data with labelled axes: the only importers of ArviZ."""

from pyro_elbo_ext.inference_data.export import from_pyro_mcmc, from_pyro_svi

__all__ = ["from_pyro_mcmc", "from_pyro_svi"]
