"""Jobs for other people's schedulers: Kubernetes (JobSet, Kueue), Slurm, TPU queued resources, SkyPilot.

Each module renders one kind of job from a checked `Job` and hands it to that scheduler's own tool. Nothing here starts
JAX, and nothing is kept: what happened to a run is what its run directory says.
"""
