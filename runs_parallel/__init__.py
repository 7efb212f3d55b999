"""More than one device: a model split over several, and trained by several, on torch.distributed."""
