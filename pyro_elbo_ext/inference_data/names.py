"""Names of variables that xarray, netCDF and zarr can hold, and the way back to the names of the sites.

The rule, the same for every export: ``/`` (as ``pyro.contrib.autoname.scope`` makes), ``\\`` and control characters
become ``.``; a space at the end becomes ``_``; a name that does not begin with a letter, a digit or ``_`` gets a ``_`` in
front; and a name that is taken by then, as ``chain`` and ``draw`` always are, gets a ``_`` at the end. Names that need no
change come first. A variable that is renamed keeps its site's name in ``attrs["site"]``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import xarray as xr

SAMPLE_DIMS = ("chain", "draw")
SITE = "site"  # attribute of a renamed variable
_FILES = ("zarr.json",)  # of a zarr store's own


def storable(name: str) -> str:
    """The name without what files cannot hold."""
    kept = "".join("." if char in "/\\" or unicodedata.category(char) in ("Cc", "Cs") else char for char in name)
    stripped = kept.rstrip(" ")
    kept = stripped + "_" * (len(kept) - len(stripped))
    begins_well = kept[:1] == "_" or kept[:1].isalnum() or kept[:1] > "\x7f"
    return kept if begins_well and kept not in _FILES else f"_{kept}"


def variables_of(sites: Iterable[str], taken: Iterable[str] = SAMPLE_DIMS) -> dict[str, str]:
    """Site to the name of its variable; all differ, from each other and from those that are ``taken``."""
    sites, used = list(dict.fromkeys(sites)), set(taken)
    found = {site: site for site in sites if storable(site) == site and site not in used}
    used |= set(found)
    for site in sites:
        if site not in found:
            name = storable(site)
            while name in used:
                name += "_"
            found[site] = name
            used.add(name)
    return {site: found[site] for site in sites}


def written(site: str) -> str:
    """A site's name as an attribute in a file, which holds all characters but two kinds."""
    return site.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def site_of(name: Any, variable: xr.DataArray) -> str:
    """The site of a variable: the name that it had, or its own."""
    return str(variable.attrs.get(SITE, name))


def by_site(data: xr.Dataset) -> dict[str, xr.DataArray]:
    """Site to variable."""
    return {site_of(name, variable): variable for name, variable in data.data_vars.items()}


def found_in(data: Mapping[str, Any], site: str) -> str | None:
    """The name that a site's draws have in a mapping: its own, or what an export calls it; None if they are not there."""
    return next((name for name in (site, written(site), storable(site)) if name in data), None)


def named_as(data: xr.Dataset, other: xr.Dataset) -> xr.Dataset:
    """``data`` with the names that ``other`` has for the same sites."""
    sites = {site_of(name, variable): str(name) for name, variable in data.data_vars.items()}
    renamed: dict[str, str] = {}
    for name, variable in other.data_vars.items():
        site = site_of(name, variable)
        own = sites.get(site)
        if own is None and name not in data.data_vars:
            own = next((str(n) for n in data.data_vars if storable(str(n)) == storable(str(name))), None)
        if own is not None and own != name and own not in renamed:
            renamed[own] = str(name)
    for own, name in list(renamed.items()):
        if name in data.data_vars and name not in renamed:  # of another site, which takes the free name
            renamed[name] = own
    return data.rename_vars(renamed)
