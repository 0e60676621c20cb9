"""Variational inference in Pyro made legible: an ELBO that shows every term, and what to compare it with.

``log p(x) = ELBO(q) + KL(q(z) || p(z|x))`` and ``ELBO(q) = E_q[log p(x|z)] - KL(q(z) || p(z))``. The first KL, the gap,
is called ``kl_posterior`` throughout; the second, a part of the ELBO, ``kl_prior``.
"""

from pyro_elbo_ext.comparison import Comparison, compare_to_mcmc
from pyro_elbo_ext.compile import CompiledSVI
from pyro_elbo_ext.decomposed import DecomposedELBO
from pyro_elbo_ext.evidence import evidence_bounds
from pyro_elbo_ext.evidence_ledger import EvidenceBounds
from pyro_elbo_ext.export import from_pyro_mcmc, from_pyro_svi
from pyro_elbo_ext.history import History
from pyro_elbo_ext.importance import ImportanceSample, psis_khat
from pyro_elbo_ext.mcmc import run_nuts
from pyro_elbo_ext.multi_sample import (
    ChiUpperBound,
    ImportanceWeightedELBO,
    MultiSampleELBO,
    RenyiELBO,
    ThermodynamicELBO,
)
from pyro_elbo_ext.terms import Term, Terms

__version__ = "0.1.0"

__all__ = [
    "ChiUpperBound",
    "Comparison",
    "CompiledSVI",
    "DecomposedELBO",
    "EvidenceBounds",
    "History",
    "ImportanceSample",
    "ImportanceWeightedELBO",
    "MultiSampleELBO",
    "RenyiELBO",
    "Term",
    "Terms",
    "ThermodynamicELBO",
    "compare_to_mcmc",
    "evidence_bounds",
    "from_pyro_mcmc",
    "from_pyro_svi",
    "psis_khat",
    "run_nuts",
]
