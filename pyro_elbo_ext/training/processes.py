"""The processes of a run that ``torchrun`` started: which one this is, and what they tell each other.

All functions work in a run of a single process too. What passes between processes here are a few numbers on the host, over
a gloo group of its own with a time limit, so that a process that has died or hangs is an error in the others, not a wait
without end. Every process must call the functions that say so, in the same order.
"""

from __future__ import annotations

import atexit
import datetime
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

T = TypeVar("T")

TIMEOUT = 300.0  # seconds
_LEAVING = 0.2  # seconds
_control: tuple[dist.ProcessGroup, dist.ProcessGroup, float] | None = None  # the world, its gloo group, its time limit


def start(timeout: float = TIMEOUT) -> None:
    """Join the other processes, if there are any.  Every process must call it.

    In a process that ``torchrun`` started it makes torch's default group, unless the program has made it: gloo for tensors
    on the CPU, nccl for those on GPUs. In any other process it does nothing.

    Parameters
    ----------
    timeout
        Seconds to wait for the other processes, here and later: longer than the longest difference in their pace, such as
        one process loading data or writing a checkpoint.

    Raises
    ------
    ValueError
        If ``timeout`` is not positive.
    RuntimeError
        If the others do not come in time.
    """
    global _control
    if not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds, not {timeout!r}")
    if not dist.is_available():
        return
    limit = datetime.timedelta(seconds=timeout)
    with bounded("the start"):
        if not dist.is_initialized():
            if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
                return
            _make_world("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", limit)
        world = dist.group.WORLD
        assert world is not None
        if _control is None or _control[0] is not world or _control[2] != timeout:
            _control = world, dist.new_group(backend="gloo", timeout=limit), timeout
            atexit.unregister(_leave)
            atexit.register(_leave)


def _make_world(backend: str, timeout: datetime.timedelta) -> None:
    """Torch's default group.

    Where ``torchrun`` has started the processes anew, those of before have left their addresses in its store, and torch
    would wait for them (pytorch issue 135712). So each attempt has a place of its own there, if all agree on its number.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)
        return
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise RuntimeError(
            "torchrun has started the processes on several machines anew, with the addresses of the last attempt still in "
            "its store. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment to use --max-restarts."
        )
    store, own, size = next(dist.rendezvous("env://", timeout=timeout))
    placed = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=placed, rank=own, world_size=size, timeout=timeout)


def _leave() -> None:
    """At the end of the process: let gloo's threads finish while there is an interpreter.

    A thread that lets go of the tensor of the last message needs the interpreter's lock. If the interpreter is ending by
    then, the whole process is aborted, and counts as failed (torch 2.13).
    """
    global _control
    _control = None
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # a group that nothing holds any more waits for its threads
        time.sleep(_LEAVING)  # DistributedDataParallel may hold one still: let its threads have the lock


def is_distributed() -> bool:
    """Whether this process is in a group of processes, which may be a group of one."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    if is_distributed():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes."""
    if is_distributed():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is process 0, which alone shows progress, writes files and talks to trackers."""
    return rank() == 0


def from_main(value: T) -> T:
    """The value that process 0 has, in all of them.  Every process must call it.

    For decisions that must be the same everywhere: to stop, to roll back. The value is pickled.
    """
    if not is_distributed():
        return value
    held: list[T] = [value]
    with bounded("a decision of process 0"):
        dist.broadcast_object_list(held, src=0, group=_group(), device=torch.device("cpu"))
    return held[0]


def on_main(action: Callable[[], T]) -> T:
    """Do something in process 0 alone; its result, in all of them.  Every process must call it.

    Raises
    ------
    Exception
        In process 0, whatever ``action`` raised. In the others a RuntimeError that says so, since they would otherwise wait
        for a process that is gone.
    """
    if not is_distributed():
        return action()
    result, error = None, None
    if is_main():
        try:
            result = action()
        except Exception as raised:
            error = raised
    result, message = from_main((result, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    if message is not None:
        raise RuntimeError(f"process 0 failed: {message}")
    return result  # type: ignore[return-value]


def gather(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The numbers of every process, shape ``(processes, n)``.  Every process must call it, with n of them."""
    table = np.zeros((world_size() if is_distributed() else 1, len(values)))
    table[rank() if is_distributed() else 0] = values
    if is_distributed():
        with bounded("the exchange of losses"):
            dist.all_reduce(torch.from_numpy(table), group=_group())  # each adds its row to zeros
    return table


def gather_objects(value: T) -> list[T]:
    """What every process has, by its number; pickled.  Every process must call it."""
    if not is_distributed():
        return [value]
    held: list[T] = [value] * world_size()
    with bounded("the exchange of reports"):
        dist.all_gather_object(held, value, group=_group())
    return held


@contextmanager
def bounded(what: str) -> Iterator[None]:
    """Say in which message to the other processes an error came up, and what it means."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1:
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(
            f"process {rank()} of {world_size()} has failed at {what}: {reason[0]}\nAs a rule another process has ended, "
            "has taken fewer steps, or was slower than the timeout. The parameters are those after the last whole step, and "
            "checkpoints are good to go on from."
        ) from error


def _group() -> dist.ProcessGroup:
    if _control is None or _control[0] is not dist.group.WORLD:
        start()
    assert _control is not None
    return _control[1]
