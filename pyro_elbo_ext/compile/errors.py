"""The one error that says why a program cannot be made a graph."""

from __future__ import annotations


class CannotCompile(ValueError):
    """The program, its loss or an argument cannot be made a graph; says why, where, and what to do instead.

    Attributes
    ----------
    is_everywhere : bool
        Whether it is for want of something on this machine, so that no other program can be compiled either.
    """

    is_everywhere = False
