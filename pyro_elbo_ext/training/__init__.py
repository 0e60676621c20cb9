"""The training loop, and what surrounds it: data, stopping, checkpoints, progress, trackers, several processes.

Its face: `fit.fit`, which gives a `result.FitResult`, or an `automatic_fit.AutomaticFit`; `callbacks.Callback` is what a
tracker or a callback of your own begins with. The package gives them by name.
"""
