"""The consumer's loop: steps, checkpoints, recovery, ranks."""
