"""What is wrong with a program that failed, or whose log density is not finite: one sentence for each mistake.

Nothing here is asked while all is well, so it may wait for the device.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import sum_rightmost
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor
from torch.distributions import Independent, constraints

from pyro_elbo_ext.programs.arguments import named_arguments
from pyro_elbo_ext.programs.nodes import (
    PARTICLE_PLATE,
    Node,
    base_distribution,
    innermost,
    is_data,
    is_latent,
    is_masked,
    is_point_mass,
    is_subsample,
    says_what_it_takes,
    tensor_options,
)

_OF_DTYPES = re.compile(r"dtype|scalar type|Input type", re.IGNORECASE)  # as torch's messages have it


def fault_of_run(error: Exception, trace: Trace, where: str) -> Exception | None:
    """A better error for a program ``where`` that failed after the sites of ``trace``; None if there is none."""
    if isinstance(error, ZeroDivisionError):  # Pyro's own for pyro.plate(name, 0)
        return ValueError(f"{_empty_plate(error)}: {error}. Skip empty batches.")
    if isinstance(error, torch.linalg.LinAlgError) or not isinstance(error, ValueError | RuntimeError):
        return None
    discrete = re.match(r"Continuous inference cannot handle discrete sample site '(.*?)'", str(error))
    if discrete:
        return ValueError(
            f"latent site '{discrete[1]}' is discrete, and an autoguide is of continuous sites. Mark it, with "
            "pyro.infer.config_enumerate(model): fit(model, 'auto', ...) and run_nuts then sum it out. For a guide of the "
            f"others hide it: poutine.block(model, hide=['{discrete[1]}'])."
        )
    observed_there = re.match(r"site (.*) must be sampled in trace", str(error))
    if observed_there:
        return ValueError(
            f"site '{observed_there[1]}' is observed in the guide, but latent in the model. Sample it in the guide, or "
            "observe it in the model."
        )
    if isinstance(error, RuntimeError) and _OF_DTYPES.search(str(error)):
        return RuntimeError(f"{_dtypes(trace, where)}\n{error}")
    try:
        sentence = nan_parameter(trace) or _draw_at_fault(trace, where)
    except RuntimeError:  # under torch.vmap values cannot be looked at; the program is then run draw by draw
        return None
    return None if sentence is None else ValueError(f"{sentence}\n{brief(error)}")


def brief(error: Exception) -> str:
    """An error's words without the values, and without Pyro's table of shapes."""
    return re.split(r", but found invalid values|\n\s*Trace Shapes:", str(error))[0].strip()


def cause(model_trace: Trace, guide_trace: Trace | None = None, *, of_gradient: bool = False) -> str | None:
    """Why log densities of these traces, or their gradients, are not finite; None where it cannot be told."""
    if guide_trace is not None and (sentence := _draw_at_fault(guide_trace, "guide")):
        return sentence
    for trace in (guide_trace, model_trace):
        if trace is not None and (sentence := nan_parameter(trace)):
            return sentence
    if sentence := _draw_at_fault(model_trace, "model"):
        return sentence
    for trace in (model_trace, guide_trace):
        for node in trace.nodes.values() if trace is not None else ():
            if node["type"] != "sample" or is_subsample(node) or _is_finite(node, of_gradient):
                continue
            if trace is model_trace and is_latent(node) and is_point_mass(node["fn"]):
                return dirac(node)
            if sentence := data_at_fault(node) or _argument_at_fault(node, trace):
                return sentence
    return None


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def dirac(node: Node) -> str:
    """Says that a latent site of the model has no density."""
    name = node["name"]
    return (
        f"latent site '{name}' of the model is a point mass ({base_distribution(node['fn'])}), of which no draw of a guide "
        f"has a density. Write pyro.deterministic('{name}', ...) in its place."
    )


def check_data(trace: Trace) -> None:
    """Look at the data of a model's trace whose log densities of observed sites are computed; waits for the device.

    Raises
    ------
    ValueError
        For data without a finite density, if it is the data, or an argument, that is not finite; and for data outside the
        support where values are validated, which not every density says.
    """
    for node in trace.nodes.values():
        if node["type"] != "sample" or is_subsample(node) or not is_data(node) or support_is_drawn(node):
            continue
        sentence = None
        if not _is_finite(node, behind_masks=False):
            sentence = data_at_fault(node) or _argument_at_fault(node, trace)
        elif _validates(node) and not (node["value"].is_floating_point() and bool(node["value"].isnan().any())):
            sentence = _data_outside(node)
        if sentence is not None:
            raise ValueError(sentence)


def support_is_drawn(node: Node) -> bool:
    """Whether finite data may be outside the support at some draws and inside at others: its bounds are tensors."""
    try:
        support = node["fn"].support
    except NotImplementedError:
        return False
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    value = node["value"]
    return any(isinstance(bound, Tensor) for bound in vars(support).values()) and bool(value.isfinite().all())


def _validates(node: Node) -> bool:
    """Whether all values of a site count, and its distribution looks at them."""
    return not is_masked(node) and bool(getattr(innermost(node["fn"]), "_validate_args", False))


def data_at_fault(node: Node) -> str | None:
    """Observed values that are NaN, infinite or outside the support; None where there are none."""
    if node["type"] != "sample" or is_subsample(node) or not is_data(node) or node["mask"] is False:
        return None
    value, fn, name = _of_one_particle(node), node["fn"], node["name"]
    if not isinstance(value, Tensor) or not value.numel():
        return None
    kind = base_distribution(fn)
    if value.is_floating_point():
        for what, elements in _not_finite_in(value):
            bad = sum_rightmost(elements, min(fn.event_dim, value.dim())) > 0
            if bad.any():
                return (
                    f"observed site '{name}' has {what} in {int(bad.sum())} of {bad.numel()} observations, for which its "
                    f"{kind} has no finite log density, or under a mask no finite gradient. Drop them, replace them by "
                    "numbers and mask them (poutine.mask, or obs_mask=), or use a distribution that leaves them out, such "
                    "as dist.NanMaskedNormal or dist.NanMaskedMultivariateNormal."
                )
    return _data_outside(node)


def _data_outside(node: Node) -> str | None:
    outside = _outside(node)
    if outside is None:
        return None
    return (
        f"observed site '{node['name']}' has data outside the support of its {base_distribution(node['fn'])}, "
        f"{_support(node)}: {outside}. Look for wrong units or codes in the data, or use another distribution."
    )


def counts_at_fault(node: Node) -> str | None:
    """Data of a Multinomial that are no whole numbers, which alone torch does not ask for; None where they are."""
    if not is_data(node) or not node["value"].is_floating_point() or is_masked(node):
        return None
    support = node["fn"].support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return _data_outside(node) if isinstance(support, type(constraints.multinomial(1))) else None


def dtype_at_fault(node: Node) -> str | None:
    """Says that a value is of another dtype than the parameters of its distribution; None if it is not."""
    wanted, _ = tensor_options(innermost(node["fn"]))
    if node["value"].dtype == wanted:
        return None
    return (
        f"at site '{node['name']}', a value of dtype {_dtype(node['value'])} does not fit its "
        f"{base_distribution(node['fn'])} of {str(wanted).removeprefix('torch.')}. Convert it, as y.float() does."
    )


def no_tensor(node: Node) -> str:
    """Says that a value is none of torch's tensors."""
    return (
        f"at site '{node['name']}', the value is a {type(node['value']).__name__} and no tensor. Convert it, by "
        "torch.as_tensor."
    )


