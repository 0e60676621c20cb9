"""The one error that says why a program cannot be made a graph."""

from __future__ import annotations


class CannotCompile(ValueError):
    """The program, its loss or an argument cannot be made a graph; says why, where, and what to do instead."""
