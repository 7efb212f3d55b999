"""Many requests at once: paged memory, continuous batching, and one step of the model for all that run."""
