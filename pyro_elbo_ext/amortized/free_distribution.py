"""A distribution with parameters of its own: the same family, free, started at given values."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from pyro.distributions import Independent
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, biject_to, constraints
from torch.distributions.transforms import LowerCholeskyTransform

from pyro_elbo_ext.terms.closed_forms import bare


class FreeDistribution:
    """The family of ``fn`` with unconstrained leaf tensors in place of its parameters.

    Parameters
    ----------
    fn
        A reparameterized distribution whose parameters have fixed constraints; may be wrapped in Independent or expanded.
    site
        Its name, for errors.

    Attributes
    ----------
    leaves : dict of str to Tensor
        Unconstrained parameters, started at those of ``fn``; one set for each element of the batch.

    Raises
    ------
    ValueError
        If the family is not reparameterized, is masked, or cannot be rebuilt from its parameters.
    """

    def __init__(self, fn: Distribution, site: str) -> None:
        found = bare(fn)
        leaf, self._event_dims = found.leaf, found.event_dims
        self._family: Any = type(leaf)
        family = self._family.__name__
        if found.masks:
            raise ValueError(f"site '{site}' has a masked distribution, {family}: leave the mask off")
        if not leaf.has_rsample:
            raise ValueError(
                f"site '{site}' is {family}, whose draws are not reparameterized: its parameters cannot be optimized per "
                "datum by gradients. Use a reparameterized family (Normal, Gamma, ...)."
            )
        leaf = leaf.expand(fn.batch_shape + fn.event_shape[: self._event_dims])
        if isinstance(inspect.getattr_static(leaf, "support"), constraints.dependent_property):
            raise ValueError(
                f"site '{site}' is {family}, whose support moves with its parameters: the ELBO has no gradient in them"
            )
        names = list(leaf.arg_constraints)
        if isinstance(leaf, MultivariateNormal):  # it has three names for one parameter
            names = ["loc", "scale_tril"]
        self.leaves: dict[str, Tensor] = {}
        self._transforms: dict[str, Any] = {}
        try:
            for name in names:
                is_tril = name == "scale_tril"  # torch has no bijection registered for it
                self._transforms[name] = LowerCholeskyTransform() if is_tril else biject_to(leaf.arg_constraints[name])
                start = self._transforms[name].inv(getattr(leaf, name).detach())
                self.leaves[name] = start.contiguous().clone().requires_grad_()
            again = self.distribution()
        except (NotImplementedError, AttributeError, TypeError) as error:
            raise ValueError(
                f"site '{site}' is {family}, which cannot be rebuilt from free parameters {names}: {error}. "
                "Families whose parameters have fixed constraints can (Normal, MultivariateNormal, Gamma, ...)."
            ) from error
        with torch.no_grad():
            value = fn.sample()
            if not torch.allclose(again.log_prob(value), fn.log_prob(value), rtol=1e-3, atol=1e-3):
                raise ValueError(
                    f"site '{site}' is {family}, whose density is not that of the family rebuilt from its parameters "
                    f"{names}"
                )

    def distribution(self, *, detached: bool = False) -> Any:
        """The distribution at the present parameters; ``detached`` without their gradients."""
        values = {}
        for name, leaf in self.leaves.items():
            values[name] = self._transforms[name](leaf.detach() if detached else leaf)
        fn = self._family(**values, validate_args=False)
        return Independent(fn, self._event_dims) if self._event_dims else fn
