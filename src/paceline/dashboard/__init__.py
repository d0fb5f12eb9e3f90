"""`paceline dashboard` and `report`: pages over runs, which they only read."""
