"""Guides that are made and fitted without tuning: a Gaussian on unconstrained space, and a flow on top of it.

``approximate`` is what the training loop calls: ``starting`` finds a first Gaussian, ``gaussian`` takes it to the greatest
ELBO, ``moments`` looks at its importance weights, ``flow`` bends it.
"""
