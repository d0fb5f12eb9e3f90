"""The ledger: contract in ledger.py, names in table.py, adapters in stores/; roles call it by sessions."""
