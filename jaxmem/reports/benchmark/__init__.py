"""Measurements: ops beside their baselines, training steps, compiled kernels, launch tables."""
