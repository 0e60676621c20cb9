"""From an ATen graph to machine code, and calling it without Python.

Its face: `step_graph` and `compiler` make the code, `native` calls it from C.
"""
