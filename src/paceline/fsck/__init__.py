"""`paceline fsck`: a checker that shares no code with what it checks."""
