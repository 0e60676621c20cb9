"""A model as a log density on flat unconstrained space, with its gradient, as one compiled function."""

from pyro_elbo_ext.density.log_density import LogDensity, compiled_log_density

__all__ = ["LogDensity", "compiled_log_density"]
