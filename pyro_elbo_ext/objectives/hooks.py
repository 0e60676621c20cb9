"""Methods that a loss has of its own although whoever trains with it does not call them."""

from __future__ import annotations

from collections.abc import Iterable

PYROS = (  # what subclasses of Pyro's losses override, beside the methods that SVI calls
    "_differentiable_loss_particle",
    "_get_trace",
    "_get_traces",
    "_get_vectorized_trace",
    "_vectorized_num_particles",
    "loss_and_surrogate_loss",
)


def own_hooks(loss: object, names: Iterable[str], known: Iterable[type]) -> list[str]:
    """Which of the methods are neither missing nor those of the classes ``known``, as these were written.

    A class in between that defines one counts, and so does a function put on the object or on a class later.
    """
    classes = set(known)
    found = []
    for name in names:
        if name in vars(loss):
            found.append(name)
            continue
        owner = next((cls for cls in type(loss).__mro__ if name in vars(cls)), None)
        if owner is None:
            continue
        method = vars(owner)[name]
        method = getattr(method, "fget", getattr(method, "__func__", method))  # of a property, of a static method
        if owner not in classes or getattr(method, "__module__", owner.__module__) != owner.__module__:
            found.append(name)
    return found
