"""What each step is given: batches, whether they weigh each row once, and data held out.

Its face: `batches.Whole` and `batches.Batches`, `scaling.ScaleCheck`, `validation.Validation`.
"""
