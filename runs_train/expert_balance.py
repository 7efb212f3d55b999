"""Experts that all learn: a loss that keeps a router from sending every token to the same few.

A router that happens to like an expert trains it, likes it the more, and soon knows no other: the rest of the
layer's weights are dead. So a training loss gets another term (Fedus et al. 2022, section 2.2, eq. 4 to 6):

    balance = E * sum over experts of share_e * prob_e

share_e is the part of the tokens that chose expert e, prob_e the mean probability that the router gave it.
With equal shares, A / E each, and equal probabilities, 1 / E, the sum gives A; with all tokens at the same A
experts up to E. A count has no gradient. It comes through prob: whom many chose, loses probability.

Two experts, three tokens, one choice each; all choose expert 0, with probability 0.9, 0.8, 0.7:

    share 1, 0    prob 0.8, 0.2    balance = 2 * (1 * 0.8 + 0 * 0.2) = 1.6

Nothing here knows a model. A module that calls its `router` for logits of its `experts` is watched. (A
page that keeps experts busy by a bias of its own reads the router's weight itself, and is left alone.)
Shapes: t tokens of a batch, E experts, A of them active.
Proof: tests/test_train_language_model.py, against `transformers`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# As in Switch (section 2.2): enough to keep experts busy, too little to disturb what is to be learned.
STRENGTH = 0.01


def balance(logits: Tensor, num_active: int) -> Tensor:
    """The term of one layer, from the router's logits (t, E)."""
    probs = logits.softmax(dim=-1, dtype=torch.float32)  # (t, E)
    chosen = probs.topk(num_active).indices  # (t, A)
    share = F.one_hot(chosen, probs.shape[1]).sum(dim=1).float().mean(dim=0)  # (E,)
    return probs.shape[1] * (share * probs.mean(dim=0)).sum()


class Routers:
    """The routers of a model in training, and what they said in its last pass."""

    def __init__(self, model):
        self.terms = {}
        for name, module in model.named_modules():
            if hasattr(module, "router") and hasattr(module, "experts"):
                module.router.register_forward_hook(self.watch(name, module.num_active))

    def watch(self, name, num_active):
        def note(router, inputs, logits):
            if router.training:
                self.terms[name] = balance(logits.flatten(0, -2), num_active)

        return note

    def gradient(self):
        """A term for the loss: the mean over layers, to be minimised. Its value is 0.

        So the loss that is shown and drawn stays the one of predictions, whatever keeps experts busy.
        """
        terms = list(self.terms.values())
        if not terms:
            return 0.0
        self.terms.clear()
        mean = STRENGTH * torch.stack(terms).mean()
        return mean - mean.detach()
