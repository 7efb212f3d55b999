"""Prompt lookup: the text so far drafts for itself. What followed these words before may follow them again.

    text      ... for name in names: print(name) ... for name in
    draft                                                        names: print(name)

Code, summaries and answers that quote their question repeat themselves: there it drafts well, without a
second model, for a search in a dictionary. Elsewhere it finds nothing, and the round is a plain step.

A draft that was looked up is not drawn: its distribution q has probability 1 on this token. By the rule of
speculate.py it is accepted with probability p(x), and the residual is p without x.

Papers: Yang et al. 2023, Inference with Reference (arXiv:2304.04487); Saxena 2023, Prompt Lookup Decoding.
Proof: tests/test_lookup.py.
"""

import torch
import torch.nn.functional as F

from runs_ss.speculate import Draft

# The longest run of last tokens that is looked up, and the shortest: the longer, the surer and the rarer.
LONGEST, SHORTEST = 3, 1


class LookupDrafter:
    def __init__(self, vocab_size, device="cpu"):
        self.vocab_size, self.device = vocab_size, device

    def start(self, prompts, num_slots, num_draft_tokens):
        """The two numbers are for drafters with a cache."""
        self.indexes = [Index() for _ in prompts]

    def draft(self, texts, num_tokens, sampling, u):
        found = [index.continuation(text, num_tokens) for index, text in zip(self.indexes, texts)]
        padded = [tokens + [0] * (num_tokens - len(tokens)) for tokens in found]
        drafts = torch.tensor(padded, dtype=torch.long, device=self.device)
        probs = None if sampling.greedy else F.one_hot(drafts, self.vocab_size).float()
        return Draft(drafts, probs, [len(tokens) for tokens in found])


class Index:
    """Where in a text each run of tokens was last followed by another token."""

    def __init__(self):
        self.places = {}
        self.num_known = 0

    def continuation(self, text, num_tokens):
        """The tokens that followed the last time that the text's last tokens stood in it before."""
        for end in range(self.num_known, len(text)):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self.places[tuple(text[end - length : end])] = end
        self.num_known = len(text)

        for length in range(min(LONGEST, len(text) - 1), SHORTEST - 1, -1):
            place = self.places.get(tuple(text[-length:]))
            if place is not None:
                # What is copied may run into the copy itself: after "abab", that is a, b, a, b, ...
                period = text[place:]
                return [period[n % len(period)] for n in range(num_tokens)]
        return []
