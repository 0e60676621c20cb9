"""Removes from a graph what has no use, but not what raises errors."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node


def remove_dead_code(graph: Graph) -> None:
    """As torch does; early releases take the check of a factorization for dead, without which it gives NaN."""
    graph.eliminate_dead_code(is_impure_node=_is_impure)


def _is_impure(node: Node) -> bool:
    return node.is_impure() or node.target is torch.ops.aten._linalg_check_errors.default
