"""The names of the API that Paceline grew out of, as adapters over the ledger and its sessions.

They keep their semantics and no product code uses them. A store used through them logs samples in arrival
order: what is committed first comes first.
"""
