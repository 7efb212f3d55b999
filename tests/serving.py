"""What the tests of runs_serve/ share: a text that is alone, and the accounts of an engine."""

import importlib.util
from functools import cache
from pathlib import Path

import torch

from models.utils.sampling import GREEDY, Sampling, seeded_generators, token_probs
from runs_ar.generate import generate
from runs_serve.blocks import NOBODY
from tests.zoo import small_model

# Two numbers nearer to each other than this may change places where a product of more rows is summed in
# another order: a text may then go on otherwise than alone, and the tests let it.
TOO_NEAR = 1e-4


@cache
def model_named(name):
    """A small model of the zoo; "wide", a Llama whose heads row_attention takes; or of tests/strange_pages:
    "recurrence" keeps states in place of slots."""
    if name == "wide":
        return small_model("llama", head_dim=16)
    if name != "recurrence":
        return small_model(name)
    path = Path(__file__).parent / "strange_pages/models/recurrence.py"
    spec = importlib.util.spec_from_file_location("recurrence", path)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "max_seq_len": 64, "d_model": 24, "num_layers": 2, "d_state": 7}
    model = page.Model(page.Config(**sizes, norm_eps=1e-5)).eval()
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1
        parameter.data = scale * torch.randn(parameter.shape)
    return model


@cache
def alone(name, prompt, sampling, seed, length=24):
    """The tokens of a text that is alone in the world, by runs_ar."""
    steps = generate(model_named(name), [list(prompt)], length, sampling, seeded_generators(seed, 1))
    return [token for (token,) in steps]


def assert_as_alone(name, request, choice, tokens):
    """Token for token what the request gets alone, up to the first place where two were too near to call."""
    expected = alone(name, tuple(request.prompt), request.sampling, request.seed + choice)
    expected = expected[: request.max_new_tokens]
    ends = [n for n, token in enumerate(expected, start=1) if token in request.eos_ids]
    expected = expected[: ends[0]] if ends else expected
    if tokens == expected:
        return
    place = next((n for n, pair in enumerate(zip(tokens, expected)) if pair[0] != pair[1]), None)
    assert place is not None, f"{tokens} is cut off, or too long: alone {expected}"
    assert is_too_near(name, request, choice, expected, place), f"{tokens} is not {expected}"


def is_too_near(name, request, choice, expected, place):
    """Whether a rounding error may decide over the token at this place."""
    text = torch.tensor([[*request.prompt, *expected[:place]]])
    with torch.inference_mode():
        logits = model_named(name)(text)[0, -1]
    if request.sampling.greedy:
        first, second = logits.topk(2).values
        return first - second < TOO_NEAR
    (generator,) = seeded_generators(request.seed + choice, 1)
    u = [torch.rand(1, generator=generator) for _ in range(place + 1)][-1]
    return (token_probs(logits, request.sampling).cumsum(0) - u).abs().min() < TOO_NEAR


def check_accounts(engine):
    """Every block is in the tables that its count says, or free, or kept under its name; so with places."""
    blocks, scheduler = engine.blocks, engine.scheduler
    num_users = [0] * (blocks.num_blocks + 1)
    for sequence in scheduler.running:
        assert len(set(sequence.table)) == len(sequence.table), "a block twice in one text"
        assert blocks.num_for(sequence.num_cached) <= len(sequence.table)
        for block in sequence.table:
            num_users[block] += 1
    assert num_users[NOBODY] == 0 and num_users == blocks.num_users
    idle = [*blocks.free, *blocks.unused]
    assert sorted(idle) == [b for b in range(1, blocks.num_blocks + 1) if num_users[b] == 0]
    assert all((block in blocks.name_of) == (block in blocks.unused) for block in idle)
    assert {name: block for block, name in blocks.name_of.items()} == blocks.block_of
    for sequence in scheduler.waiting:
        assert (sequence.table, sequence.num_cached, sequence.place) == ([], 0, None)
    # First come, first served: whoever runs came before whoever waits.
    order = [(one.number, one.choice) for one in [*scheduler.running, *scheduler.waiting]]
    assert order == sorted(order)
    places = [sequence.place for sequence in scheduler.running] + [*scheduler.free_places]
    assert sorted(places) == list(range(len(places)))


SAMPLINGS = [GREEDY, Sampling(temperature=1.0, top_k=20), Sampling(temperature=0.7, top_p=0.9)]
