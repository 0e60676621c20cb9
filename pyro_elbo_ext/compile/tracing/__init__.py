"""Running a loss once under the tracer: what becomes the graph, and what of the program has to stay the same.

Its face: `capture` makes the graph, `losses` the loss to trace, `reads`, `guards` and `numbers` what must stay the same.
"""
