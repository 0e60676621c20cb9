"""What Pyro's ``SVI`` trains on: the ELBO by its terms, and bounds of several particles."""

from pyro_elbo_ext.objectives.decomposed import DecomposedELBO
from pyro_elbo_ext.objectives.multi_sample import (
    ChiUpperBound,
    ImportanceWeightedELBO,
    MultiSampleELBO,
    RenyiELBO,
    ThermodynamicELBO,
)

__all__ = [
    "ChiUpperBound",
    "DecomposedELBO",
    "ImportanceWeightedELBO",
    "MultiSampleELBO",
    "RenyiELBO",
    "ThermodynamicELBO",
]
