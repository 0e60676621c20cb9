"""A guide beside reference draws."""

from pyro_elbo_ext.comparison.marginal import Comparison, compare_to_mcmc
from pyro_elbo_ext.comparison.predictive import PredictiveComparison, compare_predictive
from pyro_elbo_ext.comparison.reference_draws import read_draws
from pyro_elbo_ext.programs.symmetry import Components, exchangeable_components

__all__ = [
    "Comparison",
    "Components",
    "PredictiveComparison",
    "compare_predictive",
    "compare_to_mcmc",
    "exchangeable_components",
    "read_draws",
]
