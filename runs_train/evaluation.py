"""How well a model predicts text that it has not seen, in bits per byte.

Perplexity depends on how a tokenizer cuts the text; bits per byte do not, so they compare any two models, and
also file compressors: a text that gzip halves costs it 4 bits per byte.

    bits per byte = sum over tokens of -log2 p(token | those before it in its window) / bytes of these tokens

Shapes: V vocabulary.
Proof: tests/test_train_language_model.py.
"""

import math

import torch
import torch.nn.functional as F

from runs_train.text_data import windows_at


@torch.no_grad()
def bits_per_byte(model, tokens, bytes_of, context, stride, max_windows=None, batch_size=16):
    """Every token but the first is predicted once, by the first window that reaches it.

    bytes_of: how many bytes each id of the vocabulary stands for, see bytes_of_tokens.
    stride: how far the window moves; the smaller, the more text a token has before it.
    max_windows: take at most so many, spread evenly over the text.
    """
    num_inputs = len(tokens) - 1  # the last token is predicted and predicts nothing
    num_windows = 1 + math.ceil(max(0, num_inputs - context) / stride)
    starts = [n * stride for n in range(num_windows)]
    full, last = starts[:-1], starts[-1:]  # the last one ends with the text and may be shorter
    full = full[:: math.ceil(len(full) / max_windows)] if max_windows and full else full
    batches = [full[n : n + batch_size] for n in range(0, len(full), batch_size)]

    model.eval()
    device = next(model.parameters()).device
    bits = num_bytes = 0
    for batch in [*batches, last]:
        windows = windows_at(tokens, batch, context)
        targets = windows[:, 1:]
        logits = model(windows[:, :-1].to(device)).float().cpu()
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        # All but the last `stride` were counted in the window before; before the first there is none.
        overlap = torch.tensor([context - stride if start else 0 for start in batch])
        is_new = torch.arange(targets.shape[1]) >= overlap[:, None]
        bits += nats[is_new].double().sum().item() / math.log(2)
        num_bytes += bytes_of[targets[is_new]].sum().item()
    return bits / num_bytes


def bytes_of_tokens(tokenizer):
    """(V,): how many bytes of text each id stands for; none for BOS and EOS."""
    return torch.tensor([len(tokenizer.token_bytes(id) or b"") for id in range(tokenizer.vocab_size)])
