"""Variational inference in Pyro made legible: an ELBO that shows every term, and what to compare it with.

``log p(x) = ELBO(q) + KL(q(z) || p(z|x))`` and ``ELBO(q) = E_q[log p(x|z)] - KL(q(z) || p(z))``. The first KL, the gap,
is called ``kl_posterior`` throughout; the second, a part of the ELBO, ``kl_prior``.
"""

from pyro_elbo_ext.calibration import Calibration, simulate_calibration
from pyro_elbo_ext.comparison import Comparison, compare_to_mcmc
from pyro_elbo_ext.compile import CompiledSVI
from pyro_elbo_ext.decomposed import DecomposedELBO
from pyro_elbo_ext.export import from_pyro_mcmc, from_pyro_svi
from pyro_elbo_ext.history import History
from pyro_elbo_ext.mcmc import run_nuts
from pyro_elbo_ext.multi_sample import (
    ChiUpperBound,
    ImportanceWeightedELBO,
    MultiSampleELBO,
    RenyiELBO,
    ThermodynamicELBO,
)
from pyro_elbo_ext.predictive_comparison import PredictiveComparison, compare_predictive
from pyro_elbo_ext.recipes import TrainGuide
from pyro_elbo_ext.reference_draws import read_draws
from pyro_elbo_ext.terms import Term, Terms

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "ChiUpperBound",
    "Comparison",
    "CompiledSVI",
    "DecomposedELBO",
    "History",
    "ImportanceWeightedELBO",
    "MultiSampleELBO",
    "PredictiveComparison",
    "RenyiELBO",
    "Term",
    "Terms",
    "ThermodynamicELBO",
    "TrainGuide",
    "compare_predictive",
    "compare_to_mcmc",
    "from_pyro_mcmc",
    "from_pyro_svi",
    "read_draws",
    "run_nuts",
    "simulate_calibration",
]
