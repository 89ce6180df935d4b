"""Tasks: what they are, where their rows come from, how they become prompts and batches."""
