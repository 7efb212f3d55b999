"""The proof of runs_ss/speculate.py.

Greedily it writes what runs_ar writes (which tests/test_generate.py compares with `transformers`), token for
token, whoever drafts. Sampled, its texts follow the target's distribution, which a table gives exactly; rules
that are wrong on purpose do not pass the same test.
"""

import copy
import itertools
import types

import pytest
import torch

from models.utils.errors import UserError
from models.utils.sampling import GREEDY, Sampling, seeded_generators, token_probs
from runs_ar.generate import generate, keeps_states
from runs_ss import speculate as page
from runs_ss.lookup import LookupDrafter
from runs_ss.speculate import Draft, ModelDrafter, speculate
from tests import zoo
from tests.test_sampling import follows

VOCAB_SIZE, MAX_SEQ_LEN = 50, 48
SMALL = {"vocab_size": VOCAB_SIZE, "max_seq_len": MAX_SEQ_LEN, "d_model": 32, "d_ff": 48, "head_dim": 8}
SMALL["tied_head"] = False  # a head that is the embedding says each token again
PROMPTS = [[1, 40, 5, 6, 7, 8], [3], [1, 7, 8, 9, *range(10, 44)]]  # the last one ends with the context
SAMPLING = Sampling(temperature=1.2, top_k=40, top_p=0.95, min_p=0.01)
MAX_NEW_TOKENS = 20


def tiny(name, seed=0, **sizes):
    """A random model whose texts do not repeat themselves at once."""
    model = zoo.small_model(name, seed, **{**SMALL, **sizes})
    if len(set(plain(model, PROMPTS[:1], 5)[0])) == 1:
        # Large embeddings drown what layers add: where the head is the same matrix, the most probable token
        # is the last one itself.
        with torch.no_grad():
            model.token_embed.weight *= model.config.d_model**-0.5 / 2
    return model


def disturbed(model, amount):
    """Nearly the same model."""
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += amount * parameter.std().nan_to_num() * torch.randn(parameter.shape)
    return model


class Guarded:
    """A model that fails when it is called against its preconditions."""

    def __init__(self, model):
        self.model, self.config, self.lm_head = model, model.config, model.lm_head
        self.widths = []

    def new_cache(self, batch_size, num_slots):
        assert num_slots <= self.config.max_seq_len
        self.written = torch.zeros(batch_size, num_slots, dtype=torch.bool)
        return self.model.new_cache(batch_size, num_slots)

    def hidden(self, tokens, positions=None, cache=None):
        num_slots = self.written.shape[1]
        places = torch.arange(tokens.shape[1]).expand(tokens.shape) if positions is None else positions
        assert places.min() >= 0 and places.max() < num_slots, "a position beyond the cache"
        for row, start in enumerate(places[:, 0].tolist()):
            # Ended rows wait in the last slot.
            assert start == num_slots - 1 or self.written[row, :start].all(), "a slot was left out"
        self.written.scatter_(1, places, True)
        self.widths.append(tokens.shape[1])
        return self.model.hidden(tokens, positions, cache)

    def __call__(self, tokens, positions, cache):
        return self.lm_head(self.hidden(tokens, positions, cache))


def guarded(model):
    """A model that keeps states guards itself: it goes on where it stands, or a few tokens earlier."""
    return model if keeps_states(model) else Guarded(model)


class Wrong:
    """A hostile drafter: it knows what will come and says something else."""

    vocab_size = VOCAB_SIZE

    def __init__(self, texts):
        self.texts = texts

    def start(self, prompts, num_slots, num_draft_tokens):
        pass

    def draft(self, texts, num_tokens, sampling, u):
        drafts = torch.zeros(len(texts), num_tokens, dtype=torch.long)
        for row, text in enumerate(texts):
            coming = next(whole for whole in self.texts if whole[: len(text)] == text)[len(text) :]
            coming = torch.tensor([*coming, *[0] * num_tokens][:num_tokens], dtype=torch.long)
            drafts[row] = (coming + 1) % VOCAB_SIZE
        return Draft(drafts, None, [num_tokens] * len(texts))


