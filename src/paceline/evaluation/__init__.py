"""Lossless speculative decoding on held-out prompts, and a run's curve."""
