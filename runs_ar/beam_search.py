"""Beam search: keep the K best beginnings of a translation, and of all that come to an end, the best.

    running: K beginnings --each followed by each token--> K x V candidates, of which the best are kept
        those of the K best that end  --> finished, where the K best stay
        the K best that do not end    --> running, for the next step

Greedy decoding takes the most probable token each time and so may miss the most probable sequence: a token
that costs a little now can make all that follows cheap. Trying every sequence is out of reach. Beam search
stands between. A hypothesis is a sequence y with the sum of its tokens' log-probabilities,

    log P(y | x) = sum over t of log P(y_t | y_1 ... y_(t-1), x)

Each token makes the sum smaller, so that sums alone favour short translations. What is compared in the end is
the sum divided by a length penalty. Wu et al. 2016 (arXiv:1609.08144, eq. 14) take ((5 + |y|) / 6)^alpha
and add a coverage penalty; `transformers`, and so the checkpoints and this page, take |y|^length_penalty, the
end token counted: 0 leaves the sum, 1 makes it the mean per token, more than 1 favours long translations.

When to stop? A source is done when K hypotheses are finished and

    early_stopping true      nothing else
    early_stopping false     no running one, if it ended now, would be better than the worst finished one;
                             a guess, since with length_penalty > 0 a longer one may still win
    early_stopping "never"   the same; with length_penalty > 0 as if it ended at the greatest length: no guess

Shapes: B sources, K beams, V vocabulary, N candidates kept, Y tokens of the longest target, n places.
Proof: tests/test_run_transformer.py, against `transformers`, token for token.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.utils.errors import UserError


@dataclass(frozen=True)
class Beams:
    num_beams: int  # K
    length_penalty: float = 1.0
    early_stopping: bool | str = False  # True, False or "never"
    renormalize: bool = False  # make probabilities sum to one again after some tokens were ruled out

    def __post_init__(self):
        if type(self.num_beams) is not int or self.num_beams < 1:
            raise UserError(f"num_beams is {self.num_beams!r}; give 1 or more")
        if type(self.length_penalty) not in (int, float):
            raise UserError(f"length_penalty is {self.length_penalty!r}; give a number")
        if type(self.early_stopping) is not bool and self.early_stopping != "never":
            raise UserError(f'early_stopping is {self.early_stopping!r}; give true, false or "never"')


class Hypotheses(NamedTuple):
    """A number of sequences for each source. A score of -inf marks an empty place."""

    tokens: Tensor  # (B, N, Y), -1 where nothing is written yet
    scores: Tensor  # (B, N): sums while they run, divided by the length penalty once they are finished

    def take(self, places):
        """Those that stand at `places` (B, n) of their source."""
        tokens = self.tokens.gather(1, places[:, :, None].expand(-1, -1, self.tokens.shape[2]))
        return Hypotheses(tokens, self.scores.gather(1, places))


@torch.inference_mode()
def beam_search(decoder, rules, beams, on_step=lambda: None):
    """The best translation of each source: a list of (tokens with the end token, score after the penalty).

    decoder.step takes the last token of each of the B x K running hypotheses, source by source, and returns
    logits (B x K, V); decoder.reorder(rows) says which of them the next step continues.
    rules: which tokens may follow, where a translation begins and ends (runs_ar/transformer.py); at the last
    step all end.
    on_step: called once a step, for a progress bar.
    """
    K, B = beams.num_beams, decoder.num_rows // beams.num_beams
    running, finished = empty(B, K, rules, decoder.device), empty(B, K, rules, decoder.device)
    running.scores[:, 0] = 0  # one empty sequence per source; K equal ones would stay equal
    # A source that is done runs on with the others, but nothing is added to what it has finished.
    is_open = torch.ones(B, dtype=torch.bool, device=decoder.device)
    tokens = torch.full((B * K,), rules.start_id, device=decoder.device)

    for step in range(rules.max_new_tokens):
        log_probs = rules.apply(decoder.step(tokens).float().log_softmax(dim=-1), step)
        log_probs = log_probs.log_softmax(dim=-1) if beams.renormalize else log_probs
        candidates, parents = best_continuations(running, log_probs.unflatten(0, (B, K)), step, rules)
        ended = rules.ends(candidates.tokens[:, :, step], step)
        on_step()

        finished = add_finished(finished, candidates, ended & is_open[:, None], step, beams)
        running, places = go_on(candidates, ended, K)
        is_open = is_open & may_improve(running, finished, step, rules, beams)
        if not is_open.any():
            break

        rows = parents.gather(1, places) + K * torch.arange(B, device=decoder.device)[:, None]
        decoder.reorder(rows.flatten())
        tokens = running.tokens[:, :, step].flatten()

    best = zip(finished.tokens[:, 0].tolist(), finished.scores[:, 0].tolist())
    return [([token for token in row if token >= 0], score) for row, score in best]


def empty(B, K, rules, device):
    tokens = torch.full((B, K, rules.max_new_tokens), -1, device=device)
    return Hypotheses(tokens, torch.full((B, K), -math.inf, device=device))


def best_continuations(running, log_probs, step, rules):
    """The best candidates, best first, and the place (B, N) of the running hypothesis each continues."""
    B, K, V = log_probs.shape
    # At most K x (number of end tokens) of them end, so that K others are left to run.
    N = min(max(2, 1 + len(rules.eos_ids)) * K, K * V)
    scores, index = (running.scores[:, :, None] + log_probs).flatten(1).topk(N)
    parents = index // V
    candidates = Hypotheses(running.take(parents).tokens, scores)
    candidates.tokens[:, :, step] = index % V
    return candidates, parents


def add_finished(finished, candidates, ended, step, beams):
    """The K best of the finished hypotheses and of the candidates that `ended` now."""
    K = beams.num_beams
    # As in transformers, one that ends below rank K is lost; those were kept in case the K best all end.
    ended = ended & (torch.arange(ended.shape[1], device=ended.device) < K)
    scores = candidates.scores / (step + 1) ** beams.length_penalty
    scores = torch.cat([finished.scores, scores.masked_fill(~ended, -math.inf)], dim=1)
    tokens = torch.cat([finished.tokens, candidates.tokens], dim=1)
    return Hypotheses(tokens, scores).take(scores.topk(K).indices)


def go_on(candidates, ended, K):
    """The K best candidates that did not end, and their places (B, K) among the candidates."""
    scores, places = candidates.scores.masked_fill(ended, -math.inf).topk(K)
    # Where fewer than K are left, ended ones fill up, with a score of -inf.
    return candidates.take(places)._replace(scores=scores), places


def may_improve(running, finished, step, rules, beams):
    """Whether a running hypothesis may still come among the finished ones of its source: (B,)"""
    worst = finished.scores[:, -1]
    if beams.early_stopping is True:
        return worst == -math.inf
    longest = beams.early_stopping == "never" and beams.length_penalty > 0
    length = rules.max_new_tokens if longest else step + 1
    return running.scores[:, 0] / length**beams.length_penalty > worst