def _argument_at_fault(node: Node, trace: Trace) -> str | None:
    """Says which argument is not finite, where the density of a site is not; None where there is none."""
    for name, value in _given(trace):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        for what, elements in _not_finite_in(value):
            if bool(elements.any()):
                return (
                    f"site '{node['name']}' has no finite log density, and {name} has {what} in "
                    f"{int(elements.sum())} of {elements.numel()} elements. Drop the rows, or replace them by numbers."
                )
    return None


def _given(trace: Trace) -> list[tuple[str, Any]]:
    """The arguments of a run, with what errors call them."""
    given = trace.nodes.get("_INPUT", {"args": (), "kwargs": {}})
    return named_arguments(given.get("program"), given["args"], given["kwargs"])


def _not_finite_in(value: Tensor) -> tuple[tuple[str, Tensor], ...]:
    """What is not finite, in words, and where it is."""
    return ("NaN", value.isnan()), ("infinite values", value.isinf())


def draw_outside(node: Node) -> str | None:
    """Says that a draw is NaN or outside the support of the model's latent site ``node``; None if it is neither."""
    if node["value"].is_floating_point() and bool(node["value"].isnan().any()):
        return _draws_nan(node["name"], "guide")
    outside = _outside(node)
    if outside is None:
        return None
    return (
        f"the guide draws site '{node['name']}' outside the support of the model's {base_distribution(node['fn'])}, "
        f"{_support(node)}: {outside}. Give the guide's site that support, by another distribution or by a transform."
    )


