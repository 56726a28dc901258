"""Training: a step, the loop, and what belongs to a run."""
