"""Speculative sampling: a cheap drafter guesses a few tokens, one pass of the target model checks them all.

    texts --draft--> k guesses --verify--> k + 1 distributions --accept--> n guesses --resample--> one more

To decode a token, all weights must be read from memory; five tokens at once cost hardly more. So each round
drafts k tokens, and its verification yields from 1 to k + 1 tokens, which are distributed exactly as if the
target had made them one by one. The drafter changes the speed: greedily the text is the same with any
drafter, sampled it is another text of the same distribution.

The rule. At one place, let p be target_probs and q draft_probs. The draft x, drawn from q, is accepted with
probability min(1, p(x) / q(x)). If it is not, the place's token is drawn from the residual, max(0, p - q)
divided by its sum, and the drafts after it are dropped. If all k are accepted, one more is drawn from p.

An example. Two tokens, p = (.5, .5) and q = (.8, .2). The first is drafted .8 of the time and accepted
.5 / .8 = .625 of these times: it comes out .5 of the time. The second is drafted .2 of the time and always
accepted. In the .3 that are left the first was rejected, and the residual is the second: .2 + .3 = .5.

Why it follows p. Since p = min(p, q) + max(0, p - q), there are two ways for a token x to come out:

    drafted and accepted   q(x) min(1, p(x) / q(x))         = min(p(x), q(x))
    by the residual        r max(0, p(x) - q(x)) / r        = max(0, p(x) - q(x))

where r, the probability that a draft is rejected, is 1 - sum min(p, q) = sum max(0, p - q). The two add up to
p(x). The options of sampling (temperature, top-k, ...) change p and q before the rule. Greedily there is no
chance: a draft must be the token that the target itself finds most probable.

A rejection costs nothing to undo: the cache is written at `positions`, and the next round, which begins after
the last accepted token, writes over the rest. Of a model that keeps states (runs_ar/generate.py) the cache
has those after each of the last few tokens, and the round goes back to one of them.

Papers: Leviathan et al. 2023, Fast Inference from Transformers via Speculative Decoding (arXiv:2211.17192;
the rule: section 2.3, the proof: appendix A.1); Chen et al. 2023, Accelerating Large Language Model Decoding
with Speculative Sampling (arXiv:2302.01318, theorem 1).

Shapes: B rows, k drafts, V vocabulary.
Proof: tests/test_speculate.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.utils.errors import UserError
from models.utils.sampling import GREEDY, most_probable, pick, token_at, token_probs, uniform
from runs_ar.generate import check_prompts, keeps_states, prefill


class Round(NamedTuple):
    """What one pass of the target gave, a list entry per row; an ended row has empty lists."""

    tokens: list  # the new tokens: the accepted drafts and, unless one of them ended the row, one token more
    drafts: list  # what was drafted
    num_accepted: list  # how many of the drafts are among the tokens


class Draft(NamedTuple):
    """A drafter's guesses, k a row; on the target's device."""

    tokens: Tensor  # (B, k)
    probs: Tensor | None  # (B, k, V): the distributions they were drawn from; None: greedy
    counts: list  # of each row, how many of its guesses count: it may have less than k to say


@torch.inference_mode()
def speculate(
    model,
    drafter,  # ModelDrafter below, or LookupDrafter in lookup.py
    prompts,  # a list of token ids for each row
    max_new_tokens,
    sampling=GREEDY,
    generators=None,  # one per row; greedy needs none
    eos_ids=(),
    finished=None,  # a list of bools, one per row; a caller that sets an entry ends that row
    num_draft_tokens=4,
):
    """Continue every prompt, as `generate` in runs_ar; yield the Round of each pass of the target.

    The prompt is the first pass: nothing is drafted, and the token after it is picked. Every row accepts its
    own number of drafts and is what it would be alone, up to rounding.
    """
    check_prompts(model.config, prompts)
    check_vocabulary_size(model.config, drafter.vocab_size)
    check_num_draft_tokens(model.config, num_draft_tokens)
    ends = [min(len(prompt) + max_new_tokens, model.config.max_seq_len) for prompt in prompts]
    texts = Texts(prompts, ends, eos_ids, finished, has_states=keeps_states(model))

    cache = new_cache(model, len(prompts), max(ends), num_draft_tokens)
    first = pick(model.lm_head(prefill(model, prompts, cache)), sampling, generators)
    yield texts.advance([[]] * len(prompts), [0] * len(prompts), first.tolist())
    drafter.start(prompts, max(ends), num_draft_tokens)

    def verify(tokens, positions):
        return model(tokens, positions, cache)

    yield from rounds(verify, drafter, texts, sampling, generators, num_draft_tokens)


def rounds(verify, drafter, texts, sampling, generators, num_draft_tokens):
    """Rounds until all texts have ended. The last token of a text is the one not yet fed to the target."""
    while not all(texts.finished):
        # 1. Draft, leaving room for the token after the drafts. Each row draws 2 k + 1 uniforms a round:
        # u[:, :k] draft, u[:, k:2k] accept, u[:, 2k] resample; always as many, so that rows do not affect
        # each other.
        u = None if sampling.greedy else uniform(generators, 2 * num_draft_tokens + 1)
        room = texts.room()
        draft = drafter.draft(texts.tokens, min(num_draft_tokens, max(room)), sampling, u)
        counts = [min(pair) for pair in zip(draft.counts, room)]
        drafts, real = draft.tokens[:, : max(counts)], mask_of(counts, draft.tokens.device)

        # 2. Verify: the target reads the last token and the drafts in one pass. The logits at place n are for
        # the token after the n-th draft, at place 0 for the one after the last token.
        logits = verify(*texts.verification_inputs(drafts, counts))

        # 3. Accept: in order, up to the first draft that fails.
        if sampling.greedy:
            choices = most_probable(logits)
            accepted = drafts == choices[:, :-1]
        else:
            target_probs = token_probs(logits, sampling)
            draft_probs = draft.probs[:, : drafts.shape[1]]
            accepted = accept(target_probs, draft_probs, drafts, u[:, num_draft_tokens:])
        num_accepted = (accepted & real).long().cumprod(dim=1).sum(dim=1)

        # 4. Resample: the place after the accepted drafts gets a token of the target's own.
        if sampling.greedy:
            own = choices.gather(1, num_accepted[:, None])
        else:
            # Where nothing was drafted q is 0, so that the residual is p.
            draft_probs = F.pad(draft_probs * real[:, :, None], (0, 0, 0, 1))
            place = torch.arange(len(num_accepted), device=num_accepted.device), num_accepted
            own = token_at(residual(target_probs[place], draft_probs[place]), u[:, -1])

        drafts = [row[:count] for row, count in zip(drafts.tolist(), counts)]
        yield texts.advance(drafts, num_accepted.tolist(), own.flatten().tolist())


def new_cache(model, batch_size, num_slots, num_draft_tokens):
    """One in which a round may begin before the last one's drafts, and before the token that they follow."""
    if keeps_states(model):
        return model.new_cache(batch_size, num_slots, num_undo=num_draft_tokens + 1)
    return model.new_cache(batch_size, num_slots)


