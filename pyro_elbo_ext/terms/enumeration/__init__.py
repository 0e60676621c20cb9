"""Discrete latents that are summed out: traces under enumeration, exact expectations, exact conditional posteriors."""
