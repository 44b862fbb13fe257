"""The one training loop: state, optimiser, step, checkpoints and metrics."""
