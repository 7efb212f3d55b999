"""What every head attends to, heard while a model runs: for any page, whatever it calls its parts.

    for each in heard(recording, num_tokens): each.path, each.probs      (H, T, S)

A model returns logits and no probabilities. But models/utils/recording.py hears each of its calls, and there
are two ways to attend. A page that calls scaled_dot_product_attention gives q, k and the mask, of which the
four lines in models/llama.py's Attention make the probabilities. A page that spells attention out multiplies
them by v: what is multiplied there, is nowhere negative, adds up to 1 at most in each row, and was made from
another product (q k^T), is taken as it is. Where rows add up to less, a sink took the rest (gpt_oss).

Long texts come in pieces (gemma3, gpt_oss): their rows are put together, and keys that are a slice of the
text's stand in their columns.

Shapes: H query heads, K key heads, T queries, S keys, d width of a head.
Proof: tests/test_attention.py, against the attentions of `transformers`.
"""

import math
from typing import NamedTuple

import torch

FUSED = "scaled_dot_product_attention"
PRODUCTS = ("matmul", "bmm")


class Heads(NamedTuple):
    """What the heads of one module attend to, in fp32."""

    path: str  # "layers.3.attn"
    probs: torch.Tensor  # (H, T, S)
    q: torch.Tensor | None  # (H, T, d), None where pieces do not fit together
    k: torch.Tensor | None  # (K, S, d)
    scale: float | None  # score = scale q . k; None where more than q and k made the score


def heard(recording, num_tokens):
    """The Heads of every module that attends, in the order in which they ran.

    num_tokens: of the call that was recorded; it tells heads from queries where a page lays them out as one.
    """
    pieces = {}
    for call in recording.calls:
        piece = fused(call, num_tokens) if call.name == FUSED else spelled_out(recording, call)
        if piece:
            pieces.setdefault(call.path, []).append(piece)
    return [joined(path, found) for path, found in pieces.items()]


def joined(path, pieces):
    """One Heads of the pieces (probs, q, k, scale, first key) of a module."""
    if len(pieces) == 1 and pieces[0][4] == 0:
        return Heads(path, *pieces[0][:4])
    width = max(start + probs.shape[-1] for probs, *_, start in pieces)
    rows = [
        torch.nn.functional.pad(probs, (start, width - start - probs.shape[-1]))
        for probs, *_, start in pieces
    ]
    return Heads(path, torch.cat(rows, dim=1), None, None, None)


def fused(call, num_tokens):
    """What the fused call does and does not return, in its four lines."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, call.args)) | call.kwargs
    q, k, mask = given["query"][0].float(), given["key"][0].float(), given.get("attn_mask")
    scale = given.get("scale") or 1 / math.sqrt(q.shape[-1])
    start = first_slot(given["key"])
    mask = None if mask is None else mask[0]
    if given.get("is_causal"):
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if q.shape[0] == 1 and q.shape[1] > num_tokens and q.shape[1] % num_tokens == 0:
        # Queries of all heads, one below the other, over the one key that they share (deepseek_v3).
        q = q.view(-1, num_tokens, q.shape[-1])
        mask = mask if mask is None or mask.shape[-2] == 1 else mask.view(-1, num_tokens, mask.shape[-1])
    scores = q @ k.repeat_interleave(len(q) // len(k), dim=0).mT * scale
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if is_bool else scores + mask.float()
    return scores.softmax(dim=-1).cpu(), q.cpu(), k.cpu(), scale, start


def spelled_out(recording, call):
    """The same of probs @ v, if that is what a call multiplies; None of any other call."""
    if call.name not in PRODUCTS or len(call.args) < 2:
        return None
    probs, values = call.args[:2]
    if min(probs.dim(), values.dim()) < 4 or not are_probabilities(probs):
        return None
    views, maker = recording.views(probs, call.number)
    first = product_before(recording, maker)
    if first is None:
        return None
    # As the page made them, before heads that share a key were put below each other.
    same = [view for view in views if view.dim() >= 4 and view.shape[-1] == probs.shape[-1]]
    probs = same[-1][0].float().flatten(0, -3)  # (H, T, S)
    q, k = first.args[0][0].float(), first.args[1][0].float().mT
    k = k.flatten(0, -3)
    q = q.flatten(0, -3).reshape(*probs.shape[:2], -1)
    start = first_slot(values)
    return probs.cpu(), q.cpu(), k.cpu(), scale_of(probs, q, k), start


def are_probabilities(x):
    """Rows that add up to 1, or to less; NaN is let pass, so that it can be seen."""
    if not x.is_floating_point():
        return False
    x, broken = x.nan_to_num(0), x.isnan().any()
    sums = x.sum(dim=-1)
    return bool((x >= 0).all() and (sums <= 1 + 1e-3).all() and ((sums > 0).any() or broken))


def product_before(recording, call):
    """The last product of four or more dimensions that a call's tensors were made from: q k^T."""
    waiting, seen = [call], set()
    while waiting:
        call = waiting.pop(0)
        if call is None or call.number in seen:
            continue
        seen.add(call.number)
        if call.name in PRODUCTS:
            return call if call.args[0].dim() >= 4 else None
        waiting += [recording.maker(tensor, call.number) for tensor in call.tensors]
    return None


def scale_of(probs, q, k):
    """What q . k is multiplied by, if the logarithms of the probabilities tell of nothing else; or None."""
    products = q @ k.repeat_interleave(len(q) // len(k), dim=0).mT  # (H, T, S)
    seen = probs > 1e-6
    count = seen.sum(dim=-1, keepdim=True).clamp(min=1)

    def centred(x):
        x = x.masked_fill(~seen, 0)
        return (x - x.sum(dim=-1, keepdim=True) / count).masked_fill(~seen, 0)

    logs, products = centred(probs.clamp(min=1e-30).log()), centred(products)
    scale = (logs * products).sum() / products.square().sum().clamp(min=1e-30)
    fits = (logs - scale * products).abs().max() < 1e-2 * max(1.0, logs.abs().max().item())
    return scale.item() if fits and seen.sum() > seen.shape[0] * seen.shape[1] else None


def first_slot(k):
    """Which of the text's keys the first one is, where k is a slice of them all."""
    stride = k.stride(-2)
    return k.storage_offset() // stride if k.shape[-2] > 1 and stride else 0
