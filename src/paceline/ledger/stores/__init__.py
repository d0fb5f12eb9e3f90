"""A folder for each ledger."""
