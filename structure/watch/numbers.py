"""Tensors as text, small enough for a page: numbers in 8 bits on a scale of square roots, in base64.

    0 .. 1             b = 255 sqrt(p)                       probabilities, of which most are small
    any, up to most    b = 128 + 127 sign(v) sqrt(|v| / most)
                       b = 0: NaN or infinity, which stays visible

A square root keeps what is near 0 apart: 0.001 is 8 steps from 0, 0.9 is 13 from 1. page: watch.js, decode.
"""

import base64

import torch

NOT_FINITE = 0


def text_of(tensor):
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode("ascii")


def probabilities(probs):
    """(..., S) between 0 and 1 as text; NaN as 0, which a row of zeros tells."""
    return text_of((probs.nan_to_num(0).clamp(0, 1).sqrt() * 255).round().to(torch.uint8))


def triangle(probs):
    """(H, T, T) of which nothing stands right of the diagonal: row t has t + 1 numbers."""
    rows, columns = torch.tril_indices(probs.shape[1], probs.shape[2])
    return probabilities(probs[:, rows, columns])


def signed(values):
    """{data, most, least, largest} of numbers of any sign."""
    finite = values[values.isfinite()]
    most = finite.abs().max().item() if finite.numel() else 0.0
    scaled = (values.abs() / (most or 1)).sqrt() * values.sign()
    codes = (128 + 127 * scaled).round().nan_to_num(0).clamp(1, 255)
    codes = torch.where(values.isfinite(), codes, NOT_FINITE).to(torch.uint8)
    least, largest = (finite.min().item(), finite.max().item()) if finite.numel() else (0.0, 0.0)
    return {"data": text_of(codes), "most": most, "least": least, "largest": largest}


def halves(values):
    """fp16, three digits: for q and k, whose products a page works out."""
    return text_of(values.nan_to_num(0).clamp(-65504, 65504).to(torch.float16))


def floats(values):
    return text_of(values.float())


def whole(values):
    return text_of(values.to(torch.int32))


def loudest(matrix, columns):
    """(T, n) to (T, columns or fewer): of n / columns neighbours the one that is furthest from 0.

    >>> loudest(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), 2)
    tensor([[-3.,  2.]])
    """
    group = -(-matrix.shape[1] // columns)
    if group == 1:
        return matrix
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % group)).unflatten(1, (-1, group))
    size = padded.abs().nan_to_num(torch.inf)
    return padded.gather(2, size.argmax(dim=2, keepdim=True))[..., 0]
