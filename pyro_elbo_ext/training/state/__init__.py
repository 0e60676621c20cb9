"""All that a run changes: read out, put back, kept in files, and owned by its result.

Its face: `state.TrainingState`, `ownership.Ownership`, and `checkpoints` for the files.
"""
