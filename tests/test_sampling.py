"""The proof of models/utils/sampling.py: the distributions of `transformers`, and draws that follow them."""

import math

import pytest
import torch
from transformers.generation import logits_process as oracle

from models.utils.errors import UserError
from models.utils.sampling import GREEDY, Sampling, draw, pick, seeded_generators, token_at, token_probs

OPTIONS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=2.5),
    Sampling(top_k=1),
    Sampling(top_k=4),
    Sampling(top_k=1000),
    Sampling(top_p=0.7),
    Sampling(top_p=0.0),
    Sampling(top_p=0.999999),
    Sampling(min_p=0.2),
    Sampling(min_p=1.0),
    Sampling(temperature=0.7, top_k=6),
    Sampling(temperature=1.6, top_p=0.8),
    Sampling(temperature=1.8, min_p=0.1),
    Sampling(top_k=5, top_p=0.75),
    Sampling(top_p=0.6, min_p=0.45),
    Sampling(temperature=1.3, top_k=7, top_p=0.9, min_p=0.15),
]


def oracle_probs(logits, sampling):
    """What `transformers` samples from: its processors, in the order that its generate puts them."""
    processors = [oracle.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        processors.append(oracle.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(oracle.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(oracle.MinPLogitsWarper(sampling.min_p))
    for processor in processors:
        logits = processor(None, logits)
    return logits.softmax(dim=-1)


def random_logits(rows, vocab_size, seed=0):
    return 2 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sampling", OPTIONS, ids=str)
def test_probs_equal_the_oracle(sampling):
    logits = random_logits(50, 31)
    probs = token_probs(logits, sampling)
    expected = oracle_probs(logits, sampling)
    assert torch.equal(probs > 0, expected > 0)
    torch.testing.assert_close(probs, expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("sampling", OPTIONS, ids=str)
def test_ties_equal_the_oracle(sampling):
    """Whole-number logits tie with each other, also at the borders of top-k and top-p."""
    logits = random_logits(200, 9, seed=1).round().clamp(-1, 2)
    logits[0] = 0
    logits[1, 3:] = -math.inf
    probs = token_probs(logits, sampling)
    expected = oracle_probs(logits, sampling)
    assert torch.equal(probs > 0, expected > 0)
    torch.testing.assert_close(probs, expected, atol=1e-7, rtol=1e-6)


def test_the_options_on_a_distribution_to_check_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()

    def probs(**options):
        return token_probs(logits, Sampling(**options))[0].tolist()

    assert probs(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert probs(top_p=0.7) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert probs(top_p=0.8) == pytest.approx([5 / 9, 5 / 18, 3 / 18, 0])
    assert probs(min_p=0.4) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    # Exactly 0.5 of the probability is left by two tokens of four, and that is enough.
    quarters = token_probs(torch.zeros(1, 4), Sampling(top_p=0.5))
    assert torch.equal(quarters, oracle_probs(torch.zeros(1, 4), Sampling(top_p=0.5)))
    assert quarters.count_nonzero() == 2
    # The temperature comes first: at 0.5 the probabilities go by their squares, and 0.25 is too small.
    assert probs(min_p=0.4, temperature=0.5) == [1, 0, 0, 0]
    # top-p counts what top-k has left: 2/3 of it is enough for 0.6, though 0.5 of all would not be.
    assert probs(top_k=2, top_p=0.6) == [1, 0, 0, 0]


def test_temperature_0_is_greedy():
    logits = random_logits(20, 31)
    logits[0, 5] = logits[0, 9] = 50.0
    assert torch.equal(pick(logits, GREEDY), logits.argmax(dim=-1))
    probs = token_probs(logits, GREEDY)
    assert torch.equal(probs.argmax(dim=-1), logits.argmax(dim=-1))
    assert torch.equal(probs.sum(dim=-1), torch.ones(20))
    assert torch.equal(pick(logits, Sampling(temperature=1e-30)), logits.argmax(dim=-1))


def test_probs_of_any_leading_shape_and_dtype():
    logits = random_logits(6, 31).bfloat16()
    sampling = Sampling(temperature=0.9, top_k=9, top_p=0.8, min_p=0.05)
    probs = token_probs(logits, sampling)
    assert probs.dtype == torch.float32
    assert torch.equal(token_probs(logits.view(2, 3, 31), sampling).view(6, 31), probs)


# Draws ------------------------------------------------------------------------------------------------------


def chi_square(counts, probs):
    """(statistic, degrees of freedom) of draws; impossible tokens must not be among them."""
    assert counts[probs == 0].sum() == 0
    counts, probs = counts[probs > 0], probs[probs > 0]
    expected = probs * counts.sum()
    assert expected.min() > 5
    return ((counts - expected).square() / expected).sum().item(), len(probs) - 1


def follows(counts, probs):
    """Whether chi-square stays below 5 standard deviations above its mean (both known: k and sqrt(2 k))."""
    statistic, freedom = chi_square(counts, probs)
    return statistic < freedom + 5 * math.sqrt(2 * freedom) + 1e-6


def draws(logits, sampling, rounds=40, rows=1000):
    """How often each token is drawn; all rows have the same logits, each its own generator."""
    generators = seeded_generators(seed=0, batch_size=rows)
    batch = logits.expand(rows, -1)
    tokens = torch.cat([pick(batch, sampling, generators) for _ in range(rounds)])
    return tokens.bincount(minlength=logits.shape[-1]).double()


@pytest.mark.parametrize(
    "sampling, other",
    [
        (Sampling(), Sampling(temperature=0.95)),
        (Sampling(temperature=0.6), Sampling(temperature=0.63)),
        (Sampling(temperature=2.0), Sampling(temperature=1.8)),
        (Sampling(top_k=4), Sampling(top_k=5)),
        (Sampling(top_p=0.8), Sampling(top_p=0.9)),
        (Sampling(min_p=0.2), Sampling(min_p=0.1)),
        (Sampling(0.8, top_k=6, top_p=0.9, min_p=0.1), Sampling(0.75, top_k=6, top_p=0.9, min_p=0.1)),
    ],
    ids=str,
)
def test_draws_follow_the_distribution_and_no_other(sampling, other):
    logits = torch.tensor([1.5, -0.3, 0.2, 2.0, 0.9, -1.0, 0.0, 1.1, 0.6, -0.6])
    counts = draws(logits, sampling)
    assert follows(counts, oracle_probs(logits[None], sampling)[0].double())
    assert not matches(counts, oracle_probs(logits[None], other)[0].double())


def matches(counts, probs):
    """As `follows`, and False where a token was drawn that must not be, or never one that must."""
    return torch.equal(counts > 0, probs > 0) and follows(counts, probs)


def test_a_token_of_probability_0_is_never_drawn():
    """Not at the ends of the vocabulary either, where u is 0 or as near to 1 as it comes."""

    class Fixed:
        def __init__(self, value):
            self.value = value

    probs = torch.tensor([[0.0, 0.7, 0.0, 0.3, 0.0, 0.0]])
    for u, token in [(0.0, 1), (0.6999, 1), (0.7001, 3), (1 - 2**-24, 3)]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *size, generator: torch.tensor([generator.value]))
            assert draw(probs, [Fixed(u)]).tolist() == [token]
            # Sums that fall short of 1, as rounding leaves them.
            assert draw(probs * (1 - 1e-6), [Fixed(u)]).tolist() == [token]


def test_a_large_vocabulary_is_drawn_from_evenly():
    """Sums of many small probabilities: no part of a vocabulary of 100,000 is favoured by their rounding."""
    vocab_size, rows = 100_000, 8
    generators = seeded_generators(0, rows)
    logits = torch.zeros(rows, vocab_size)
    tokens = torch.cat([pick(logits, Sampling(), generators) for _ in range(200)])
    counts = (tokens // 10_000).bincount(minlength=10).double()
    assert follows(counts, torch.full((10,), 0.1, dtype=torch.double))


def test_each_row_draws_from_its_own_generator():
    logits, sampling = random_logits(3, 31), Sampling(temperature=1.5)
    together = [pick(logits, sampling, gens) for gens in [seeded_generators(7, 3)] for _ in range(30)]
    for row in range(3):
        generators = seeded_generators(7 + row, 1)
        alone = [pick(logits[row : row + 1], sampling, generators) for _ in range(30)]
        assert torch.cat(alone).tolist() == torch.stack(together)[:, row].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": math.nan},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"min_p": math.nan},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_name(options):
    (name,) = options
    with pytest.raises(UserError, match=name):
        Sampling(**options)


def test_a_temperature_is_greedy_only_where_a_division_could_overflow():
    logits = torch.tensor([0.0, 2e-5])
    assert token_probs(logits, Sampling(temperature=2e-5)).tolist() == pytest.approx(
        [0.2689, 0.7311], abs=1e-3
    )
    assert token_probs(logits, Sampling(temperature=1e-7)).tolist() == [0.0, 1.0]


def test_a_number_on_the_border_falls_on_the_token_behind_it():
    """Each token has the numbers from its border on: 0 belongs to the first that is possible."""
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.25, 0.5]])
    expected = {0.0: 1, 0.2499: 1, 0.25: 3, 0.4999: 3, 0.5: 4, 0.9999: 4}
    assert {u: token_at(probs, torch.tensor([u])).item() for u in expected} == expected
