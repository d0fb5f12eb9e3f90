"""Writes what starts a run on a cluster: a batch script for Slurm, manifests for Kubernetes.

Both only type the ordinary commands (`train`, `produce --join`, `torchrun -m paceline consume`), so whatever
kills a job, the same job goes on. No torch; nothing is started here.
"""
