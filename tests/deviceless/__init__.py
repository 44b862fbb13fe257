"""Compilation for GPUs that are not there; needs the extra `aot`."""
