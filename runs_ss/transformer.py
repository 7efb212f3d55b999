"""Speculative translation: a smaller Transformer reads the source too and drafts the target.

    source --encode--> memory of the target model      first token --draft--> --verify--> ... (speculate.py)
           --encode--> memory of the draft model

The rounds are those of speculate.py, from the first token on, since a target has no prompt: it begins with
one fixed token. Both models read the source once. Their distributions obey the same rules as in runs_ar:
tokens that are banned, and the end token that is forced where a target has become too long.

Proof: tests/test_speculate_transformer.py.
"""

import torch

from models.utils.sampling import GREEDY
from runs_ar.transformer import read_sources
from runs_ss.speculate import ModelDrafter, Texts, check_num_draft_tokens, check_vocabulary_size, rounds


@torch.inference_mode()
def speculate(model, drafter, sources, rules, sampling=GREEDY, generators=None, num_draft_tokens=4):
    """Write a target for each source, as `generate` in runs_ar/transformer.py; yield the Rounds.

    drafter: a TransformerDrafter, or a LookupDrafter, which looks into the target written so far.
    """
    check_vocabulary_size(model.config, drafter.vocab_size)
    check_num_draft_tokens(model.config, num_draft_tokens)
    # The token in front of a target takes a slot; the last token, which is never fed, leaves one over.
    end = 1 + rules.max_new_tokens
    texts = Texts([[rules.start_id]] * len(sources), [end] * len(sources), rules.eos_ids)
    cache = read_sources(model, sources, end)
    drafter.start(sources, end, num_draft_tokens)

    def verify(tokens, positions):
        return obey(rules, model.decode(tokens, positions, cache), positions)

    yield from rounds(verify, drafter, texts, sampling, generators, num_draft_tokens)


def obey(rules, logits, positions):
    """Forbid tokens, in place. The logits at position n are for token n of the target, counted from 0."""
    for scores, steps in zip(logits, positions.tolist()):
        for place, step in enumerate(steps):
            rules.apply(scores[place : place + 1], step)
    return logits


class TransformerDrafter(ModelDrafter):
    """A smaller Transformer with the target's vocabulary."""

    def __init__(self, model, rules):
        super().__init__(model)
        self.rules = rules

    def start(self, sources, num_slots, num_draft_tokens):
        self.num_slots = num_slots
        self.cache = read_sources(self.model, sources, num_slots)

    def logits(self, tokens, positions):
        logits = self.model.decode(tokens, positions, self.cache)[:, -1:]
        return obey(self.rules, logits, positions[:, -1:])[:, 0]
