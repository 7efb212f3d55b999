"""When a token was there."""

import time

import torch


def synchronized(device):
    """The time, once a GPU has finished what it was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
