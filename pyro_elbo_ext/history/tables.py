"""Tables of a fit: by site, by step, and the means over the last steps with their standard errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pyro_elbo_ext.history.reading import Decoded
from pyro_elbo_ext.history.record import LABELS, SITE_WEIGHT

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

BY_SITE = ["step", "site", "kind", "log_p", "log_q", "reconstruction", "kl_prior", "kl_method", "kl_reason", "scale"]
BY_STEP = ["step", "elbo", "objective", "reconstruction", "kl_prior", "kl_weight", "num_observations"]
PER_OBSERVATION = ("log_p", "log_q", "reconstruction", "kl_prior", "elbo", "objective", "contribution")


def by_site(decoded: Decoded, divisor: Floats, kl_weight: Floats) -> pd.DataFrame:
    """One row per (step, site), columns ``BY_SITE``; nats over ``divisor`` (rows,).

    With ``contribution`` and ``kl_weight`` if there are any; a step without weights by site has its own, ``kl_weight``
    (rows,), at each site with a ``kl_prior``.
    """
    import pandas as pd  # takes a third of a second: not before there is a table to make

    row, site = np.nonzero(decoded.present)
    columns: dict[str, Any] = {
        name: column[decoded.present] for name, column in {**decoded.values, **decoded.labels}.items()
    }
    columns["step"] = decoded.steps[row]
    columns["site"] = np.array(decoded.names, object)[site]
    columns.update({name: columns[name] / divisor[row] for name in PER_OBSERVATION if name in columns})
    names = [*BY_SITE, *["contribution"] * decoded.has_contributions, *["kl_weight"] * decoded.has_site_weights]
    if decoded.has_site_weights:
        weights = decoded.values[SITE_WEIGHT]
        without = np.flatnonzero(np.isnan(weights).all(1))
        by_step = np.isin(row, without) & (columns["kind"] != "observed")
        columns["kl_weight"] = np.where(by_step, kl_weight[row], columns[SITE_WEIGHT])
    return pd.DataFrame(columns, columns=names)


def by_step(columns: dict[str, NDArray[Any]], divisor: Floats) -> pd.DataFrame:
    """One row per step, columns ``BY_STEP``, of ``columns`` (rows,) without the ELBO; divided as ``by_site`` does."""
    import pandas as pd

    columns = {**columns, "elbo": columns["reconstruction"] - columns["kl_prior"]}
    columns.update({name: columns[name] / divisor for name in PER_OBSERVATION if name in columns})
    return pd.DataFrame(columns, columns=BY_STEP)


def summarize(decoded: Decoded, elbo: Floats, objective: Floats) -> pd.DataFrame:
    """Means over the decoded steps, as ``History.summary`` describes them; ``elbo`` and ``objective`` (rows,) are theirs."""
    import pandas as pd

    _, names, present, values, labels = decoded
    terms = np.where(present, values["reconstruction"] - values["kl_prior"], 0.0)
    series = np.column_stack([terms, elbo])
    mean = series.mean(0)
    size = np.abs(mean[:-1])
    total = size.sum()
    # a particle of weight zero has made a mean infinite: then there are no shares
    share = np.full(len(names), 0.0 if total == 0 else np.nan) if total in (0, np.inf) else size / total
    seen = [[labels[name][present[:, i], i] for name in LABELS] for i in range(len(names))]
    methods = [", ".join(sorted({str(m) for m in method if m})) or None for _, method, _ in seen]
    columns: dict[str, list[Any]] = {
        "kind": [*(str(kind[-1]) for kind, _, _ in seen), "total"],
        "mean": [*mean],
        "se": [*standard_error(series)],
        "share": [*share, 1.0],
        "kl_method": [*methods, None],
    }
    rows = [*names, "ELBO"]
    if decoded.has_contributions:
        contribution = values["contribution"]
        bounded = np.isfinite(contribution).any(1)  # the ELBO's steps have none
        bound = objective[bounded].mean()
        of_bound = ("bound", bound, standard_error(objective[bounded][:, None])[0], np.nan, None)
        for column, value in zip(columns.values(), of_bound, strict=True):
            column.append(value)
        columns["contribution"] = [*np.where(present, contribution, 0.0)[bounded].mean(0), np.nan, bound]
        rows.append("objective")
    table = pd.DataFrame(columns, index=pd.Index(rows, name="site"))
    steps = decoded.steps
    table.attrs.update(window=len(steps), first_step=int(steps[0]), last_step=int(steps[-1]))
    return table


def standard_error(series: Floats) -> Floats:
    """Standard error of the mean of each column of ``series`` (n, m) allowing for autocorrelation, shape (m,).

    The long-run variance is ``-gamma_0 + 2 sum_k Gamma_k`` with ``Gamma_k = gamma_2k + gamma_2k+1`` cut where it first
    is not positive and made monotone (Geyer 1992, Practical Markov Chain Monte Carlo, section 3.3). NaN for fewer than 4
    rows, and for a column that is not finite.
    """
    n = len(series)
    finite = np.isfinite(series).all(0)
    if n < 4:
        return np.full(series.shape[1], np.nan)
    if not finite.all():
        errors = np.full(series.shape[1], np.nan)
        errors[finite] = standard_error(series[:, finite])
        return errors
    spectrum = np.fft.rfft(series - series.mean(0), 2 * n, axis=0)
    covariance = np.fft.irfft(np.abs(spectrum) ** 2, 2 * n, axis=0)[:n] / n
    pairs = covariance[0 : n - 1 : 2] + covariance[1:n:2]
    positive = np.logical_and.accumulate(pairs > 0, axis=0)
    variance = 2 * np.minimum.accumulate(np.where(positive, pairs, 0.0), axis=0).sum(0) - covariance[0]
    # An antithetic series may estimate a variance below 0: the bound on its efficiency that Stan uses.
    variance = np.maximum(variance, covariance[0] / max(np.log10(n), 1.0))
    return cast("Floats", np.sqrt(np.maximum(variance, 0.0) / n))
