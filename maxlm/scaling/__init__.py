"""Scaling laws: from a compute budget to the next model."""
