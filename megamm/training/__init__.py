"""Training one stage: the loop, its log, and what its arithmetic costs."""
