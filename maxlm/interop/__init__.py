"""Formats of others: models in and out."""
