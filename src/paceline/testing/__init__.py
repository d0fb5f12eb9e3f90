"""Conformance suites for adapters, simulation, planted bugs, and small runs for tests."""
