"""A recipe becomes a trained adapter: what is trained, the run folder, resuming, and using a finished run."""
