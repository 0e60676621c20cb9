"""The training loop, and what surrounds it: data, stopping, checkpoints, progress, trackers, several processes."""
