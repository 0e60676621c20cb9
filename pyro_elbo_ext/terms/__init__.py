"""The only reader of Pyro traces: the terms of the ELBO by site, each ``kl_prior`` analytic where that is valid."""

from pyro_elbo_ext.terms.terms import Term, Terms

__all__ = ["Term", "Terms"]
