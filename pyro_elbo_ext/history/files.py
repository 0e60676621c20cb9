"""A history as an xarray Dataset and as a netCDF or zarr file, and the way back."""

from __future__ import annotations

import importlib.util
import io
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pyro_elbo_ext.files.atomic import write_whole
from pyro_elbo_ext.files.untrusted import loaded
from pyro_elbo_ext.history.reading import Decoded
from pyro_elbo_ext.history.record import LABELS, SITE_WEIGHT, VALUES, SiteInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    import xarray as xr
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

ATTRIBUTES = ("num_recorded", "thinning_stride", "full_resolution_from")
IDENTITY = (
    "elbo = sum(reconstruction) - sum(kl_prior); objective = sum(reconstruction) - kl_weight * sum(kl_prior); "
    "kl_prior is KL(q || prior); log p(x) = elbo + KL(q || posterior)"
)
BOUND_IDENTITY = (
    "elbo = sum(reconstruction) - sum(kl_prior); where there are contributions the objective is another bound, not linear "
    "in the log weights: objective = sum(contribution) + a remainder from the concentration of the weights; kl_prior is "
    "KL(q || prior), a contribution is no KL; log p(x) = elbo + KL(q || posterior)"
)
LONG_NAMES = {
    "log_p": "log density of the site under the model",
    "log_q": "log density of the site under the guide",
    "reconstruction": "E_q[log p(x | z)], the site's part",
    "kl_prior": "KL(q || prior), the site's part",
    "scale": "scale of the site in the model",
    "num_observations": "data elements that the site's scaled term stands for",
    "elbo": "evidence lower bound, every kl_prior with weight 1",
    "objective": "what was optimized: reconstruction - kl_weight * kl_prior",
    "kl_weight": "weight of kl_prior in the objective",
    SITE_WEIGHT: "weight of the site's kl_prior, or with free bits of the greater of kl_prior and its floor",
    "contribution": "sum_k g_k (log p_k - log q_k), the site's part in the bound; g is its gradient in the log weights",
    "kind": "observed, latent or auxiliary",
    "kl_method": "analytic or sampled; empty where there is no kl_prior",
    "kl_reason": "why the kl_prior is analytic or sampled",
}
ENGINES: dict[str, Literal["h5netcdf", "zarr"]] = {".nc": "h5netcdf", ".zarr": "zarr"}


class Row(NamedTuple):
    """One kept step, as ``Record.append`` takes it."""

    step: int
    sites: tuple[SiteInfo, ...]
    values: Floats  # (sites, 6), or (sites, 7) with weights by site
    objective: float
    kl_weight: float


def to_dataset(decoded: Decoded, by_step: dict[str, Floats], attrs: dict[str, Any]) -> xr.Dataset:
    """The kept steps as ``History.to_xarray`` describes them; ``by_step`` holds the variables of shape (rows,)."""
    import xarray as xr  # takes half a second with pandas: not before there is a file to make or to read

    steps, names, present, values, labels = decoded
    data: dict[str, Any] = {name: ("step", column) for name, column in by_step.items()}
    bound = decoded.has_contributions
    data.update(
        {name: (("step", "site"), column) for name, column in values.items() if bound or name != "contribution"}
    )
    first_row = present.argmax(0) if steps.size else np.zeros(0, np.int64)
    for name, label in labels.items():
        label[label == None] = ""  # noqa: E711 - elementwise; a file has no None
        fixed = label[first_row, np.arange(len(names))]
        data[name] = (("step", "site"), label) if ((label != fixed) & present).any() else ("site", fixed)
    dataset = xr.Dataset(data, {"step": steps, "site": np.array(names, object)})
    for key, variable in dataset.data_vars.items():
        variable.attrs["long_name"] = LONG_NAMES[str(key)]
    if bound:
        dataset["objective"].attrs["long_name"] = "what was optimized: a bound that is not linear in the log weights"
    identity = BOUND_IDENTITY if bound else IDENTITY
    dataset.attrs.update(title="Decomposed ELBO by step and site", identity=identity, **attrs)
    return dataset


