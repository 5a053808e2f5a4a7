"""The training step, its state, optimizer, schedule and metrics."""
