"""What a run is doing, computed from what it has written: status, metrics, history."""