def rows_of(steps):
    return [[token for token in row if token is not None] for row in zip(*steps)]


def plain(model, prompts=PROMPTS, max_new_tokens=MAX_NEW_TOKENS, *options, **more):
    return rows_of(generate(model, prompts, max_new_tokens, *options, **more))


def joined(rounds):
    """The tokens of each row."""
    return [list(itertools.chain(*parts)) for parts in zip(*(round.tokens for round in rounds))]


def counts_of(rounds):
    """(drafts, accepted drafts) of all rows."""
    drafted = sum(len(drafts) for round in rounds for drafts in round.drafts)
    return drafted, sum(sum(round.num_accepted) for round in rounds)


@pytest.fixture(scope="module", params=zoo.DECODERS)
def model(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def good_drafter(model):
    """One that is right often, not always; how much of a disturbance that takes differs from page to page."""
    for amount in (0.1, 0.2, 0.05, 0.4, 0.02, 0.8, 0.01, 0.15, 0.3, 0.005, 0.0025, 0.6, 1.2):
        drafter = ModelDrafter(guarded(disturbed(model, amount)))
        drafted, accepted = counts_of(list(speculate(guarded(model), drafter, PROMPTS, MAX_NEW_TOKENS)))
        if 0.25 < accepted / drafted < 0.9:
            return drafter
    raise AssertionError("no disturbance makes a drafter that is right now and then")


def drafters(model):
    expected = plain(model)
    other = {"llama": "gpt_neox"}.get(type(model).__module__.removeprefix("models."), "llama")
    return {
        "perfect": ModelDrafter(guarded(model)),
        "good": good_drafter(model),
        "random": ModelDrafter(guarded(tiny(other, seed=5))),  # another architecture, too
        "hostile": Wrong([prompt + row for prompt, row in zip(PROMPTS, expected)]),
        "lookup": LookupDrafter(VOCAB_SIZE),
    }


# Greedy -----------------------------------------------------------------------------------------------------


def test_greedy_equals_plain_greedy(model):
    """At every number of draft tokens; one prompt of the batch runs into the context's end."""
    expected = plain(model)
    assert [len(row) for row in expected] == [20, 20, MAX_SEQ_LEN - len(PROMPTS[2])]
    shares = {}
    for name, drafter in drafters(model).items():
        for num_draft_tokens in range(1, 9):
            rounds = list(
                speculate(guarded(model), drafter, PROMPTS, MAX_NEW_TOKENS, num_draft_tokens=num_draft_tokens)
            )
            assert joined(rounds) == expected, (name, num_draft_tokens)
            assert max(len(drafts) for round in rounds for drafts in round.drafts) == num_draft_tokens
            drafted, accepted = counts_of(rounds)
            shares.setdefault(name, []).append(accepted / drafted)
            if name == "perfect":
                # And so no slot of its cache was left stale. One token is the prompt's.
                assert accepted == drafted and len(rounds) == 1 + -(-19 // (num_draft_tokens + 1))
            if name == "hostile":
                assert accepted == 0 and len(rounds) == 20
    assert all(0.1 < share < 1 for share in shares["good"]), "the good drafter is no test"
    assert all(share < 0.2 for share in shares["random"])


def test_a_draft_stops_where_it_is_of_no_use(llama):
    """The last token of a text is never drafted: the target's own pass gives one in any case."""
    for max_new_tokens, widths in [(1, [6]), (2, [6, 1]), (4, [6, 3]), (6, [6, 5]), (7, [6, 5, 1])]:
        target, drafter = Guarded(llama), Guarded(llama)
        rounds = list(speculate(target, ModelDrafter(drafter), PROMPTS[:1], max_new_tokens))
        assert joined(rounds) == plain(llama, PROMPTS[:1], max_new_tokens)
        assert target.widths == widths
        assert len(drafter.widths) == 1 + sum(width - 1 for width in widths[1:])


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 8])
def test_an_eos_inside_a_draft_ends_the_row(model, num_draft_tokens):
    free, named, inside = plain(model), drafters(model), 0
    for place in (2, 9):
        eos_ids = {row[place] for row in free}
        expected = plain(model, eos_ids=eos_ids)
        assert all(row[-1] in eos_ids for row in expected)
        for name in ("perfect", "good", "lookup"):
            options = {"eos_ids": eos_ids, "num_draft_tokens": num_draft_tokens}
            rounds = list(speculate(guarded(model), named[name], PROMPTS, MAX_NEW_TOKENS, **options))
            assert joined(rounds) == expected
            for row in itertools.chain(*(zip(*round) for round in rounds)):
                tokens, drafts, num_accepted = row
                assert num_accepted <= len(tokens) and tokens[:num_accepted] == drafts[:num_accepted]
                inside += len(tokens) < len(drafts) and len(tokens) == num_accepted > 0
    assert inside or num_draft_tokens == 1, "no draft went on behind the EOS"


