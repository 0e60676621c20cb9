"""Training in several processes. Lightning is imported only by `pyro_elbo_ext.training.distributed.lightning`."""

from pyro_elbo_ext.training.distributed.svi import DistributedSVI

__all__ = ["DistributedSVI"]
