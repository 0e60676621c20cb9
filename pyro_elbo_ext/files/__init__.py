"""Writing files whole or not at all, and reading files that may be anything.

Its face: `atomic.replaced`, and `untrusted` for what others may have written.
"""
