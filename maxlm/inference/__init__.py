"""Sampling from a model, with a key-value cache, in batches."""
