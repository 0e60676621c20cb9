"""A Pyro program as one ATen graph: steps of SVI at the speed of machine code."""

from pyro_elbo_ext.compile.errors import CannotCompile
from pyro_elbo_ext.compile.svi import CompiledSVI

__all__ = ["CannotCompile", "CompiledSVI"]
