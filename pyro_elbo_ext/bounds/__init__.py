"""What an objective estimates: a bound on ``log p(x)``, how its gradient is estimated, and weights of ``kl_prior``."""

from pyro_elbo_ext.bounds.bounds import CUBO, ELBO, IWAE, TVO, Bound, Renyi
from pyro_elbo_ext.bounds.gradients import (
    DoublyReparameterized,
    Gradient,
    Path,
    Pathwise,
    ScoreFunction,
    VarGrad,
    Weights,
)
from pyro_elbo_ext.bounds.weighting import Constant, CyclicalWarmup, Geco, LinearWarmup

__all__ = [
    "CUBO",
    "ELBO",
    "IWAE",
    "TVO",
    "Bound",
    "Constant",
    "CyclicalWarmup",
    "DoublyReparameterized",
    "Geco",
    "Gradient",
    "LinearWarmup",
    "Path",
    "Pathwise",
    "Renyi",
    "ScoreFunction",
    "VarGrad",
    "Weights",
]