def accept(target_probs, draft_probs, drafts, u):
    """Which drafts pass, each with probability min(1, p / q): (B, k)."""
    k = drafts.shape[1]
    p = target_probs[:, :k].gather(-1, drafts[:, :, None]).squeeze(-1)
    q = draft_probs.gather(-1, drafts[:, :, None]).squeeze(-1)
    # u < p / q without the division: where p is at least q every u below 1 passes, where p is 0 none.
    return u[:, :k].to(p.device) * q < p


def residual(target_probs, draft_probs):
    """What the target wants more often than the drafter gives it: (B, V), not divided by its sum.

    >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.8, 0.2]])
    >>> residual(p, q)
    tensor([[0.0000, 0.3000]])
    >>> q * (p / q).clamp(max=1) + residual(p, q)  # drafted and accepted, or by the residual: together p
    tensor([[0.5000, 0.5000]])
    """
    rest = (target_probs - draft_probs).clamp(min=0)
    # Two distributions that are equal but for rounding may leave nothing; then either of them will do.
    return torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, target_probs)


def mask_of(counts, device):
    """True for the first counts[row] places of a row: (B, max(counts))."""
    return torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]


class Texts:
    """The rows' token ids so far, and where each of them must end."""

    def __init__(self, prompts, ends, eos_ids, finished=None, has_states=False):
        """has_states: the target keeps states, which a pad must not move."""
        self.tokens = [list(prompt) for prompt in prompts]
        self.ends, self.eos_ids, self.has_states = ends, eos_ids, has_states
        self.finished = [False] * len(prompts) if finished is None else finished

    def room(self):
        """How many drafts each row can use: after them comes one token more, and then perhaps the end."""
        rows = zip(self.tokens, self.ends, self.finished)
        return [0 if finished else end - len(tokens) - 1 for tokens, end, finished in rows]

    def verification_inputs(self, drafts, counts):
        """(tokens, positions), each (B, k + 1): the last token of each row and its drafts.

        counts: of each row, how many of the drafts are its own. A row with fewer drafts than others has pads
        after them, and one that has ended goes on unseen. What these write into the cache is overwritten
        before anyone attends to it, or stands in the very last slot, which no token needs: the last token of
        a text is never fed.
        """
        last = torch.tensor([tokens[-1:] for tokens in self.tokens], device=drafts.device)
        starts = torch.tensor([[len(tokens) - 1] for tokens in self.tokens], device=drafts.device)
        places = torch.arange(drafts.shape[1] + 1, device=drafts.device)
        positions = (starts + places).clamp(max=max(self.ends) - 1)
        if self.has_states:
            positions = positions.where(places <= torch.tensor(counts, device=drafts.device)[:, None], -1)
        return torch.cat([last, drafts], dim=1), positions

    def advance(self, drafts, num_accepted, own):
        """Append each row's accepted drafts and the target's own token, up to an EOS; returns the Round."""
        result = Round([], [], [])
        for row, tokens in enumerate(self.tokens):
            new = [] if self.finished[row] else [*drafts[row][: num_accepted[row]], own[row]]
            length = next((n for n, token in enumerate(new, start=1) if token in self.eos_ids), len(new))
            tokens += new[:length]
            if new:
                self.finished[row] = tokens[-1] in self.eos_ids or len(tokens) == self.ends[row]
            result.tokens.append(new[:length])
            result.drafts.append(drafts[row])
            result.num_accepted.append(min(num_accepted[row], length))
        return result


