"""When to stop, and when to lower the learning rate."""

from pyro_elbo_ext.training.stopping.adaptive import AdaptiveStopping
from pyro_elbo_ext.training.stopping.rules import Decision, FixedSteps, Patience, StoppingRule

__all__ = ["AdaptiveStopping", "Decision", "FixedSteps", "Patience", "StoppingRule"]
