"""Models assembled from mixers; nothing here knows a mixer by name."""
