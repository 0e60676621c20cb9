"""ELBO surgery: what ``KL(q || prior)`` of a local latent is made of (Hoffman and Johnson 2016)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_elbo_ext.amortized.local_sites import (
    LocalRun,
    as_batches,
    check_cover,
    check_finite,
    distribution,
    run_again,
    run_local,
)
from pyro_elbo_ext.inference_data.draws import to_numpy
from pyro_elbo_ext.programs.arguments import check_count, check_seed
from pyro_elbo_ext.programs.densities import log_prob
from pyro_elbo_ext.programs.randomness import untouched
from pyro_elbo_ext.terms import closed_forms
from pyro_elbo_ext.terms.closed_forms import Weight

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

NEAR_BOUND = 0.9  # share of log N above which the index-code information says little but that the codes tell data apart
_UNWEIGHTED = Weight(1.0, None)
TERMS = ("elbo", "reconstruction", "kl_prior", "index_code_mi", "marginal_kl_prior", "other_kl_prior")


@dataclass(frozen=True, repr=False)
class ElboSurgery:
    """The average ELBO per datum by its parts, in nats; made by `elbo_surgery`.

    Attributes
    ----------
    sites, plate
        The local latent sites, taken jointly, and their data plate.
    num_data, num_draws : int
        N, and the draws of the guide per datum.
    elbo, reconstruction, other_kl_prior : float
        ``elbo = reconstruction - kl_prior - other_kl_prior``; the last is that of all other guide sites, divided by N.
    kl_prior : float
        Mean over data of ``KL(q(z | x_n) || p(z))``, from the draws; exactly ``index_code_mi + marginal_kl_prior``.
    index_code_mi : float
        ``I_q(n; z)``: information of a code about which datum it is of. Between 0 and log N.
    marginal_kl_prior : float
        ``KL(q(z) || p(z))`` of the aggregate posterior ``q(z) = mean_n q(z | x_n)``.
    analytic_kl_prior : float or None
        ``kl_prior`` in closed form where there is one, to compare.
    errors : dict
        Standard error of each estimate: over draws of the guide, the data held fixed.
    """

    sites: tuple[str, ...]
    plate: str
    num_data: int
    num_draws: int
    elbo: float
    reconstruction: float
    kl_prior: float
    index_code_mi: float
    marginal_kl_prior: float
    other_kl_prior: float
    analytic_kl_prior: float | None
    errors: Mapping[str, float]

    @property
    def index_code_bound(self) -> float:
        """log N, the most that ``index_code_mi`` can be."""
        return math.log(self.num_data)

    @property
    def verdict(self) -> str:
        """One sentence on where ``kl_prior`` goes."""
        if self.kl_prior < 2 * self.errors["kl_prior"] + 0.01:
            return "kl_prior is about 0: the codes say nothing about the data (posterior collapse; see active_units)."
        share = self.index_code_mi / self.index_code_bound if self.num_data > 1 else 0.0
        text = f"The codes carry {share:.0%} of the log N = {self.index_code_bound:.2f} nats that would tell all data apart."
        if share > NEAR_BOUND:
            text += (
                " Near that bound: the codes of different data hardly overlap, and with more data index_code_mi would be "
                "larger and marginal_kl_prior smaller."
            )
        if self.marginal_kl_prior > max(1.0, self.index_code_mi):
            text += (
                " Most of kl_prior is marginal_kl_prior: the codes as a whole are not where the prior puts them, so draws "
                "from the prior decode badly. A richer or learned prior would lower it."
            )
        return text

    def to_dataframe(self) -> pd.DataFrame:
        """One row per term: ``mean`` and standard error ``se``, in nats per datum."""
        rows = {name: {"mean": getattr(self, name), "se": self.errors[name]} for name in TERMS}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("term")

    def plot(self, ax: Axes | None = None) -> Axes:
        """``kl_prior`` split into its two parts, beside log N; returns the axes."""
        from pyro_elbo_ext.amortized.plots import plot_surgery

        parts = {"index_code_mi": self.index_code_mi, "marginal_kl_prior": self.marginal_kl_prior}
        title = f"kl_prior {self.kl_prior:.2f} of ELBO {self.elbo:.2f} (reconstruction {self.reconstruction:.2f})"
        return plot_surgery(parts, self.index_code_bound, title, ax)

    def _head(self) -> str:
        return (
            f"ELBO surgery of {', '.join(self.sites)} over plate '{self.plate}': {self.num_data} data, "
            f"{self.num_draws} draws each; nats per datum"
        )

    def __repr__(self) -> str:
        table = self.to_dataframe().to_string(float_format="{:.4f}".format)
        return f"{self._head()}\n{table}\n{self.verdict}"

    def _repr_html_(self) -> str:
        return f"<p>{self._head()}</p>{self.to_dataframe().to_html(float_format='{:.4f}'.format)}<p>{self.verdict}</p>"


def elbo_surgery(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    site: str | Sequence[str] | None = None,
    plate: str | None = None,
    num_draws: int = 20,
    batches: Iterable[Any] | None = None,
    chunk_elements: int = 2**22,
    seed: int = 0,
    **kwargs: Any,
) -> ElboSurgery:
    r"""Take the average ELBO per datum of a model with local latents apart.

    .. math::

        \frac1N \mathrm{ELBO} = \frac1N\sum_n \mathrm E_{q(z|x_n)}[\log p(x_n \mid z)]
            - \underbrace{I_q(n; z)}_{\texttt{index\_code\_mi}}
            - \underbrace{\mathrm{KL}(q(z) \,\|\, p(z))}_{\texttt{marginal\_kl\_prior}},
        \qquad q(z) = \frac1N \sum_n q(z \mid x_n).

    Each draw ``z_n`` of the guide enters with its density under all N distributions ``q(z | x_m)``, so the cost is N x N
    densities per draw, taken in chunks. The two parts then add up to ``kl_prior`` exactly, draw by draw.

    Parameters
    ----------
    model, guide
        Pyro programs; called with ``*args, **kwargs``. Put modules with dropout or batch normalization in eval mode first.
    site
        Local latent sites, taken jointly; by default all in the plate. The guide must draw each from the data alone, and
        their joint prior must be the same for all data.
    plate
        The data plate; by default the one that those sites share with an observed site.
    num_draws
        Draws of the guide per datum, at least 2.
    batches
        Instead of ``args``: for each part of the data the arguments of model and guide, a tuple or list, or a single one.
        The parts together must have each datum once.
    chunk_elements
        About how many elements of a tensor to hold at once in the N x N densities.
    seed
        Of the random numbers; the generators, and the param store, are left as they were.

    Returns
    -------
    ElboSurgery

    Raises
    ------
    KeyError, ValueError
        If there is no such site or plate, a site has no q(z | x_n) of its own, the prior differs between data, or the data
        are a subsample.

    References
    ----------
    Hoffman and Johnson (2016), "ELBO surgery: yet another way to carve up the variational evidence lower bound".
    """
    check_seed(seed)
    check_count("num_draws", num_draws, 2)
    check_count("chunk_elements", chunk_elements, 1)
    parts = as_batches(args, batches)
    with untouched(seed):
        first = runs = [run_local(model, guide, part, kwargs, site, plate) for part in parts]
        check_cover(runs, batches is not None)
        _check_common_prior(runs)
        draws = [_one_draw(runs, chunk_elements)]
        for _ in range(num_draws - 1):
            runs = [run_again(run, model, guide, part, kwargs) for run, part in zip(first, parts, strict=True)]
            draws.append(_one_draw(runs, chunk_elements))
        analytic = _analytic_kl_prior(first)
    size = sum(run.plate.size for run in first)
    has_shared_draws = any(other.kind != "observed" for run in first for other in run.others)
    means, errors = _summarize(draws, shared=has_shared_draws)
    names = tuple([one.name for one in first[0].local])
    return ElboSurgery(names, first[0].plate.name, size, num_draws, **means, analytic_kl_prior=analytic, errors=errors)


class _Draw(NamedTuple):
    """One draw of all local latents: arrays of shape ``(N,)``, and what is outside the plate, per datum, a scalar."""

    reconstruction: Floats
    index_code: Floats  # log q(z_n | x_n) - log q(z_n)
    marginal: Floats  # log q(z_n) - log p(z_n)
    other: float


def _one_draw(runs: Sequence[LocalRun], chunk_elements: int) -> _Draw:
    size = sum(run.plate.size for run in runs)
    own, prior, aggregate, inside, outside = [], [], [], [], 0.0
    for run in runs:
        label = f"log q of {', '.join(site.name for site in run.local)}"
        log_q = torch.stack([run.by_datum(distribution(site).log_prob(site.q[-1]["value"])) for site in run.local]).sum(
            0
        )
        check_finite(log_q, label)
        log_p, (reconstruction, rest) = run.log_prior(), run.reconstruction()
        check_finite(log_p, "log p of the local sites")
        check_finite(reconstruction, "the reconstruction")
        own.append(log_q)
        prior.append(log_p)
        inside.append(reconstruction)
        outside += float(rest) / len(runs)  # each part's run has the sites outside the plate once more
        aggregate.append(_log_aggregate(run, runs, size, chunk_elements))
    q_own, p_own, q_all, within = (to_numpy(torch.cat(values).double()) for values in (own, prior, aggregate, inside))
    other = _other_kl_prior(runs)
    return _Draw(within + outside / size, q_own - q_all, q_all - p_own, other / size)


def _other_kl_prior(runs: Sequence[LocalRun]) -> float:
    """Sampled ``kl_prior`` of the guide's other sites: summed over data in the plate, averaged over runs outside."""
    total = 0.0
    for run in runs:
        for site in run.others:
            if site.kind == "observed":
                continue
            densities = [(node, run.guide_trace, 1.0) for node in site.q]
            if site.p is not None:
                densities.append((site.p, run.model_trace, -1.0))
            for node, trace, sign in densities:
                share = run.scale if run.has_plate(node) else len(runs)
                total += sign * float(log_prob(node, trace).sum()) / share
    return total


