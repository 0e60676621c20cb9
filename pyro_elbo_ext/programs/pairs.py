"""Do guide and model belong together?"""

from __future__ import annotations

from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample


def check_pair(model_trace: Trace, guide_trace: Trace) -> None:
    """Raise ValueError for sites that are marked for enumeration or missing from the guide."""
    for trace, where in ((guide_trace, "guide"), (model_trace, "model")):
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or site_is_subsample(node):
                continue
            if node["infer"].get("enumerate") and not node["is_observed"]:
                raise ValueError(
                    f"site '{name}' of the {where} is marked for enumeration (infer={{'enumerate': ...}}), which this ELBO "
                    "does not do. Use pyro.infer.TraceEnum_ELBO, or remove the mark to sample the site."
                )
            if where == "model" and not node["is_observed"] and name not in guide_trace:
                raise ValueError(
                    f"site '{name}' is latent in the model but the guide has no site of that name, so it has no log q. "
                    f"Add pyro.sample('{name}', ...) to the guide, or observe it in the model."
                )
