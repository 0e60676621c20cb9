"""Draws of K particles and their log weights, one by one or all in one batched run.

Its face: `particles` draws them one after the other, `batched_draws` in one run, `log_weights` weighs them, and `estimate`
sums one draw's terms. Objectives are its users, and what draws from a guide.
"""
