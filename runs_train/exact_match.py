"""How often an encoder-decoder writes exactly the text that it should, for pairs that it has not seen.

Proof: tests/test_train_seq2seq.py, against `transformers`.
"""

from collections import Counter

import torch
from tqdm import tqdm

from runs_train.pair_data import pad

ROWS = 256  # translated at once


def exact_matches(model, tokenizer, pairs, batch_size=ROWS):
    """{kind: (how many of its pairs came out right, how many there are)}, kinds in alphabetical order."""
    # Sources of a length together, so that there is little padding.
    pairs = sorted(pairs, key=lambda pair: len(pair.source))
    right, total = Counter(), Counter(pair.kind for pair in pairs)
    with tqdm(total=len(pairs), desc="measuring", unit="pair", leave=False, disable=None) as bar:
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            texts = translate(model, tokenizer, [pair.source for pair in batch])
            # Tokens know no runs of spaces, so neither does the comparison.
            right.update(p.kind for p, text in zip(batch, texts) if text == " ".join(p.target.split()))
            bar.update(len(batch))
    return {kind: (right[kind], total[kind]) for kind in sorted(total)}


def share(matches):
    """The part of all pairs that came out right."""
    return sum(right for right, _ in matches.values()) / sum(total for _, total in matches.values())


@torch.no_grad()
def translate(model, tokenizer, texts):
    """Each text's most likely target, token for token, in one batch (greedy; runs_ar/ has other ways)."""
    model.eval()
    device, longest = next(model.parameters()).device, model.config.max_seq_len
    source = pad([tokenizer.encode(text)[:longest] for text in texts], tokenizer.pad_id).to(device)
    cache = model.new_cache(model.encode(source), num_slots=longest)
    tokens = torch.full((len(texts), 1), tokenizer.pad_id, device=device)
    finished = torch.zeros(len(texts), dtype=torch.bool, device=device)
    for n in range(longest - 2):  # transformers counts the start and the end as well
        last = tokens[:, -1:]
        logits = model.decode(last, torch.full_like(last, n), cache)[:, -1]
        logits[:, tokenizer.pad_id] = -torch.inf  # it begins a target and is never part of one
        tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
        finished |= tokens[:, -1] == tokenizer.eos_id
        if finished.all():
            break
    return [tokenizer.decode(up_to(row, tokenizer.eos_id)) for row in tokens[:, 1:].tolist()]


def up_to(ids, end):
    """The ids before the first `end`, or all."""
    return ids[: ids.index(end)] if end in ids else ids
