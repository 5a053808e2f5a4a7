"""maxlm: a pretraining stack for language models on JAX and Flax."""

__version__ = "0.1.0"