NO_LATENT = (
    "the model has no continuous latent site, so there is no posterior to find. Give it a latent site, or train its "
    "parameters alone, by pyro.infer.SVI with an empty guide."
)


def discrete_latent(node: Node, *, by_hand: bool = False) -> str:
    """Says that a latent site is discrete, and how to sum it out; ``by_hand`` where Pyro's enumeration is of no use."""
    fn, name = node["fn"], node["name"]
    advice = "Sum it out by hand." if by_hand else "Sum it out, with pyro.infer.config_enumerate(model) or by hand."
    if not getattr(fn, "has_enumerate_support", False):
        advice = "Its values cannot be enumerated: sum it out by hand, or replace it by a continuous site."
    return (
        f"latent site '{name}' is discrete ({base_distribution(fn)}): it has no place in a continuous space and no "
        f"gradient. {advice}"
    )


def shapes_at_fault(node: Node) -> str | None:
    """Says that a value does not broadcast against its distribution, or data not have its event shape; else None."""
    if is_data(node) and of_event_at_fault(node):
        return f"at site '{node['name']}', a value of {described(node)}. {REMEDY}"
    try:
        value, shape = node["value"].shape, node["fn"].shape()
        torch.broadcast_shapes(value, shape)
    except RuntimeError:
        return f"at site '{node['name']}', a value of {described(node)}. {REMEDY}"
    except (AttributeError, NotImplementedError):  # a distribution that has no shapes
        return None
    return None


def of_event_at_fault(node: Node) -> bool:
    """Whether a value has not the event shape of its distribution, which its density would broadcast over.

    One number for all of an event is what the model says, as Pyro's own programs do.
    """
    fn, value = node["fn"], node["value"]
    event_shape = getattr(fn, "event_shape", ())
    if not len(event_shape) or not isinstance(value, Tensor) or not value.dim():
        return False
    return value.shape[max(value.dim() - len(event_shape), 0) :] != event_shape and not says_what_it_takes(fn)


def _empty_plate(error: BaseException) -> str:
    """The plate that was being made, found in the frames of Pyro's error."""
    name, at = None, error.__traceback__
    while at is not None:
        found = at.tb_frame.f_locals
        if isinstance(found.get("self"), SubsampleMessenger | IndepMessenger):
            name = found.get("name", name)
        at = at.tb_next
    return "a plate" if name is None else f"plate '{name}'"


REMEDY = "Make the shapes agree, with .to_event(...), pyro.plate(...) or an unsqueeze."


def described(node: Node) -> str:
    fn = node["fn"]
    shapes = f"batch shape {tuple(fn.batch_shape)}"
    if len(fn.event_shape):
        shapes += f" and event shape {tuple(fn.event_shape)}"
    return f"shape {tuple(node['value'].shape)} does not fit a distribution with {shapes}"


