"""Writing files whole or not at all, and reading files that may be anything."""