def test_a_caller_can_end_a_row(llama):
    finished, rounds = [False] * 3, []
    for round in speculate(llama, ModelDrafter(llama), PROMPTS, 12, finished=finished, num_draft_tokens=2):
        rounds.append(round)
        finished[1] = finished[1] or len(rounds) == 3
    expected = plain(llama, max_new_tokens=12)
    assert joined(rounds) == [expected[0], expected[1][:7], expected[2]]


def test_a_drafter_with_a_smaller_context_falls_silent(llama):
    """Its own cache is never written beyond, and the text is the target's also where it has left off."""
    expected, distances = plain(llama), set()
    for context in (7, 10, 39):
        drafter = copy.deepcopy(llama)
        object.__setattr__(drafter, "config", types.SimpleNamespace(**vars(llama.config)))
        drafter.config.max_seq_len = context
        rounds = list(speculate(Guarded(llama), ModelDrafter(Guarded(drafter)), PROMPTS, MAX_NEW_TOKENS))
        assert joined(rounds) == expected
        drafted, accepted = counts_of(rounds)
        assert drafted == accepted > 0, "what it drafts in its context, it drafts as the target would"
        last = max(
            (len(PROMPTS[1]) + sum(len(r.tokens[1]) for r in rounds[:n]) + len(round.drafts[1]))
            for n, round in enumerate(rounds)
            if round.drafts[1]
        )
        distances.add(context + 1 - last)
    # The token behind the last one that it can read is the last one that it can guess.
    assert min(distances) == 0


# Batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING], ids=["greedy", "sampled"])
def test_a_row_of_a_batch_is_what_it_is_alone(model, sampling):
    seen, options = set(), {"sampling": sampling, "eos_ids": {plain(model)[0][9]}}
    named = drafters(model)
    for name, num_draft_tokens in [("good", 4), ("random", 1), ("lookup", 7)]:
        options |= {"drafter": named[name], "num_draft_tokens": num_draft_tokens, "max_new_tokens": 20}

        def run(prompts, seed, options=options):
            generators = seeded_generators(seed, len(prompts))
            return list(speculate(guarded(model), prompts=prompts, generators=generators, **options))

        together = run(PROMPTS, 5)
        for row, prompt in enumerate(PROMPTS):
            alone = run([prompt], 5 + row)
            # Not the tokens alone: round by round the same drafts, and as many of them accepted.
            for ours, theirs in zip(together, alone):
                assert [field[row] for field in ours] == [field[0] for field in theirs]
            assert all(round.tokens[row] == [] for round in together[len(alone) :])
        seen.add(str(joined(together)))
    assert len(seen) == 1 if sampling.greedy else len(seen) > 1


def test_rows_accept_numbers_of_their_own(llama):
    drafter = ModelDrafter(disturbed(llama, 0.1))
    rounds = list(speculate(llama, drafter, PROMPTS[:2], MAX_NEW_TOKENS))
    assert any(round.num_accepted[0] != round.num_accepted[1] for round in rounds)


