"""Model and guide in one process of several: which parameters they have, and the average of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro
import torch
import torch.distributed as dist
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_elbo_ext.objectives.evaluation import Evaluation
from pyro_elbo_ext.objectives.objective import Objective
from pyro_elbo_ext.terms.registration import modules_of
from pyro_elbo_ext.training import processes
from pyro_elbo_ext.training.distributed.batch_shares import check_shapes


class Replica(ELBOModule):
    """Pyro's ``ELBOModule``, in which modules that are known to ``pyro.module`` only can be parts too.

    Attributes
    ----------
    evaluation : Evaluation or None
        What an objective of this package made of the last call.
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], elbo: ELBO) -> None:
        super().__init__(model, guide, elbo)
        self.others = nn.ModuleList()
        self.evaluation: Evaluation | None = None

    def adopt(self, leaves: Iterable[Tensor]) -> list[Tensor]:
        """Take in the modules that hold these parameters; those that no module holds are given back."""
        strays = self.missing(leaves)
        if strays:
            for _, module in modules_of({"model": self.model, "guide": self.guide}):
                held = {id(parameter) for parameter in module.parameters()}
                if any(id(leaf) in held for leaf in strays):
                    self.others.append(module)
                    strays = self.missing(strays)
        return strays

    def missing(self, leaves: Iterable[Tensor]) -> list[Tensor]:
        """Those of these parameters that it does not hold."""
        own = {id(parameter) for parameter in self.parameters()}
        return [leaf for leaf in leaves if id(leaf) not in own]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """A scalar whose gradient is that of the loss."""
        if not isinstance(self.elbo, Objective):
            return torch.as_tensor(super().forward(*args, **kwargs))
        self.evaluation = self.elbo._evaluate(self.model, self.guide, args, kwargs, with_gradient=True)
        return self.evaluation.surrogate().sum()


def is_parameter(leaf: Tensor) -> bool:
    """Whether Pyro or a module knows a leaf: it was not made on the way."""
    return isinstance(leaf, nn.Parameter) or leaf in pyro.get_param_store()._param_to_name


def name_of(parameter: Tensor, optimizer: torch.optim.Optimizer | None) -> str:
    """Its name in Pyro's param store, or its place in the optimizer."""
    store = pyro.get_param_store()
    if parameter in store._param_to_name:
        return str(store.param_name(parameter))
    groups = [] if optimizer is None else optimizer.param_groups
    places = [(g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"]) if p is parameter]
    return f"the optimizer's group {places[0][0]}, parameter {places[0][1]}" if places else ""


def send_from_main(tensors: Iterable[Tensor]) -> None:
    """Give tensors the values that they have in process 0."""
    with processes.bounded("the parameters' initial values"), torch.no_grad():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def start_alike(tensors: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers, by name, the values that they have in process 0.  Every process must call it.

    Raises
    ------
    ValueError
        In every process, if the names or shapes differ between processes.
    """
    if not processes.is_distributed():
        return
    shapes = processes.gather_objects({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for number, other in enumerate(shapes):
        check_shapes(shapes[0], other, number)
    send_from_main([tensors[name] for name in sorted(tensors)])


def data_parallel(replica: Replica, unused: bool) -> DistributedDataParallel | None:
    """The replica in DistributedDataParallel; None if it has nothing to train."""
    if not any(parameter.requires_grad for parameter in replica.parameters()):
        return None
    with processes.bounded("the start of DistributedDataParallel"):
        return DistributedDataParallel(replica, init_sync=False, find_unused_parameters=unused)


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Their gradients; zeros where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace gradients by their mean over processes, in one message for each dtype and device."""
    kinds: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    for tensors in kinds.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients_of(tensors)])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, mean in zip(tensors, flat.split([p.numel() for p in tensors]), strict=True):
            p.grad = mean.reshape(p.shape)
