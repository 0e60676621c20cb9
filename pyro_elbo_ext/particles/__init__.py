"""Draws of K particles and their log weights, one by one or all in one batched run."""
