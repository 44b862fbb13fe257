"""Weights by the names of the original checkpoints, one mapping file per family."""
