"""The model drafts for itself: from its own hidden state, with one layer that looks a token further ahead.

    target   token t, state h  --all layers-->  state h'  --lm_head-->  the next token
    draft    token t, state h  --one layer--->  a guess at h'  --lm_head-->  a guess at the next token, and on

Of what the model will say next, most is in its own state already; a layer that was trained for it reads that
out, for the price of one layer of many and a head. DeepSeek-V3 was trained with such a layer (multi-token
prediction), which is part of its files: a drafter that nobody has to find, and with the right tokenizer. Any
model of the zoo that offers hidden_ahead(hidden, tokens, positions, cache) drafts by this page.

A round. The verification left the true state of each token that it read. The layer reads those states, each
with the token that came to follow it, and so keeps a past of its own; at the last it gives the first guess.
For the second guess it takes its own output as the state, and its own guess as the token, and so on: each
further one is made of more that is guessed, and fails sooner. What a guess wrote into the layer's cache is
written over by the truth.

That a model's states say more than a small model's tokens is EAGLE's idea (Li et al. 2024, arXiv:2401.15077),
here in its simplest form: a line of drafts, where EAGLE has a tree. The layer: DeepSeek-AI 2024,
DeepSeek-V3 Technical Report (arXiv:2412.19437, section 2.2).

Shapes: B rows, T positions of a call, D features, V vocabulary.
Proof: tests/test_ahead.py.
"""

import torch

from runs_ss.speculate import ModelDrafter


class Overheard:
    """The target itself, whose hidden states are kept until the drafter has read them."""

    def __init__(self, model):
        self.model, self.states = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def hidden(self, tokens, positions=None, cache=None):
        hidden = self.model.hidden(tokens, positions, cache)
        self.states.append((hidden, positions))
        return hidden

    def __call__(self, tokens, positions=None, cache=None):
        return self.model.lm_head(self.hidden(tokens, positions, cache))


class AheadDrafter(ModelDrafter):
    """Drafts as a smaller model does, step by step; but a step is one layer, and begins with a state."""

    def __init__(self, target):
        """target: Overheard, the same that is speculated for."""
        super().__init__(target)

    def start(self, prompts, num_slots, num_draft_tokens):
        """The prompts' states were overheard, and are read with the first draft."""
        self.num_slots = num_slots
        self.cache = self.model.new_layer_cache(len(prompts), num_slots)
        self.state = None  # (B, D): of the last step

    def draft(self, texts, num_tokens, sampling, u):
        self.texts = texts
        return super().draft(texts, num_tokens, sampling, u)

    def logits(self, tokens, positions):
        """For the token that follows the last of `tokens`: (B, V). A state stands one before its follower."""
        if self.model.states:
            self.state = self.read_states()
        else:
            places = positions[:, -1:] - 1
            self.state = self.model.hidden_ahead(self.state[:, None], tokens, places, self.cache)[:, 0]
        return self.model.lm_head(self.state)

    def read_states(self):
        """Let the layer read what was overheard; its state (B, D) at the last token but one of each text."""
        last = torch.tensor([[len(text) - 2] for text in self.texts], device=self.model.lm_head.weight.device)
        found = None
        for hidden, positions in self.model.states:
            B, T = hidden.shape[:2]
            places = torch.arange(T, device=last.device).expand(B, T) if positions is None else positions
            followers = self.followers(places[:, 0].tolist(), T).to(last.device)
            ahead = self.model.hidden_ahead(hidden, followers, positions, self.cache)
            is_last = places == last  # (B, T)
            state = ahead[torch.arange(B), is_last.long().argmax(dim=1)]  # (B, D)
            found = state if found is None else state.where(is_last.any(dim=1)[:, None], found)
        self.model.states.clear()
        return found

    def followers(self, starts, number):
        """What followed `number` tokens from starts[row] on: (B, T). Where a text ends there are pads, where
        drafts were rejected: what the layer writes for them is written over before it is attended to.
        """
        rows = [text[start + 1 : start + 1 + number] for text, start in zip(self.texts, starts)]
        return torch.tensor([row + [0] * (number - len(row)) for row in rows])
