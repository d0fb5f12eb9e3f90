"""Feature stores: contract in store.py, names in table.py, adapters in stores/."""
