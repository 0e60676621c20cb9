"""Variational inference in Pyro made legible, trustworthy and fast: an ELBO that shows every term, and is it any good?

``log p(x) = ELBO(q) + KL(q(z) || p(z|x))`` and ``ELBO(q) = E_q[log p(x|z)] - KL(q(z) || p(z))``. The first KL, the gap,
is called ``kl_posterior`` throughout; the second, a part of the ELBO, ``kl_prior``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the table below as type checkers and editors read it; tests/test_import.py compares the two
    from pyro_elbo_ext.amortized import ActiveUnits as ActiveUnits
    from pyro_elbo_ext.amortized import AmortizationGap as AmortizationGap
    from pyro_elbo_ext.amortized import ElboSurgery as ElboSurgery
    from pyro_elbo_ext.amortized import active_units as active_units
    from pyro_elbo_ext.amortized import amortization_gap as amortization_gap
    from pyro_elbo_ext.amortized import elbo_surgery as elbo_surgery
    from pyro_elbo_ext.bounds import Bound as Bound
    from pyro_elbo_ext.bounds import CyclicalWarmup as CyclicalWarmup
    from pyro_elbo_ext.bounds import Geco as Geco
    from pyro_elbo_ext.bounds import Gradient as Gradient
    from pyro_elbo_ext.bounds import LinearWarmup as LinearWarmup
    from pyro_elbo_ext.calibration import Calibration as Calibration
    from pyro_elbo_ext.calibration import TrainGuide as TrainGuide
    from pyro_elbo_ext.calibration import simulate_calibration as simulate_calibration
    from pyro_elbo_ext.comparison import Comparison as Comparison
    from pyro_elbo_ext.comparison import Components as Components
    from pyro_elbo_ext.comparison import PredictiveComparison as PredictiveComparison
    from pyro_elbo_ext.comparison import compare_predictive as compare_predictive
    from pyro_elbo_ext.comparison import compare_to_mcmc as compare_to_mcmc
    from pyro_elbo_ext.comparison import exchangeable_components as exchangeable_components
    from pyro_elbo_ext.comparison import read_draws as read_draws
    from pyro_elbo_ext.compile import CompiledSVI as CompiledSVI
    from pyro_elbo_ext.density import LogDensity as LogDensity
    from pyro_elbo_ext.density import compiled_log_density as compiled_log_density
    from pyro_elbo_ext.diagnosis import Diagnosis as Diagnosis
    from pyro_elbo_ext.diagnosis import LinearResponse as LinearResponse
    from pyro_elbo_ext.diagnosis import diagnose as diagnose
    from pyro_elbo_ext.diagnosis import linear_response as linear_response
    from pyro_elbo_ext.evidence import EvidenceBounds as EvidenceBounds
    from pyro_elbo_ext.evidence import ImportanceSample as ImportanceSample
    from pyro_elbo_ext.evidence import evidence_bounds as evidence_bounds
    from pyro_elbo_ext.evidence import psis_khat as psis_khat
    from pyro_elbo_ext.history import History as History
    from pyro_elbo_ext.inference_data import from_pyro_mcmc as from_pyro_mcmc
    from pyro_elbo_ext.inference_data import from_pyro_svi as from_pyro_svi
    from pyro_elbo_ext.mcmc import run_nuts as run_nuts
    from pyro_elbo_ext.objectives import ChiUpperBound as ChiUpperBound
    from pyro_elbo_ext.objectives import DecomposedELBO as DecomposedELBO
    from pyro_elbo_ext.objectives import ImportanceWeightedELBO as ImportanceWeightedELBO
    from pyro_elbo_ext.objectives import MultiSampleELBO as MultiSampleELBO
    from pyro_elbo_ext.objectives import RenyiELBO as RenyiELBO
    from pyro_elbo_ext.objectives import ThermodynamicELBO as ThermodynamicELBO
    from pyro_elbo_ext.terms import Term as Term
    from pyro_elbo_ext.terms import Terms as Terms
    from pyro_elbo_ext.training.automatic_fit import AutomaticFit as AutomaticFit
    from pyro_elbo_ext.training.callbacks import Callback as Callback
    from pyro_elbo_ext.training.distributed import DistributedSVI as DistributedSVI
    from pyro_elbo_ext.training.fit import fit as fit
    from pyro_elbo_ext.training.result import FitResult as FitResult
    from pyro_elbo_ext.training.stopping import AdaptiveStopping as AdaptiveStopping
    from pyro_elbo_ext.training.stopping import Decision as Decision
    from pyro_elbo_ext.training.stopping import FixedSteps as FixedSteps
    from pyro_elbo_ext.training.stopping import Patience as Patience
    from pyro_elbo_ext.training.stopping import StoppingRule as StoppingRule
    from pyro_elbo_ext.training.trackers import CSVTracker as CSVTracker
    from pyro_elbo_ext.training.trackers import MLflowTracker as MLflowTracker
    from pyro_elbo_ext.training.trackers import TensorBoardTracker as TensorBoardTracker
    from pyro_elbo_ext.training.trackers import WandbTracker as WandbTracker

__version__ = "0.1.0"  # the only place that says it: pyproject.toml reads this line

# fmt: off
# Public names by the module that has them, which is imported when one of its names is first asked for (PEP 562):
# ``import pyro_elbo_ext`` by itself costs nothing, and a name no more than what it needs.
_NAMES = {
    "amortized": (
        "ActiveUnits", "AmortizationGap", "ElboSurgery", "active_units", "amortization_gap", "elbo_surgery",
    ),
    "bounds": ("Bound", "CyclicalWarmup", "Geco", "Gradient", "LinearWarmup"),
    "calibration": ("Calibration", "TrainGuide", "simulate_calibration"),
    "comparison": (
        "Comparison", "Components", "PredictiveComparison", "compare_predictive", "compare_to_mcmc",
        "exchangeable_components", "read_draws",
    ),
    "compile": ("CompiledSVI",),
    "density": ("LogDensity", "compiled_log_density"),
    "diagnosis": ("Diagnosis", "LinearResponse", "diagnose", "linear_response"),
    "evidence": ("EvidenceBounds", "ImportanceSample", "evidence_bounds", "psis_khat"),
    "history": ("History",),
    "inference_data": ("from_pyro_mcmc", "from_pyro_svi"),
    "mcmc": ("run_nuts",),
    "objectives": (
        "ChiUpperBound", "DecomposedELBO", "ImportanceWeightedELBO", "MultiSampleELBO", "RenyiELBO", "ThermodynamicELBO",
    ),
    "terms": ("Term", "Terms"),
    "training.automatic_fit": ("AutomaticFit",),
    "training.callbacks": ("Callback",),
    "training.distributed": ("DistributedSVI",),
    "training.fit": ("fit",),
    "training.result": ("FitResult",),
    "training.stopping": ("AdaptiveStopping", "Decision", "FixedSteps", "Patience", "StoppingRule"),
    "training.trackers": ("CSVTracker", "MLflowTracker", "TensorBoardTracker", "WandbTracker"),
}
# fmt: on
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
_ROOMS = {module.partition(".")[0] for module in _NAMES}  # ``pyro_elbo_ext.bounds`` and so on

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value  # the next time it is found without asking here
        return value
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_ROOMS})
