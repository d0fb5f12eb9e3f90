"""Trackers of curves: contract in tracker.py, names in table.py, each adapter in a file of its own."""
