"""Attention of a few queries over a cache: what scaled_dot_product_attention is not made for.

    out = row_attention(q, k, v, mask)      the same numbers for up to 8 queries a head, on the CPU

With one query there is no matrix product in attention: each key is read from the cache for one dot product,
each value for one sum. A cache also has more slots than are written, so that its shape, for which a step is
compiled, does not grow with the text; the mask hides the rest from the result and not from a kernel that
computes first and masks afterwards. row_attention.cpp looks for the last slot that the mask allows, then
for each head, with as many numbers side by side as a register holds, 16 say (every query sees one slot at
least, itself):

    scores = q . k              for the slots up to there; 16 sums a slot, which become 8, 4, 2 and 1
    probs  = e^(scores - max)   e^x = 2^n e^r with a whole n: a series for e^r, and n goes into the exponent
    out    = probs v / sum of probs

Heads are what is shared out between the cores. Microseconds in fp32, then in bf16, for heads of 64, called
again and again, on 2 cores of an AMD EPYC (Zen 5) as it is, then as if it had AVX2 alone (ZOO_CPU=avx2):

                                                     AVX-512                     AVX2
    heads  of k  queries  slots  written        here   torch's own         here   torch's own
       12    12        1    256      100      8,   9     22,  133       9,  11     21,  130
       12    12        5    256      100     17,  22     64,   66      18,  25     64,   68
       12    12        1   2048      200     18,  17    125, 1138      19,  22    134, 1113
       32     4        1   2048     1800    246, 242    311, 2909     340, 404    309, 2876
       32     4        5   2048     1800    492, 556   1040, 1159     646, 742   1049, 1184

Where this page cannot be built compile.py has a formula that Inductor makes loops of; it took 1.4 to 9 times
as long in fp32, and 10 to 80 times in bf16.

With a table the slots lie in blocks, anywhere in a memory that many texts share (runs_serve/paged_cache.py).
In blocks of 16 slots that takes 0.9 to 1.0 (bf16) or 1.2 to 1.5 (fp32, 2,048 slots) of the time of the same
slots one behind the other: the next block is asked for while one is read.

bf16 is widened to fp32 when it is loaded, and everything is summed in fp32. It runs models, and trains none.
Shapes: B batch, H query heads, K heads of keys and values, T queries, S slots, d features of a head.
Proof: tests/test_row_attention.py.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from models.utils.kernels.cpp_library import load_library

SOURCE = Path(__file__).with_suffix(".cpp")
FEATURES = 16  # a head has a multiple of these
MAX_QUERIES = 8  # of a head


def attention_fits(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether scaled_dot_product_attention of these is for the kernel, and the kernel is there."""
    T, d = q.shape[2:]
    few = 1 <= T <= MAX_QUERIES and d % FEATURES == 0
    known = q.dtype == k.dtype and q.dtype in (torch.float32, torch.bfloat16)
    masked = mask is not None and mask.shape == (q.shape[0], 1, T, k.shape[2])
    return few and known and masked and q.device.type == "cpu" and load_row_attention() is None


def row_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None, table=None):
    """scaled_dot_product_attention with enable_gqa, for what attention_fits() has seen.

    q (B, H, T, d), k and v (B, K, S, d), mask (B, 1, T, S), where True is attended to -> (B, H, T, d)
    table (B, n): k and v are a memory of blocks instead, (N, K, S / n, d), of which row b has table[b].
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return torch.ops.zoo.row_attention(q, k, v, mask, scale, table)


def load_row_attention():
    """Make torch.ops.zoo.row_attention known, built on first use; None, or why it cannot be used."""
    return load_library(SOURCE, shape_of)


def shape_of(q, k, v, mask, scale, table=None):
    return q.new_empty(q.shape)
