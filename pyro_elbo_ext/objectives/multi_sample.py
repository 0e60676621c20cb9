"""Objectives of several particles: any bound on ``log p(x)`` with any estimator of its gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Unpack

from pyro_elbo_ext.bounds import CUBO, IWAE, TVO, Bound, Gradient, Renyi
from pyro_elbo_ext.bounds.bounds import Side
from pyro_elbo_ext.bounds.gradients import GradientName
from pyro_elbo_ext.history import History
from pyro_elbo_ext.objectives.arguments import OtherArguments, with_pyros_arguments
from pyro_elbo_ext.objectives.bound_estimate import estimate_bound
from pyro_elbo_ext.objectives.bound_record import Particles
from pyro_elbo_ext.objectives.evaluation import Args, Evaluation, Kwargs, Program
from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.terms import Terms

_INFINITY = float("inf")
_REASON = "a bound of several particles has no closed form: mean over its draws"


class MultiSampleELBO(Objective):
    r"""A bound on ``log p(x)`` of K particles as a loss for ``pyro.infer.SVI``.

    .. math:: L = \mathrm E\, f(\log w_1, \ldots, \log w_K), \qquad \log w_k = \log p(x, z_k) - \log q(z_k), \quad z_k \sim q

    with ``f`` given by ``bound``. Lower bounds are maximized; upper ones are minimized, so their loss is the bound itself.

    The bound is taken inside the plates that all sites of model and guide share, once for each element, and the plates'
    scale outside; so for local latents it is a bound for each datum, and unbiased under subsampling. With a latent
    outside the plate it is taken over the whole program, which needs all the data; see ``local_plates``. The particles
    share one subsample.

    Parameters
    ----------
    bound : Bound
        See :mod:`pyro_elbo_ext.bounds`.
    num_particles : int
        K.
    max_plate_nesting, max_iarange_nesting, strict_enumeration_warning
        As in :class:`~pyro_elbo_ext.DecomposedELBO`.
    ignore_jit_warnings, jit_options, retain_graph, tail_adaptive_beta
        As there.
    vectorize_particles : bool or "vmap"
        As in :class:`~pyro_elbo_ext.DecomposedELBO`.
    gradient : str or Gradient
        "pathwise", with leave-one-out score-function terms (VIMCO for IWAE) for sites whose draws are not reparameterized;
        "doubly_reparameterized" (DReG); or "score_function" at every site. See :mod:`pyro_elbo_ext.bounds`.
    local_plates : str or sequence of str, optional
        Take the bound inside these plates and the ELBO outside: all particles share one draw of the sites outside,
        ``E_q(w) [log p(w) - log q(w) + sum_i bound_i(w)]``. It is a lower bound whatever the subsample. With few
        particles and much data it is often tighter than the bound over the whole program, whose weights then are few;
        with many it is not, since the KL of the sites outside stays.
    history : bool or History
        As in :class:`~pyro_elbo_ext.DecomposedELBO`. The history's ``objective`` is the bound; its terms are plain
        means over the particles, so they make up the ELBO, with ``kl_prior`` sampled; ``contribution`` is each site's
        weighted one.

    Attributes
    ----------
    last : Terms or None
        The detached terms of the last evaluation, all particles', unweighted, and their ``contributions``.
    history : History or None
        One record for each call of ``loss_and_grads`` or, with gradients enabled, ``differentiable_loss``.

    Raises
    ------
    ValueError
        At construction for arguments out of range. At evaluation, before any parameter changes: if no such bound exists for
        these sites (saying why, and what to do), or for any of the reasons of :class:`~pyro_elbo_ext.DecomposedELBO`.
    """

    @with_pyros_arguments
    def __init__(
        self,
        bound: Bound,
        num_particles: int = 2,
        *args: Any,
        gradient: GradientName | Gradient = "pathwise",
        local_plates: str | Sequence[str] | None = None,
        history: bool | History = True,
        **options: Unpack[OtherArguments],
    ) -> None:
        if not isinstance(bound, Bound):
            raise TypeError(f"bound must be a Bound such as pyro_elbo_ext.bounds.bounds.IWAE(), not {bound!r}")
        super().__init__(num_particles, *args, gradient=gradient, history=history, **options)
        self.estimator.check(bound, num_particles)
        self.bound = bound
        self.maximized = bound.side == "lower"
        self.local_plates = (local_plates,) if isinstance(local_plates, str) else tuple(local_plates or ())
        self._last: Particles | None = None

    def _evaluate(
        self, model: Program, guide: Program, args: Args, kwargs: Kwargs, *, with_gradient: bool
    ) -> Evaluation:
        evaluation, self._last = estimate_bound(
            self,
            self.bound,
            model,
            guide,
            args,
            kwargs,
            local_plates=self.local_plates,
            reason=_REASON,
            with_gradient=with_gradient,
        )
        return evaluation

    @property
    def last(self) -> Terms | None:
        """Detached terms of the last evaluation; None before the first."""
        return None if self._last is None else self._last.terms()

    def forget(self) -> None:
        self._last = None

    def _check_trainable(self, evaluation: Evaluation) -> None:
        if self.maximized:
            return
        names = evaluation.model_parameters()
        if names:
            raise ValueError(
                f"{type(self).__name__} is minimized, so SVI would train the model's {', '.join(map(repr, names))} to "
                "make the data unlikely. Train the model with a lower bound; to fit the guide alone, hide its "
                "parameters from SVI: SVI(poutine.block(model, hide_types=['param']), guide, ...)."
            )


class ImportanceWeightedELBO(MultiSampleELBO):
    r"""The importance-weighted bound, ``log mean_k w_k``.

    It lies between the ELBO (K = 1) and ``log p(x)``, with a gap that falls as 1/K. Takes what :class:`MultiSampleELBO`
    takes, but for ``bound``.

    References
    ----------
    Burda, Grosse and Salakhutdinov (2016), "Importance weighted autoencoders". Rainforth et al. (2018), "Tighter variational
    bounds are not necessarily better": the guide's pathwise gradient drowns in noise as K grows; use
    ``gradient="doubly_reparameterized"`` (Tucker et al. 2019) for large K. Mnih and Rezende (2016) for discrete sites.
    """

    def __init__(self, num_particles: int = 2, *args: Any, **options: Any) -> None:
        super().__init__(IWAE(), num_particles, *args, **options)


class RenyiELBO(MultiSampleELBO):
    r"""The Renyi bound ``(1 / (1 - alpha)) log mean_k w_k^(1 - alpha)``: a drop-in for ``pyro.infer.RenyiELBO``.

    Takes Pyro's arguments in Pyro's order, then those of ``pyro.infer.ELBO`` and :class:`MultiSampleELBO`. Values and
    gradients equal Pyro's under the same seed where nothing is scaled and no draw is discrete. ``alpha=1``, an error
    there, is the limit, the ELBO. The negative bound is the loss for any ``alpha``, as in Pyro, though for ``alpha <
    0`` it is no lower bound.

    References
    ----------
    Li and Turner (2016), "Renyi divergence variational inference".
    """

    def __init__(
        self,
        alpha: float = 0,
        num_particles: int = 2,
        max_plate_nesting: float = _INFINITY,
        max_iarange_nesting: int | None = None,
        vectorize_particles: bool | Literal["vmap"] = False,
        strict_enumeration_warning: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            Renyi(alpha),
            num_particles,
            max_plate_nesting,
            max_iarange_nesting,
            vectorize_particles,
            strict_enumeration_warning,
            **options,
        )
        self.alpha = alpha
        self.maximized = True


class ChiUpperBound(MultiSampleELBO):
    r"""The chi upper bound CUBO, ``(1 / n) log mean_k w_k^n``: minimized, its value is the loss.

    It is an upper bound on ``log p(x)`` in the limit of many particles. With K of them its estimate is biased
    downwards, and minimizing that can run away to where few particles see any weight: use tens of particles, and start
    near the posterior. It fits the guide only: minimizing it over the model's parameters would make the data unlikely,
    so under SVI those are an error. Takes what :class:`MultiSampleELBO` takes, with ``n`` in place of ``bound``.

    References
    ----------
    Dieng, Tran, Ranganath, Paisley and Blei (2017), "Variational inference via chi upper bound minimization".
    """

    def __init__(self, n: float = 2, num_particles: int = 2, *args: Any, **options: Any) -> None:
        super().__init__(CUBO(n), num_particles, *args, **options)


class ThermodynamicELBO(MultiSampleELBO):
    r"""The thermodynamic variational objective: a Riemann sum of ``int_0^1 E_beta[log w] d beta = log p(x)``.

    The lower sum is maximized, the upper one minimized. Takes what :class:`MultiSampleELBO` takes, with ``betas`` and,
    by keyword, ``side`` in place of ``bound``; see :class:`pyro_elbo_ext.bounds.bounds.TVO`.

    References
    ----------
    Masrani, Le and Wood (2019), "The thermodynamic variational objective".
    """

    def __init__(
        self,
        betas: Sequence[float] = TVO().betas,
        num_particles: int = 2,
        *args: Any,
        side: Side = "lower",
        **options: Any,
    ) -> None:
        if not isinstance(betas, Iterable):
            raise TypeError(f"betas must be a sequence of numbers from 0 to 1, not {betas!r}")
        super().__init__(TVO(tuple(betas), side), num_particles, *args, **options)
