"""Run folders read back, and turned into numbers, plots, Markdown and texts."""
