"""placeholder"""

import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from models.utils.cpp_library import load_library

SOURCE = Path(__file__).with_suffix(".cpp")
LANES = 16  # a head has a multiple of these
MAX_QUERIES = 8  # of a head


def attention_fits(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether scaled_dot_product_attention of these is for the kernel, and the kernel is there."""
    T, d = q.shape[2:]
    few = T <= MAX_QUERIES and d % LANES == 0
    known = q.dtype == k.dtype and q.dtype in (torch.float32, torch.bfloat16)
    masked = mask is not None and mask.shape == (len(q), 1, T, k.shape[2])
    return few and known and masked and q.device.type == "cpu" and load_row_attention() is None


def row_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """scaled_dot_product_attention with enable_gqa, for what attention_fits() has seen.

    q (B, H, T, d), k and v (B, K, S, d), mask (B, 1, T, S), where True is attended to -> (B, H, T, d)
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return torch.ops.zoo.row_attention(q, k, v, mask, scale)


@lru_cache
def load_row_attention():
    """Make torch.ops.zoo.row_attention known, built on first use; None, or why it cannot be used."""
    reason = load_library(SOURCE)
    if reason is None:
        torch.library.register_fake("zoo::row_attention", shape_of)
    return reason


def shape_of(q, k, v, mask, scale):
    """What torch.compile needs to know of the kernel."""
    return q.new_empty(q.shape)
