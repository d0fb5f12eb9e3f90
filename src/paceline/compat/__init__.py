"""The API that Paceline grew out of, as adapters over the ledger and its sessions.

The names keep their semantics, and no product code uses them. A store that is used through them logs samples
in arrival order, the order of their commits.
"""
