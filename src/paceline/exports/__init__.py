"""Drafts for servers: contract in export.py, names in table.py, adapters in servers.py; reader/ checks."""
