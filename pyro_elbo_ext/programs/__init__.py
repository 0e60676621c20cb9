"""Runs the user's model and guide, and looks at what comes out: the one place that does, for every way in.

``running`` runs the programs, ``pairs`` asks whether what came out belongs together, ``densities`` computes the density of
a site and sees that shapes fit, ``nodes`` tells kinds of sites apart, ``randomness`` keeps the caller's random numbers and
parameters as they were.
"""