class ModelDrafter:
    """A smaller model with the target's vocabulary drafts, with a cache of its own."""

    def __init__(self, model):
        self.model, self.vocab_size = model, model.config.vocab_size

    def start(self, prompts, num_slots, num_draft_tokens):
        """Read the prompts. Where the text outgrows the smaller model's context, it drafts no more."""
        self.num_slots = min(num_slots, self.model.config.max_seq_len)
        self.cache = new_cache(self.model, len(prompts), self.num_slots, num_draft_tokens)
        prefill(self.model, [prompt[: self.num_slots] for prompt in prompts], self.cache)

    def logits(self, tokens, positions):
        """For the token that follows the last of `tokens`: (B, V)."""
        return self.model(tokens, positions, self.cache)[:, -1]

    def inside(self, positions):
        """Where the cache ends, nothing is drafted any more; what is fed then must do no harm."""
        if keeps_states(self.model):
            return positions.masked_fill(positions >= self.num_slots, -1)
        return positions.clamp(max=self.num_slots - 1)

    def draft(self, texts, num_tokens, sampling, u):
        # The first step feeds the last two tokens: if the round before accepted everything, the one before
        # the last is its last draft, which was never fed.
        device = self.model.lm_head.weight.device
        tokens = torch.tensor([text[-2:] for text in texts], device=device)
        positions = torch.tensor([list(range(len(text))[-2:]) for text in texts], device=device)
        drafts = torch.zeros(len(texts), num_tokens, dtype=torch.long, device=device)
        probs = None if sampling.greedy else torch.zeros(*drafts.shape, self.vocab_size, device=device)
        for step in range(num_tokens):
            logits = self.logits(tokens, self.inside(positions))
            if sampling.greedy:
                drafts[:, step] = most_probable(logits)
            else:
                probs[:, step] = token_probs(logits, sampling)
                drafts[:, step] = token_at(probs[:, step], u[:, step])
            tokens, positions = drafts[:, step, None], positions[:, -1:] + 1
        # Draft number n was made at position len(text) - 2 + n, which the cache must have.
        counts = [max(0, min(num_tokens, self.num_slots + 1 - len(text))) for text in texts]
        return Draft(drafts, probs, counts)


def check_vocabulary_size(config, vocab_size):
    if vocab_size != config.vocab_size:
        raise UserError(
            f"the drafter knows {vocab_size} tokens, the target {config.vocab_size}; "
            "draft with a model that has the target's tokenizer"
        )


def check_num_draft_tokens(config, num_draft_tokens):
    if not 1 <= num_draft_tokens < config.max_seq_len:
        raise UserError(
            f"num_draft_tokens is {num_draft_tokens}; give 1 to {config.max_seq_len - 1}, since the model's "
            f"context is {config.max_seq_len}"
        )