@torch.no_grad()
def _is_finite(node: Node, behind_masks: bool) -> bool:
    """Whether the density, if computed, is finite; behind masks too, where what is not finite spoils the gradient."""
    density = node.get("log_prob")
    if density is None:
        return True
    if not behind_masks:
        return bool(torch.isfinite(density).all())
    fn = node["fn"]
    while isinstance(fn, MaskedDistribution | Independent):
        fn = fn.base_dist
    try:
        density = node["unscaled_log_prob"] if fn is node["fn"] else fn.log_prob(node["value"])
    except ValueError:  # values are validated
        return False
    return bool(torch.isfinite(density).all())


def nan_parameter(trace: Trace) -> str | None:
    """Says which parameter has NaN."""
    for name, node in trace.nodes.items():
        if node["type"] == "param" and isinstance(node["value"], Tensor) and bool(node["value"].isnan().any()):
            return f"parameter '{name}' has NaN: set it anew, or train again from other starting values."
    return None


def _draws_nan(name: str, where: str) -> str:
    return f"site '{name}' of the {where} draws NaN. Look for parameters that are NaN, from a fit that diverged."


def _of_one_particle(node: Node) -> Any:
    """An observed value, which all particles of a batched run have in common."""
    value = node["value"]
    for frame in node["cond_indep_stack"]:
        if frame.name == PARTICLE_PLATE and isinstance(value, Tensor):
            dim = frame.dim - node["fn"].event_dim
            if value.dim() >= -dim and value.shape[dim] == frame.size:
                return value.select(dim, 0)
    return value


def _draw_at_fault(trace: Trace, where: str) -> str | None:
    for name, node in trace.nodes.items():
        if not is_latent(node) or not isinstance(node["value"], Tensor):
            continue
        if node["value"].is_floating_point() and bool(node["value"].isnan().any()):
            return _draws_nan(name, where)
        # a soft draw of a discrete site has a density, as some want it
        if where == "model" and node["value"].is_floating_point() and (sentence := draw_outside(node)):
            return sentence
    return None


def _support(node: Node) -> str:
    """The support in words: bounds that are an array are left out."""
    text = str(node["fn"].support)
    return type(node["fn"].support).__name__.removeprefix("_") if "tensor([" in text else text


@torch.no_grad()
def _outside(node: Node) -> str | None:
    """A value that is outside the support, as text."""
    value = node["value"]
    try:
        support = node["fn"].support
        inside = support.check(value)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):  # no support, or of another shape
        return None
    if support.is_discrete and value.is_floating_point():  # torch does not ask a Multinomial's counts to be whole
        whole = value == value.round()
        inside = inside & (whole.flatten(inside.dim()).all(-1) if whole.dim() > inside.dim() else whole)
    if bool(inside.all()):
        return None
    some = [f"{number:.6g}" for number in value[~inside][0].reshape(-1)[:6].tolist()]
    return some[0] if inside.shape == value.shape else f"[{', '.join(some)}]"


def _dtypes(trace: Trace, where: str) -> str:
    """Which dtypes have met, and after which site."""
    sites = {name: node for name, node in trace.nodes.items() if node["type"] == "sample" and not is_subsample(node)}
    found = {f"'{name}' {_dtype(node['value'])}": None for name, node in sites.items() if _dtype(node["value"])}
    arguments = [f"{name} {_dtype(value)}" for name, value in _given(trace) if _dtype(value)]
    after = f"after site '{next(reversed(sites))}'" if sites else "before its first site"
    met = ", ".join([*found, *arguments])
    return (
        f"the {where} puts tensors of different dtypes together {after}{f' ({met})' if met else ''}. Convert the data, "
        "x.float(), or make all of it float64, torch.set_default_dtype(torch.float64)."
    )


def _dtype(value: object) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""