def _log_aggregate(run: LocalRun, runs: Sequence[LocalRun], size: int, chunk_elements: int) -> Tensor:
    """``log mean_m q(z_n | x_m)`` over the data of all runs, for the draws of one run, shape ``(run.plate.size,)``."""
    widest = max(_elements(other) for other in runs)
    rows = max(1, chunk_elements // widest)
    found = []
    for start in range(0, run.plate.size, rows):
        chunk = slice(start, start + rows)
        total: Tensor | None = None
        for other in runs:
            log_q = torch.stack([_cross(run, other, i, chunk) for i in range(len(run.local))]).sum(0)
            part = torch.logsumexp(log_q, 1)
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        found.append(total - math.log(size))
    return torch.cat(found)


def _elements(run: LocalRun) -> int:
    return max(int(site.q[-1]["value"].numel()) for site in run.local)


def _cross(run: LocalRun, other: LocalRun, index: int, chunk: slice) -> Tensor:
    """``log q(z_n | x_m)`` of one site for a chunk of draws n of ``run`` and all data m of ``other``, shape ``(n, m)``."""
    site, fn = run.local[index], distribution(other.local[index])
    value: Tensor = site.q[-1]["value"]
    dim = run.plate.dim
    assert dim is not None
    axis = dim - len(fn.event_shape)
    log_q = _log_prob(fn, value.movedim(axis, 0)[chunk].unsqueeze(axis), site.name)
    return log_q.movedim(dim, 1).reshape(len(log_q), other.plate.size, -1).sum(2)


def _log_prob(fn: Distribution, value: Tensor, name: str) -> Tensor:
    try:
        return fn.log_prob(value)
    except (KeyError, NotImplementedError) as error:
        raise ValueError(
            f"the density of site '{name}' is known only at its own draws, not at other data's: {error}. Use a "
            "distribution or flow that can be evaluated anywhere."
        ) from error


def _check_common_prior(runs: Sequence[LocalRun]) -> None:
    """The aggregate posterior has one prior to be compared with only if all data share it."""
    for index, site in enumerate(runs[0].local):
        value: Tensor = site.q[-1]["value"]
        dim = runs[0].plate.dim
        assert dim is not None
        axis = dim - len(distribution(site).event_shape)
        by_datum = value.movedim(axis, 0)
        points = by_datum[[0, len(by_datum) // 2, -1]].unsqueeze(axis)
        densities = []
        for run in runs:
            node: Any = run.local[index].p
            log_p = _log_prob(node["fn"], points, site.name)
            densities.append(log_p.movedim(dim, 1).reshape(len(points), run.plate.size, -1).sum(2))
        log_p = torch.cat(densities, 1)
        if not torch.allclose(log_p, log_p[:, :1].expand_as(log_p), rtol=1e-4, atol=1e-4, equal_nan=True):
            raise ValueError(
                f"the prior of site '{site.name}' differs between data of plate '{runs[0].plate.name}' (it depends on the "
                "data or on another local latent), so there is no prior to compare the aggregate posterior with. Leave "
                "the site out by site=[...]."
            )


def _analytic_kl_prior(runs: Sequence[LocalRun]) -> float | None:
    total, size = 0.0, sum(run.plate.size for run in runs)
    for run in runs:
        for site in run.local:
            node: Any = site.p
            try:
                value, _ = closed_forms.kl_prior(distribution(site), node["fn"], _UNWEIGHTED, _UNWEIGHTED)
            except NotImplementedError:
                return None
            total += float(value.double().sum())
    return total / size


def _summarize(draws: Sequence[_Draw], *, shared: bool) -> tuple[dict[str, float], dict[str, float]]:
    reconstruction, index_code, marginal = (np.stack(values) for values in list(zip(*draws, strict=True))[:3])
    other = np.array([draw.other for draw in draws])
    values = {
        "reconstruction": reconstruction,
        "kl_prior": index_code + marginal,
        "index_code_mi": index_code,
        "marginal_kl_prior": marginal,
        "other_kl_prior": np.broadcast_to(other[:, None], reconstruction.shape),
    }
    values["elbo"] = reconstruction - values["kl_prior"] - values["other_kl_prior"]
    means = {name: float(values[name].mean()) for name in TERMS}
    return means, {name: standard_error(values[name], shared=shared) for name in TERMS}


def standard_error(values: Floats, *, shared: bool) -> float:
    """Of the mean of ``values``, shape ``(draws, data)``: over draws, the data held fixed.

    ``shared`` says that the data of one draw have draws in common (of global sites); otherwise they are independent, and
    the mean's variance is known from that of each datum.
    """
    draws, data = values.shape
    if shared:
        return float(values.mean(1).std(ddof=1) / math.sqrt(draws))
    return float(math.sqrt(values.var(0, ddof=1).sum() / draws) / data)
