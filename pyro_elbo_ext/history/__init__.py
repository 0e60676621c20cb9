"""The detached record of a fit: columns of numbers by site and step, tables, files and plots."""

from pyro_elbo_ext.history.history import History

__all__ = ["History"]
