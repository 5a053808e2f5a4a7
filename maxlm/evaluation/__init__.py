"""Held-out loss, and the report of a run."""
