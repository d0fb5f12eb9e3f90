"""The consumer's view of the log: which samples a step takes, and their features."""
