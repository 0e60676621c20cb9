"""Parameters that a loss reaches but that ``pyro.infer.SVI`` would never update."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyro
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

_MAX_DEPTH = 4


def collects_parameters() -> bool:
    """Whether the caller gathers parameters from ``pyro.param`` messages, as ``SVI.step`` does.

    Otherwise it has its own way to them, e.g. an ``ELBOModule``'s ``parameters()``.
    """
    return any(isinstance(handler, TraceMessenger) and handler.param_only for handler in _PYRO_STACK)


def check_registered(loss: Tensor, programs: Iterable[Callable[..., Any]], args: object) -> None:
    """Raise if ``loss`` depends on ``nn.Parameter`` objects that Pyro does not know.

    Parameters
    ----------
    loss : Tensor
        The differentiable loss, before its graph is freed.
    programs
        Model and guide, searched for the modules that hold the parameters.
    args
        Their arguments, searched too.

    Raises
    ------
    ValueError
        Naming each module and parameter, with the remedy.
    """
    known = {id(parameter) for parameter in pyro.get_param_store()._params.values()}
    missing = {id(leaf): leaf for leaf in _leaves(loss) if isinstance(leaf, nn.Parameter) and id(leaf) not in known}
    if not missing:
        return
    programs = tuple(programs)
    for leaf in missing.values():
        if clash := two_of_one_name(leaf, programs):
            raise ValueError(clash)
    names: dict[int, str] = {}
    for path, module in modules_of({"model and guide": programs, "arguments": args}):
        for name, parameter in module.named_parameters():
            if id(parameter) in missing:
                names.setdefault(id(parameter), f"{path}.{name} ({type(module).__name__})")
    hint = next(filter(None, (replaced(leaf, (programs, args)) for leaf in missing.values())), "")
    listed = ", ".join(names.get(key, f"an nn.Parameter of shape {tuple(leaf.shape)}") for key, leaf in missing.items())
    raise ValueError(
        f"the loss depends on parameters that are not registered with Pyro, so SVI would never train them: {listed}. "
        "Call pyro.module(name, module) in the model or guide (or make it a PyroModule with "
        "pyro.settings.set(module_local_params=False)), or train through elbo(model, guide).parameters() and a "
        f"torch optimizer; if they are meant to stay fixed, call module.requires_grad_(False).{hint}"
    )


def two_of_one_name(parameter: Tensor, programs: Iterable[Callable[..., Any]]) -> str:
    """What to say if another module's parameter is in the param store by the name that this one would have; else ""."""
    paths: dict[int, list[tuple[str, str]]] = {}  # of each parameter: where its module was found, and its name there
    for path, module in modules_of(dict(zip(("model", "guide"), programs, strict=True))):
        for inner, value in module.named_parameters():
            paths.setdefault(id(value), []).append((path, inner))
    own = paths.get(id(parameter), [])
    for stored, value in pyro.get_param_store()._params.items():
        if value is parameter or id(value) not in paths:
            continue
        prefix, _, inner = stored.rpartition("$$$")
        fits = {inner, stored.replace("$$$", ".")}
        if not fits & {name for _, name in own} or not fits & {name for _, name in paths[id(value)]}:
            continue
        name = prefix or stored.rpartition(".")[0] or stored
        one, other = (".".join(where[0]) for where in (paths[id(value)], own))
        return (
            f"two modules use the name {name!r}: {one} and {other}. Pyro keeps one tensor for each name, here for "
            f"{stored!r} that of the first, so SVI would never train the other. Rename one of the two: the attribute that "
            "holds it, or the name given to pyro.module."
        )
    return ""


def replaced(parameter: Tensor, programs: object) -> str:
    """What to say if the param store holds another tensor in the place of a module's parameter; else ""."""
    inner = {
        name
        for _, module in modules_of({"": programs})
        for name, value in module.named_parameters()
        if value is parameter
    }
    for name, value in pyro.get_param_store()._params.items():
        if "$$$" in name and name.split("$$$")[1] in inner and value is not parameter:
            return (
                f" The param store holds another tensor by the name {name!r}, as after param_store.load(): then call "
                "pyro.module(name, module, update_module_params=True) in the model or guide."
            )
    return ""


def parameters_of(loss: Tensor) -> dict[str, Tensor]:
    """The leaves that ``loss`` depends on, by their names in Pyro's param store; the others are numbered."""
    names = {id(parameter): name for name, parameter in pyro.get_param_store()._params.items()}
    leaves = {id(leaf): leaf for leaf in _leaves(loss)}
    found = {names[key]: leaf for key, leaf in leaves.items() if key in names}
    others = (leaf for key, leaf in leaves.items() if key not in names)
    return {**found, **{f"unregistered_{i}": leaf for i, leaf in enumerate(others)}}


def leaves_of(loss: Tensor) -> list[Tensor]:
    """The leaves that ``loss`` depends on."""
    return list({id(leaf): leaf for leaf in _leaves(loss)}.values())


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    seen: set[Any] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
        stack.extend(parent for parent, _ in node.next_functions)


def modules_of(root: object) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a program can reach by name: through closures, globals, attributes and containers.

    Names that come several times are numbered, from the second on.
    """
    seen: set[int] = set()
    times: Counter[str] = Counter()
    queue: list[tuple[str, object, int]] = [("", root, 0)]
    while queue:
        path, value, depth = queue.pop(0)
        if id(value) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            name = path or type(value).__name__
            times[name] += 1
            yield (name if times[name] == 1 else f"{name}({times[name]})"), value
        for name, child in _children(value):
            queue.append((name, child, depth + 1))


def _children(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        yield from ((str(key), child) for key, child in value.items())
    elif isinstance(value, list | tuple):
        yield from (("", child) for child in value)
    elif isinstance(value, functools.partial):
        yield from (("", child) for child in (value.func, *value.args, *value.keywords.values()))
    elif inspect.ismethod(value):
        yield from (("self", value.__self__), ("", value.__func__))
    elif inspect.isfunction(value):
        variables = inspect.getclosurevars(value)
        yield from (*variables.nonlocals.items(), *variables.globals.items())
        if hasattr(value, "__wrapped__"):
            yield "", value.__wrapped__
    elif isinstance(value, Messenger) or (
        hasattr(value, "__dict__") and callable(value) and not inspect.isclass(value)
    ):
        yield from vars(value).items()