def check_dataset(dataset: xr.Dataset) -> None:
    """ValueError if ``dataset`` lacks a variable or an attribute that ``to_dataset`` gives."""
    needed = {*VALUES, *LABELS, "reconstruction", "objective", "kl_weight", "step", "site"} - {"contribution"}
    missing = sorted((needed - set(dataset.variables)) | (set(ATTRIBUTES) - set(dataset.attrs)))
    if missing:
        raise ValueError(f"not a saved History: {', '.join(missing)} missing")
    steps = dataset.sizes.get("step", 0)
    if dataset["step"].dims != ("step",) or dataset["step"].dtype.kind not in "iu":
        raise ValueError("not a saved History: its steps are not whole numbers")
    recorded, stride, tail, most = (_count(dataset, name) for name in (*ATTRIBUTES, "max_steps"))
    if stride < 1 or not 0 <= tail <= recorded or (most and (most < 4 or steps > most)):
        given = {name: dataset.attrs[name] for name in (*ATTRIBUTES, "max_steps") if name in dataset.attrs}
        raise ValueError(f"not a saved History: {given} do not go together, with {steps} steps")
    expected = -(-tail // stride) + recorded - tail
    if expected != steps:
        raise ValueError(
            f"the dataset has {steps} steps where its attributes say {expected}: steps were taken out of it; use the "
            "dataset that to_xarray() or save() gave"
        )


def _count(dataset: xr.Dataset, name: str) -> int:
    value = dataset.attrs.get(name, 0)
    try:
        return operator.index(value.item() if isinstance(value, np.generic | np.ndarray) else value)
    except (TypeError, ValueError):
        raise ValueError(f"not a saved History: its {name} is {value!r}, not a whole number") from None


def rows_of(dataset: xr.Dataset) -> Iterator[Row]:
    """The steps of a dataset that ``to_dataset`` gave; equal sites are the same object."""
    import pandas as pd
    import xarray as xr

    dataset = dataset.transpose("step", "site")
    names, steps = dataset["site"].values.tolist(), dataset["step"].values.tolist()
    objective, kl_weight = dataset["objective"].values.tolist(), dataset["kl_weight"].values.tolist()
    if "contribution" not in dataset:  # none is finite, or the file is older than contributions
        dataset = dataset.assign(contribution=xr.full_like(dataset["log_p"], np.nan))
    values = np.stack([dataset[name].values for name in VALUES], -1)
    weighted = np.zeros(len(steps), bool)
    if SITE_WEIGHT in dataset:
        weights = dataset[SITE_WEIGHT].values
        values = np.concatenate([values, weights[:, :, None]], -1)
        weighted = ~np.isnan(weights).all(1)
    # A present site has a 0 in one of the two: kl_prior if observed, reconstruction if not.
    absent = np.isnan(values[:, :, 2]) & np.isnan(dataset["reconstruction"].values)
    labels = [np.broadcast_to(dataset[name].values.astype(object), absent.shape) for name in LABELS]
    codes = [pd.factorize(label.ravel())[0].reshape(absent.shape) for label in labels]
    # One SiteInfo tuple per distinct row of labels.
    _, firsts, layout = np.unique(np.hstack([absent, *codes]), axis=0, return_index=True, return_inverse=True)
    present = [np.flatnonzero(~absent[row]) for row in firsts]
    layouts = [
        tuple(SiteInfo(names[i], kind[row, i], method[row, i] or None, reason[row, i] or None) for i in here)
        for row, here in zip(firsts, present, strict=True)
        for kind, method, reason in [labels]
    ]
    for row, (step, i) in enumerate(zip(steps, layout.ravel(), strict=True)):
        width = len(VALUES) + weighted[row]
        yield Row(step, layouts[i], values[row, present[i], :width], objective[row], kl_weight[row])


def write(dataset: xr.Dataset, path: Path) -> None:
    """Write to ``path``, replacing it, in the format that its suffix says."""
    if _engine(path) == "zarr":
        dataset.to_zarr(path, mode="w", zarr_format=2)  # strings are outside the zarr 3 specification
    else:
        write_whole(path, _netcdf(dataset))


def _netcdf(dataset: xr.Dataset) -> bytes:
    """What a netCDF file of it has in it."""
    import h5netcdf
    from xarray.backends import H5NetCDFStore

    made = io.BytesIO()
    with h5netcdf.File(made, "w") as file:
        dataset.dump_to_store(H5NetCDFStore(file))
    return made.getvalue()


def read(path: Path) -> xr.Dataset:
    """The dataset that ``write`` wrote, in memory."""
    import xarray as xr

    engine = _engine(path)
    if not path.exists():
        raise FileNotFoundError(f"no such history: {path}")
    with xr.open_dataset(path, engine=engine) as dataset:
        return loaded(dataset, path)


def _engine(path: Path) -> Literal["h5netcdf", "zarr"]:
    engine = ENGINES.get(path.suffix)
    if engine is None:
        raise ValueError(f"a history is saved as {' or '.join(ENGINES)}, not {path.suffix!r}: {path}")
    if importlib.util.find_spec(engine) is None:
        raise ImportError(f"a {path.suffix} file needs the package {engine}: pip install {engine}")
    return engine
