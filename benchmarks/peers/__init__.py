"""Scripts that run another project's code from its own checkout; they import nothing of ours."""