# Sampling ---------------------------------------------------------------------------------------------------

TOKENS, LENGTH, ROWS = 4, 4, 10_000
OPTIONS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=2.0),
    Sampling(top_k=2),
    Sampling(top_p=0.7),
    Sampling(min_p=0.3),
    Sampling(0.8, top_k=3, top_p=0.95, min_p=0.1),
]


class Table:
    """A decoder whose next token depends on the last two alone, which it finds in its cache."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.logits = 1.2 * torch.randn(TOKENS, TOKENS, TOKENS, generator=generator)
        self.config = types.SimpleNamespace(vocab_size=TOKENS, max_seq_len=64)
        self.lm_head = torch.nn.Identity()
        self.lm_head.weight = torch.zeros(())

    def new_cache(self, batch_size, num_slots):
        return torch.zeros(batch_size, num_slots, dtype=torch.long)

    def hidden(self, tokens, positions=None, cache=None):
        if positions is None:
            positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        cache.scatter_(1, positions, tokens)
        return self.logits[cache.gather(1, (positions - 1).clamp(min=0)), tokens]

    __call__ = hidden

    def probs_of_texts(self, prompt, sampling):
        """The probability of each text of LENGTH tokens behind the prompt: (TOKENS,) * LENGTH, flattened."""
        probs = token_probs(self.logits, sampling).double()
        joint = {(): 1.0}
        for _ in range(LENGTH):
            joint = {
                (*text, token): share * probs[(*prompt, *text)[-2:]][token].item()
                for text, share in joint.items()
                for token in range(TOKENS)
            }
        return torch.tensor(list(joint.values()), dtype=torch.double)


TARGET, OTHER = Table(seed=0), Table(seed=3)


def texts_follow(sampling, drafter, num_draft_tokens=3, max_new_tokens=LENGTH):
    """Whether the texts are distributed as the target's table says."""
    prompt = [2, 1]
    generators = [torch.Generator().manual_seed(0)] * ROWS
    rounds = speculate(
        TARGET,
        drafter,
        [prompt] * ROWS,
        max_new_tokens,
        sampling,
        generators,
        num_draft_tokens=num_draft_tokens,
    )
    texts = torch.tensor(joined(rounds))[:, :LENGTH]
    numbers = (texts * TOKENS ** torch.arange(LENGTH - 1, -1, -1)).sum(dim=1)
    counts = numbers.bincount(minlength=TOKENS**LENGTH).double()
    return matches(counts, TARGET.probs_of_texts(prompt, sampling))


def matches(counts, probs):
    """Chi-square, the texts too rare for it taken together; no text that cannot be."""
    rare = probs * ROWS < 20
    if counts[probs == 0].any():
        return False
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    probs = torch.cat([probs[~rare], probs[rare].sum()[None]])
    keep = probs * ROWS > 5
    return follows(counts[keep], probs[keep] / probs[keep].sum())


@pytest.mark.parametrize("sampling", OPTIONS, ids=str)
def test_sampled_texts_follow_the_target(sampling):
    assert texts_follow(sampling, ModelDrafter(OTHER))


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 8])
def test_sampled_texts_follow_the_target_at_any_number_of_drafts(num_draft_tokens):
    assert texts_follow(Sampling(), ModelDrafter(OTHER), num_draft_tokens, max_new_tokens=10)


