"""From logits to the next token: temperature, top-k, top-p, min-p, then one draw per row.

    logits --/ temperature--> --top-k--> --top-p--> --min-p--> softmax = token_probs --draw--> token

The options apply in this order, each to what the one before has left. It is the order of `transformers`,
so that the same numbers mean the same distribution here and there. Temperature 0 is greedy: the most
probable token always.

Papers: top-k, Fan et al. 2018 (arXiv:1805.04833); top-p, Holtzman et al. 2019
(arXiv:1904.09751); min-p, Nguyen et al. 2024 (arXiv:2407.01082).
Shapes: B rows of a batch, V tokens of the vocabulary.
Proof: tests/test_sampling.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.utils.errors import UserError

# So near to 0 all mass is on the largest logit anyway, and a division may overflow: greedy from here on.
SMALLEST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0  # divides the logits: below 1 sharper, above 1 flatter; 0 = greedy
    top_k: int = 0  # keep the k most probable tokens; 0 = all
    top_p: float = 1.0  # keep the fewest tokens that hold this much probability; 1 = all
    min_p: float = 0.0  # drop tokens below this fraction of the most probable one; 0 = none

    def __post_init__(self):
        # Written as "not (low <= value)": NaN compares false with everything and is refused too.
        if not (0 <= self.temperature < math.inf):
            raise UserError(f"temperature is {self.temperature}; give 0 (greedy) or a positive number")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; give 0 (all tokens) or a positive whole number")
        if not (0 <= self.top_p <= 1):
            raise UserError(f"top_p is {self.top_p}; give a number from 0 to 1 (1 keeps all tokens)")
        if not (0 <= self.min_p <= 1):
            raise UserError(f"min_p is {self.min_p}; give a number from 0 to 1 (0 keeps all tokens)")

    @property
    def greedy(self):
        return self.temperature < SMALLEST_TEMPERATURE


GREEDY = Sampling(temperature=0.0)


def most_probable(logits):
    """The token with the largest logit: (..., V) -> (...). torch compares fp32 four times as fast as bf16."""
    return logits.float().argmax(dim=-1)


def pick(logits, sampling, generators=None):
    """The next token of each row: (B, V) -> (B,). Sampling takes one generator per row, greedy none."""
    if sampling.greedy:
        return most_probable(logits)
    return draw(token_probs(logits, sampling), generators)


def token_probs(logits, sampling):
    """The distribution that tokens are drawn from, all options applied: (..., V) -> (..., V), in fp32.

    A token that an option drops gets the logit -inf, hence the probability 0. Greedy is a distribution too.
    """
    if sampling.greedy:
        return F.one_hot(most_probable(logits), logits.shape[-1]).float()

    logits = logits.float() / sampling.temperature
    if sampling.top_k > 0:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits.softmax(dim=-1)


def keep_top_k(logits, top_k):
    """Drop what is below the k-th largest logit. Tokens that tie with it all stay."""
    kth_largest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < kth_largest, -math.inf)


def keep_top_p(logits, top_p):
    """Drop the least probable tokens, as many as together hold no more than 1 - top_p."""
    # From the smallest up: sums of small numbers keep digits that a sum near 1 would lose.
    ascending, token_ids = logits.sort(dim=-1, stable=True)
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    dropped[..., -1] = False  # the most probable token stays, also when top_p is 0
    dropped = torch.empty_like(dropped).scatter(-1, token_ids, dropped)  # back into the order of the ids
    return logits.masked_fill(dropped, -math.inf)


def keep_min_p(logits, min_p):
    """Drop tokens whose probability is below min_p times that of the most probable one."""
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), -math.inf)


def draw(probs, generators):
    """One token per row, (B, V) -> (B,); a row has its own generator, and its draw depends on no other."""
    return token_at(probs, uniform(generators)[:, 0])


def uniform(generators, count=1):
    """`count` random numbers in [0, 1) for each row: (B, count).

    Made on the CPU, they let a seed mean the same on every device.
    """
    return torch.stack([torch.rand(count, generator=generator) for generator in generators])


def token_at(probs, u):
    """The token of each row on which u, a number in [0, 1), falls: (B, V), (B,) -> (B,).

    The probabilities lie end to end, in the order of the ids. They need not sum to 1: u is measured against
    their sum.
    """
    cumulative = probs.cumsum(dim=-1)
    # Rounded sums end near 1, not at 1; u is measured against where they do end. right=True: the first sum
    # above u, which passes over tokens of probability 0.
    tokens = torch.searchsorted(cumulative, u.to(probs.device)[:, None] * cumulative[:, -1:], right=True)
    tokens = tokens.clamp(max=probs.shape[-1] - 1)
    # Sums that a GPU makes in parallel may rise by a rounding error at a token of probability 0.
    possible = probs.gather(-1, tokens) > 0
    return torch.where(possible, tokens, probs.argmax(dim=-1, keepdim=True)).squeeze(-1)


def seeded_generators(seed, batch_size):
    """One generator per row; row r draws as the only row of a batch seeded with seed + r would."""
    return [torch.Generator().manual_seed(seed + row) for row in range(batch_size)]
