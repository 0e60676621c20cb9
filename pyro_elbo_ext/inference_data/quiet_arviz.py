"""Importing ArviZ without the notice of its next release."""

from __future__ import annotations

import sys
import warnings
from typing import Any


def import_arviz() -> Any:
    """The installed ArviZ. Importing it takes seconds, so call this where it is needed and not before.

    ArviZ 0.x announces its next release by a FutureWarning at the first import of a day. Whoever fits a model with this
    package has not imported ArviZ and can do nothing about it: both generations work here.
    """
    if "arviz" not in sys.modules:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
            import arviz
    import arviz

    return arviz
