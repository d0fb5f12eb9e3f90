"""The two runs of `paceline demo`."""
