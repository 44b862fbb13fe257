"""What is learnt and measured: losses, masks and metrics over batches."""
