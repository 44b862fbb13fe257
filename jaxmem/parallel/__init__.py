"""Meshes and placement of parameters and batches."""
