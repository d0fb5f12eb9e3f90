"""`paceline train --on`: a run's commands as actors on a Ray cluster."""
