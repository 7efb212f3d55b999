"""How well a model predicts a text: perplexity and bits per byte, by a sliding window.

    tokens     t0 t1 t2 t3 t4 t5 t6 t7 ...        (window = 4, stride = 2)
    window 1  [t0 t1 t2 t3]                       predicts t1 t2 t3 t4; all count
    window 2        [t2 t3 t4 t5]                 predicts t3 t4 t5 t6; t5 and t6 are new and count

A model sees no more than its context, so a long text is read in windows, each `stride` tokens further. Every
token but the first counts exactly once; those after the first window have seen window - stride tokens or
more. A small stride takes long and gives the lowest figure; stride = window makes separate blocks.

    perplexity    = exp(nats / tokens counted)      depends on how the tokenizer cuts the text
    bits per byte = nats / ln 2 / bytes of text     does not, so that models can be compared

Shapes: T tokens of a window, D features.
Proof: tests/test_run.py, against the cross-entropy that `transformers` computes.
"""

import math

import torch
import torch.nn.functional as F

# A row of logits is V wide, wider than anything else here: only so many exist at a time.
POSITIONS_PER_HEAD = 256


@torch.inference_mode()
def negative_log_likelihood(model, token_ids, window, stride, progress=lambda num_tokens: None):
    """(nats, tokens counted) of a text; `progress` is told after each window how many tokens it counted."""
    tokens = torch.tensor(token_ids, device=model.lm_head.weight.device)
    num_inputs = len(tokens) - 1  # the last token is predicted and predicts nothing
    nats, done = 0.0, 0
    for start in range(0, num_inputs, stride):
        end = min(start + window, num_inputs)
        hidden = model.hidden(tokens[None, start:end])[0, done - start :]
        nats += sum_of_losses(model.lm_head, hidden, targets=tokens[done + 1 : end + 1])
        progress(end - done)
        done = end
        if done == num_inputs:
            break
    return nats, done


def sum_of_losses(lm_head, hidden, targets):
    """Cross-entropy summed over positions, in nats: (T, D) and (T,) to a number."""
    pieces = zip(hidden.split(POSITIONS_PER_HEAD), targets.split(POSITIONS_PER_HEAD))
    return sum(F.cross_entropy(lm_head(h).float(), t, reduction="sum").item() for h, t in pieces)


def figures(nats, num_tokens, num_bytes):
    """What papers report of a text."""
    return {
        "perplexity": math.exp(min(nats / num_tokens, 700)),
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
    }
