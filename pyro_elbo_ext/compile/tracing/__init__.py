"""Running a loss once under the tracer: what becomes the graph, and what of the program has to stay the same."""
