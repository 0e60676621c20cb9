"""Variational inference in Pyro made legible: an ELBO that shows every term, and what to compare it with.

``log p(x) = ELBO(q) + KL(q(z) || p(z|x))`` and ``ELBO(q) = E_q[log p(x|z)] - KL(q(z) || p(z))``. The first KL, the gap,
is called ``kl_posterior`` throughout; the second, a part of the ELBO, ``kl_prior``.
"""

from pyro_elbo_ext.amortized.gap import AmortizationGap, amortization_gap
from pyro_elbo_ext.amortized.latent_units import ActiveUnits, active_units
from pyro_elbo_ext.amortized.surgery import ElboSurgery, elbo_surgery
from pyro_elbo_ext.bounds.weighting import CyclicalWarmup, Geco, LinearWarmup
from pyro_elbo_ext.calibration.calibrate import Calibration, simulate_calibration
from pyro_elbo_ext.calibration.recipes import TrainGuide
from pyro_elbo_ext.comparison.marginal import Comparison, compare_to_mcmc
from pyro_elbo_ext.comparison.predictive import PredictiveComparison, compare_predictive
from pyro_elbo_ext.comparison.reference_draws import read_draws
from pyro_elbo_ext.compile import CompiledSVI
from pyro_elbo_ext.density.log_density import LogDensity, compiled_log_density
from pyro_elbo_ext.diagnosis.diagnosis import Diagnosis
from pyro_elbo_ext.diagnosis.verdict import diagnose
from pyro_elbo_ext.evidence.importance import ImportanceSample, psis_khat
from pyro_elbo_ext.evidence.intervals import evidence_bounds
from pyro_elbo_ext.evidence.ledger import EvidenceBounds
from pyro_elbo_ext.history.history import History
from pyro_elbo_ext.inference_data.export import from_pyro_mcmc, from_pyro_svi
from pyro_elbo_ext.mcmc.nuts import run_nuts
from pyro_elbo_ext.objectives.decomposed import DecomposedELBO
from pyro_elbo_ext.objectives.multi_sample import (
    ChiUpperBound,
    ImportanceWeightedELBO,
    MultiSampleELBO,
    RenyiELBO,
    ThermodynamicELBO,
)
from pyro_elbo_ext.terms.terms import Term, Terms
from pyro_elbo_ext.training.automatic_fit import AutomaticFit
from pyro_elbo_ext.training.callbacks import Callback
from pyro_elbo_ext.training.distributed.svi import DistributedSVI
from pyro_elbo_ext.training.fit import fit
from pyro_elbo_ext.training.result import FitResult
from pyro_elbo_ext.training.stopping.adaptive import AdaptiveStopping
from pyro_elbo_ext.training.stopping.rules import FixedSteps, Patience
from pyro_elbo_ext.training.trackers import CSVTracker, MLflowTracker, TensorBoardTracker, WandbTracker

__version__ = "0.1.0"

__all__ = [
    "ActiveUnits",
    "AdaptiveStopping",
    "AmortizationGap",
    "AutomaticFit",
    "CSVTracker",
    "Calibration",
    "Callback",
    "ChiUpperBound",
    "Comparison",
    "CompiledSVI",
    "CyclicalWarmup",
    "DecomposedELBO",
    "Diagnosis",
    "DistributedSVI",
    "ElboSurgery",
    "EvidenceBounds",
    "FitResult",
    "FixedSteps",
    "Geco",
    "History",
    "ImportanceSample",
    "ImportanceWeightedELBO",
    "LinearWarmup",
    "LogDensity",
    "MLflowTracker",
    "MultiSampleELBO",
    "Patience",
    "PredictiveComparison",
    "RenyiELBO",
    "TensorBoardTracker",
    "Term",
    "Terms",
    "ThermodynamicELBO",
    "TrainGuide",
    "WandbTracker",
    "active_units",
    "amortization_gap",
    "compare_predictive",
    "compare_to_mcmc",
    "compiled_log_density",
    "diagnose",
    "elbo_surgery",
    "evidence_bounds",
    "fit",
    "from_pyro_mcmc",
    "from_pyro_svi",
    "psis_khat",
    "read_draws",
    "run_nuts",
    "simulate_calibration",
]
