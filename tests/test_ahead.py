"""The proof of runs_ss/ahead.py.

Greedily it writes what plain decoding writes, sampled what follows the target's distribution. A layer that
knows the future has every draft accepted, which shows that states, tokens and places belong together.
"""

import pytest
import torch
import torch.nn.functional as F

from models import model_class
from models.utils.sampling import GREEDY, Sampling, seeded_generators
from runs_ss import speculate as rules
from runs_ss.ahead import AheadDrafter, Overheard
from runs_ss.speculate import speculate
from tests import zoo
from tests.test_speculate import (
    LENGTH,
    MAX_NEW_TOKENS,
    OPTIONS,
    OTHER,
    PROMPTS,
    ROWS,
    SAMPLING,
    SMALL,
    TARGET,
    TOKENS,
    Table,
    counts_of,
    joined,
    matches,
    plain,
)

LOOK_AHEAD = [name for name in zoo.DECODERS if hasattr(model_class(name), "hidden_ahead")]


@pytest.fixture(scope="module", params=LOOK_AHEAD)
def model(request):
    return zoo.small_model(request.param, **SMALL, multi_token=True)


def drafted(model, prompts=PROMPTS, max_new_tokens=MAX_NEW_TOKENS, *options, **more):
    target = Overheard(model)
    return list(speculate(target, AheadDrafter(target), prompts, max_new_tokens, *options, **more))


# Greedy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_draft_tokens", range(1, 6))
def test_greedy_equals_plain_greedy(model, num_draft_tokens):
    """One prompt of the batch runs into the context's end."""
    rounds = drafted(model, num_draft_tokens=num_draft_tokens)
    assert joined(rounds) == plain(model)
    assert max(len(drafts) for round in rounds for drafts in round.drafts) == num_draft_tokens


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING], ids=["greedy", "sampled"])
def test_a_row_of_a_batch_is_what_it_is_alone(model, sampling):
    together = drafted(model, sampling=sampling, generators=seeded_generators(5, 3))
    for row, prompt in enumerate(PROMPTS):
        alone = drafted(model, [prompt], sampling=sampling, generators=seeded_generators(5 + row, 1))
        for ours, theirs in zip(together, alone):
            assert [field[row] for field in ours] == [field[0] for field in theirs]


@torch.no_grad()
def test_drafts_are_those_of_the_chain(model):
    """Without a cache: each guess's own state and the guess itself make the next one."""
    first, second = drafted(model, PROMPTS[:1])[:2]
    text = torch.tensor([PROMPTS[0] + first.tokens[0]])
    states, followers = model.hidden(text[:, :-1]), text[:, 1:]
    for _ in range(4):
        ahead = model.hidden_ahead(states, followers)[:, -1:]
        states = torch.cat([states, ahead], dim=1)
        followers = torch.cat([followers, model.lm_head(ahead).argmax(dim=-1)], dim=1)
    assert second.drafts[0] == followers[0, -4:].tolist()


def test_long_prompts_are_read_in_chunks(model, monkeypatch):
    monkeypatch.setattr("runs_ar.generate.PREFILL_CHUNK", 5)
    assert joined(drafted(model)) == plain(model)


class Knows(Table):
    """A layer ahead that knows the target: of the tokens that it was told followed, it remembers the last."""

    def new_layer_cache(self, batch_size, num_slots):
        return torch.zeros(batch_size, num_slots, dtype=torch.long)

    def hidden_ahead(self, hidden, tokens, positions=None, cache=None):
        if positions is None:
            positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        cache.scatter_(1, positions, tokens)
        return self.logits[cache.gather(1, (positions - 1).clamp(min=0)), tokens]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chunk", [512, 2])
def test_a_layer_that_knows_is_never_rejected(sampling, chunk, monkeypatch):
    monkeypatch.setattr("runs_ar.generate.PREFILL_CHUNK", chunk)
    prompts = [[2, 1, 3], [0, 1], [3, 3, 1, 0, 2]]
    rounds = drafted(Knows(seed=0), prompts, 21, sampling, seeded_generators(0, 3))
    num_drafted, accepted = counts_of(rounds)
    assert num_drafted == accepted == 3 * 16 and len(rounds) == 5


# Sampling ---------------------------------------------------------------------------------------------------


class Guesses(Knows):
    """One that guesses, by the state too."""

    def hidden_ahead(self, hidden, tokens, positions=None, cache=None):
        return OTHER.logits[hidden.argmax(dim=-1), tokens]


def texts_follow(sampling, num_draft_tokens=3):
    prompt, generators = [2, 1], [torch.Generator().manual_seed(0)] * ROWS
    rounds = drafted(
        Guesses(seed=0), [prompt] * ROWS, LENGTH, sampling, generators, num_draft_tokens=num_draft_tokens
    )
    texts = torch.tensor(joined(rounds))
    numbers = (texts * TOKENS ** torch.arange(LENGTH - 1, -1, -1)).sum(dim=1)
    counts = numbers.bincount(minlength=TOKENS**LENGTH).double()
    return matches(counts, TARGET.probs_of_texts(prompt, sampling))


@pytest.mark.parametrize("sampling", [OPTIONS[0], OPTIONS[-1]], ids=str)
@pytest.mark.parametrize("num_draft_tokens", [1, 3])
def test_sampled_texts_follow_the_target(sampling, num_draft_tokens):
    assert texts_follow(sampling, num_draft_tokens)


def test_a_wrong_rule_does_not(monkeypatch):
    monkeypatch.setattr(rules, "residual", lambda p, q: p)
    assert not texts_follow(Sampling())


# A layer that was trained -----------------------------------------------------------------------------------


def test_a_trained_layer_drafts_well():
    """Texts that count in steps of one to three: the step is in the state, and the layer learns to read it.

    Its loss is the model's own, a token later (V3, section 2.2, eqs. 24 and 25).
    """
    torch.manual_seed(0)
    model = zoo.small_model("deepseek_v3", vocab_size=23, d_model=48, multi_token=True).train()
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(300):
        tokens = counting(batch_size=16, length=12)
        hidden = model.hidden(tokens[:, :-2])
        ahead = model.hidden_ahead(hidden, tokens[:, 1:-1])
        loss = sum(
            F.cross_entropy(model.lm_head(state).flatten(0, 1), aim.flatten())
            for state, aim in ((hidden, tokens[:, 1:-1]), (ahead, tokens[:, 2:]))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    prompts = counting(batch_size=6, length=4).tolist()
    rounds = drafted(model.eval(), prompts, 8, num_draft_tokens=3)
    num_drafted, accepted = counts_of(rounds)
    assert accepted / num_drafted > 0.3, f"{accepted} of {num_drafted}, where chance is 1 of 23"
    assert joined(rounds) == plain(model, prompts, 8)


def counting(batch_size, length):
    starts, steps = torch.randint(23, (batch_size, 1)), torch.randint(1, 4, (batch_size, 1))
    return (starts + steps * torch.arange(length)) % 23
