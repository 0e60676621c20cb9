"""How near is the ELBO to ``log p(x)``: bounds on both sides, importance weights, annealing."""

from pyro_elbo_ext.evidence.importance import ImportanceSample, psis_khat
from pyro_elbo_ext.evidence.intervals import evidence_bounds
from pyro_elbo_ext.evidence.ledger import EvidenceBounds

__all__ = ["EvidenceBounds", "ImportanceSample", "evidence_bounds", "psis_khat"]
