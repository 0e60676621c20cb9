"""The model against the guide's draws, with a look at the indices of plates that subsample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.subsample_messenger import _Subsample
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def replayed(model: Callable[..., Any], guide_trace: Trace) -> Callable[..., Any]:
    """The model with the guide's draws at its sites, as ``poutine.replay`` gives it.

    Raises
    ------
    ValueError
        When it is called, if the model gives a plate other indices than those of the guide's plate of that name.
    """
    replay: Callable[..., Any] = _Replay(guide_trace)(model)
    return replay


class _Replay(ReplayMessenger):
    """Pyro's own, but where the model gives a plate its indices, in ``subsample=``, they must be the guide's.

    Pyro overwrites them by what the guide has drawn, which makes local sites of one part of the data, and data of another.
    """

    def _pyro_sample(self, msg: Any) -> None:
        given = msg["value"]
        super()._pyro_sample(msg)
        theirs = msg["value"]
        if given is not theirs and given is not None and isinstance(msg["fn"], _Subsample):
            assert self.trace is not None
            _check(msg, given, theirs, self.trace.nodes[msg["name"]]["fn"])


class OwnIndices(Messenger):
    """The same look at a model that somebody else replays, as Pyro's losses do; to be entered inside of that."""

    def __init__(self) -> None:
        super().__init__()
        self._given: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            self._given[msg["name"]] = msg["value"]

    def _pyro_post_sample(self, msg: Any) -> None:
        given = self._given.pop(msg["name"], None)
        if given is not None and given is not msg["value"]:
            _check(msg, given, msg["value"], msg["fn"])


def _check(msg: Any, given: Any, theirs: Any, guide: _Subsample) -> None:
    if get_proxy_mode() is not None:  # values are not to be read while a graph is made, but a draw is always another
        differ = guide.subsample_size is not None and guide.subsample_size < guide.size
    else:
        ours, others = torch.as_tensor(given), torch.as_tensor(theirs)
        differ = ours.shape != others.shape or not torch.equal(ours.to(others.device), others)
    if differ:
        name, size = msg["name"], msg["fn"].size
        raise ValueError(
            f"plate '{name}': the model gives it the indices of its data (subsample=), and the guide's plate of that name "
            "has others, such as a draw of its own: local sites would be of other rows than the data. Give the guide the "
            f"same indices: an autoguide by create_plates, as AutoNormal(model, create_plates=lambda idx, *args: "
            f"pyro.plate('{name}', {size}, subsample=idx)), which is called with the model's arguments; a guide of your own "
            "in its plate."
        )