@pytest.mark.parametrize("sampling", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_sampled_texts_follow_the_target_with_lookup(sampling):
    assert texts_follow(sampling, LookupDrafter(TOKENS), max_new_tokens=9)


def always(target_probs, draft_probs, drafts, u):
    return torch.ones_like(drafts, dtype=torch.bool)


def never(target_probs, draft_probs, drafts, u):
    return torch.zeros_like(drafts, dtype=torch.bool)


def upside_down(target_probs, draft_probs, drafts, u):
    return TRUE_ACCEPT(draft_probs, target_probs[:, : drafts.shape[1]], drafts, u)


TRUE_ACCEPT = page.accept
WRONG_RULES = {
    "every draft is accepted": {"accept": always},
    "none is": {"accept": never},
    "q / p": {"accept": upside_down},
    "resampled from p": {"residual": lambda p, q: p},
    "resampled from p - q": {"residual": lambda p, q: p - q},
    "resampled from |p - q|": {"residual": lambda p, q: (p - q).abs()},
    "resampled from max(0, q - p)": {
        "residual": lambda p, q: (q - p).clamp(min=0) + (q.sum(-1) == 0)[:, None] * p
    },
}


@pytest.mark.parametrize("name", WRONG_RULES)
def test_a_wrong_rule_does_not(name, monkeypatch):
    ((function, wrong),) = WRONG_RULES[name].items()
    monkeypatch.setattr(page, function, wrong)
    assert not texts_follow(Sampling(), ModelDrafter(OTHER))


def test_a_drafter_that_misstates_its_distribution_does_not():
    """So the options must change q as well."""

    class Misstating(ModelDrafter):
        def draft(self, texts, num_tokens, sampling, u):
            return (
                super()
                .draft(texts, num_tokens, Sampling(), u)
                ._replace(probs=super().draft(texts, num_tokens, sampling, u).probs)
            )

    assert not texts_follow(Sampling(temperature=0.6), Misstating(OTHER))


def test_a_perfect_drafter_is_never_rejected():
    generators = seeded_generators(0, 50)
    rounds = list(speculate(TARGET, ModelDrafter(TARGET), [[2, 1]] * 50, 21, SAMPLING, generators))
    drafted, accepted = counts_of(rounds)
    assert drafted == accepted == 50 * 16 and len(rounds) == 5


def test_the_ends_of_the_random_numbers():
    """What the target never says is not accepted at u = 0, what it says as often as drafted at every u."""
    target_probs = torch.tensor([[[0.0, 0.4, 0.6], [0.2, 0.5, 0.3], [1.0, 0.0, 0.0]]])
    draft_probs = torch.tensor([[[0.5, 0.5, 0.0], [0.2, 0.5, 0.3]]])
    drafts = torch.tensor([[0, 1]])
    for u, accepted in [(0.0, [False, True]), (1 - 2**-24, [False, True])]:
        assert page.accept(target_probs, draft_probs, drafts, torch.full((1, 4), u)).tolist() == [accepted]


def test_distributions_that_differ_by_rounding_alone():
    """A rejected draft whose residual is 0 everywhere: a token of probability 0 must not come out."""
    p = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.2, 0.8]])
    q = torch.tensor([[0.0, 0.5, 0.5 + 1e-7], [0.0, 0.6, 0.4]])
    torch.testing.assert_close(page.residual(p, q), torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 0.4]]))


# Bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, -1, MAX_SEQ_LEN, 1000])
def test_a_number_of_drafts_that_makes_no_sense(llama, number):
    with pytest.raises(UserError, match=f"num_draft_tokens is {number}; give 1 to {MAX_SEQ_LEN - 1}"):
        next(speculate(llama, ModelDrafter(llama), PROMPTS, 5, num_draft_tokens=number))


def test_a_drafter_with_another_vocabulary(llama):
    for drafter in (ModelDrafter(TARGET), LookupDrafter(VOCAB_SIZE + 1)):
        with pytest.raises(UserError, match=f"knows {drafter.vocab_size} tokens, the target 50"):
            next(speculate(llama, drafter, PROMPTS, 5))


def test_prompts_that_cannot_be_continued(llama):
    for prompt, message in [([], "empty"), ([1] * MAX_SEQ_LEN, "context"), ([VOCAB_SIZE], "another model")]:
        with pytest.raises(UserError, match=message):
            next(speculate(llama, ModelDrafter(llama), [[1, 2], prompt], 5))
