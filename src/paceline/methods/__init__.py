"""Draft methods: contract in method.py, names in table.py, adapters in eagle3/ and dflash/."""
