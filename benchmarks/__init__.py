"""Timings, and peers to compare with; peers live in their own environments."""
