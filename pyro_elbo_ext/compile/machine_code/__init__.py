"""From an ATen graph to machine code, and calling it without Python."""
