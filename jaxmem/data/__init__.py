"""Sources, tokenizers, packing, and the grain pipeline whose position is checkpointed."""
