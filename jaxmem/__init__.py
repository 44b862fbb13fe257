"""Memory and attention layers in JAX, equal to their authors' code and to themselves."""

__version__ = "0.1.0"
