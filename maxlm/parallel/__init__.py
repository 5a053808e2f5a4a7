"""Meshes, the table from logical to mesh axes, and starting many processes."""
