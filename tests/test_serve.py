"""The proof of runs_serve/: every request gets what it gets alone, whoever comes, leaves or is sent away.

`make soak` makes 10,000 schedules by chance; the suite makes a few hundred of them.
"""

import copy
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from models import build_model
from models.utils.errors import UserError
from models.utils.sampling import GREEDY, Sampling
from runs_ar.generate import TextStream, generate, generate_text
from runs_serve import paged_cache
from runs_serve.blocks import NOBODY, Blocks
from runs_serve.engine import Engine
from runs_serve.paged_cache import PagedTensor, Plan, Rows
from runs_serve.request import ERROR, LENGTH, STOP, Completion, Request
from tests import tiny_checkpoints
from tests.serving import SAMPLINGS, alone, assert_as_alone, check_accounts, model_named
from tests.zoo import DECODERS, small_model

NUM_SCHEDULES = int(os.environ.get("SOAK", 240))
PARTS = 12  # that run side by side, if there are processors for it
SEARCH = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
TEXTS = [[7, 30, 2, 44, 9, 9, 51, 3, 28, 16, 40, 5, 33, 12, 60, 1], [7, 30, 2, 44, 8] * 3, [59]]
PROMPTS = sorted(
    (
        text[:length] + end
        for text in TEXTS
        for length in (1, 4, 5, 8, 9, 13, 16)
        for end in ([], [11], [22, 6])
    ),
)
LONGEST = max(map(len, PROMPTS)) + 20 - 1  # tokens of a text that the model reads


# Schedules --------------------------------------------------------------------------------------------------

requests = st.builds(
    Request,
    prompt=st.sampled_from(PROMPTS),
    max_new_tokens=st.sampled_from([20, 20, 15, 8, 2, 1]),
    sampling=st.sampled_from(SAMPLINGS),
    seed=st.integers(0, 2),
    eos_ids=st.sampled_from([frozenset(), frozenset({4, 17})]),
    num_choices=st.sampled_from([1, 1, 1, 2, 3]),
    num_draft_tokens=st.sampled_from([0, 0, 3]),
)
adding = requests.map(lambda request: ("add", request))
actions = st.one_of(
    adding,
    adding,
    st.integers(1, 6).map(lambda count: ("steps", count)),
    st.integers(0, 9).map(lambda number: ("cancel", number)),
)
engines = st.fixed_dictionaries(
    {
        "room": st.sampled_from([0, 0, 1, 2, 5, 25]),  # blocks beyond those of the longest text
        "block_size": st.sampled_from([2, 4, 5]),
        "max_running": st.sampled_from([1, 3, 5, 5]),
        "chunk": st.integers(1, 20),
        "max_draft_tokens": st.integers(1, 4),
    }
)


def run_schedule(name, options, schedule, model=None):
    """Do as the schedule says and then go on to the end; {(number, choice): Completion} and the requests."""
    options = dict(options)
    if (room := options.pop("room", None)) is not None:
        options["num_blocks"] = -(-LONGEST // options["block_size"]) + room
    engine, asked, made = Engine(model or model_named(name), **options), {}, {}

    def step():
        for event in engine.step():
            assert made.get((event.request, event.choice), Completion()).finish_reason is None
            made.setdefault((event.request, event.choice), Completion()).add(event)
        check_accounts(engine)

    for what, value in schedule:
        if what == "add":
            asked[engine.add(value)] = value
        elif what == "cancel":
            engine.cancel(value)
            if any(made.get((value, c), Completion()).finish_reason is None for c in range(3)):
                asked.pop(value, None)
            check_accounts(engine)
        else:
            for _ in range(value):
                step()
    num_steps = 0
    while engine.has_work:
        step()
        num_steps += 1
        assert num_steps < 2000, "no end"
    assert engine.blocks.num_in_use == 0
    return asked, made, engine


def check_answers(name, asked, made):
    for number, request in asked.items():
        for choice in range(request.num_choices):
            completion = made[number, choice]
            assert completion.finish_reason in (STOP, LENGTH)
            assert_as_alone(name, request, choice, completion.tokens)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_request_gets_what_it_gets_alone_whatever_the_others_do(part):
    """Llama, whose texts share blocks; every twelfth schedule is of states, which have places."""

    @settings(max_examples=NUM_SCHEDULES // PARTS, deadline=None, database=None, suppress_health_check=SEARCH)
    @given(options=engines, schedule=st.lists(actions, min_size=6, max_size=16))
    def check(options, schedule):
        asked, made, _ = run_schedule(name, options, schedule)
        check_answers(name, asked, made)

    name = "recurrence" if part == 0 else "llama"
    seed(part)(check)()


SCHEDULE = [
    ("add", Request(PROMPTS[10], 20)),
    ("add", Request(PROMPTS[11], 9, SAMPLINGS[1], seed=1, num_choices=3)),
    ("steps", 3),
    ("add", Request(PROMPTS[12], 20, num_draft_tokens=3)),
    ("add", Request(PROMPTS[30], 20, SAMPLINGS[2], num_draft_tokens=3)),
    ("steps", 2),
    ("cancel", 1),
    ("add", Request(PROMPTS[-1], 20)),
]


@pytest.mark.parametrize("num_blocks", [10, 60])
@pytest.mark.parametrize("name", [*DECODERS, "wide", "recurrence"])
def test_every_decoder_is_served(name, num_blocks):
    """With room for all of them, and with so little that texts are sent away and come again."""
    options = {"num_blocks": num_blocks, "block_size": 4, "chunk": 7}
    asked, made, engine = run_schedule(name, options, SCHEDULE)
    check_answers(name, asked, made)
    count = engine.statistics()
    assert (count["num_preempted"] > 0) == (num_blocks == 10)
    assert num_blocks == 10 or count["num_drafts_accepted"] > 0  # few blocks leave few drafts
    assert (count["num_tokens_found"] > 0) == engine.memory.is_all_paged


# Blocks -----------------------------------------------------------------------------------------------------


def drain(engine):
    """Steps until nobody is left: {(number, choice): Completion}."""
    made = {}
    while engine.has_work:
        for event in engine.step():
            made.setdefault((event.request, event.choice), Completion()).add(event)
        check_accounts(engine)
    return made


def small_engine(name="llama", **options):
    return Engine(model_named(name), **{"num_blocks": 40, "block_size": 4} | options)


@pytest.mark.parametrize("d", [3, 16])
def test_what_is_written_in_blocks_is_read_as_from_a_cache(d):
    """The numbers themselves, to the bit, whatever order the blocks are in; a pad leaves no trace."""
    pool, rows = torch.zeros(6, 2, 4, d), Rows(torch.tensor([[5, 2], [1, NOBODY]]), block_size=4)
    slots = torch.randn(2, 2, 8, d)
    paged = PagedTensor(pool, rows)
    for start, end in [(0, 3), (3, 4)]:
        paged.write(slots[:, :, start:end], torch.arange(start, end).expand(2, -1))
    paged.write(slots[:, :, 4:5], torch.tensor([[4], [-1]]))
    assert paged.shape == slots.shape
    assert torch.equal(paged[:, :, :4], slots[:, :, :4]) and torch.equal(paged[:1, :, 4], slots[:1, :, 4])
    assert torch.equal(pool[[2, 3, 4], :, 1:], torch.zeros(3, 2, 3, d))


@pytest.mark.parametrize("d", [3, 16])
def test_attention_over_blocks_is_attention(d):
    """By torch, which gathers them, and where heads are wide enough by the kernel, which does not."""
    rows = Rows(torch.tensor([[5, 2], [1, 3]]), block_size=4)
    k, v = (PagedTensor(torch.randn(6, 2, 4, d), rows) for _ in range(2))
    q, mask = torch.randn(2, 4, 1, d), torch.arange(8) <= torch.tensor([[7], [3]])[:, None, None]
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(q, k.gathered(), v.gathered(), mask, enable_gqa=True, scale=0.3)
    torch.testing.assert_close(attend(q, k, v, mask, enable_gqa=True, scale=0.3), expected)
    torch.testing.assert_close(attend(q, k.gathered(), v, mask, enable_gqa=True, scale=0.3), expected)


def test_beside_windows_full_layers_are_paged():
    """gpt_oss notes which position a slot holds, and has a slot more for pads; its windows are rings."""
    model = small_model("gpt_oss", max_seq_len=200, window=8)
    engine = Engine(model, num_blocks=60, block_size=4, max_running=3, chunk=30)
    windows, full = [layer.pools for layer in engine.memory.layers]
    assert not windows and {name: pool.shape[0] for name, pool in full.items()} == {"k": 61, "v": 61}
    prompts = [(text * 9)[:length] for text, length in zip(TEXTS, (90, 41, 5))]
    completions = engine.generate([Request(prompt, 24) for prompt in prompts])
    for prompt, (completion,) in zip(prompts, completions):
        assert completion.tokens == [token for (token,) in generate(model, [prompt], 24)]


def test_a_shared_prompt_is_read_once():
    prompt, ends = TEXTS[0] + TEXTS[1], [[3], [4, 5], [6, 7, 8]]
    engine = small_engine(chunk=5)
    drain_alone = [len(prompt + end) + 4 for end in ends]
    for end in ends:
        engine.add(Request(prompt + end, 5))
    drain(engine)
    found = 2 * (len(prompt) // 4 * 4)  # by the second and the third, in whole blocks
    assert engine.statistics()["num_tokens_found"] == found
    assert engine.statistics()["num_tokens_read"] == sum(drain_alone) - found


def test_choices_share_the_prompt_up_to_its_last_block_which_each_copies():
    engine, copies = small_engine(), []
    engine.memory.copy_block = lambda *blocks, copy=engine.memory.copy_block: (
        copies.append(blocks),
        copy(*blocks),
    )
    request = Request(TEXTS[0][:14], 6, SAMPLINGS[1], num_choices=3)
    engine.add(request)
    made = drain(engine)
    assert len({tuple(completion.tokens) for completion in made.values()}) == 3
    for (_, choice), completion in made.items():
        assert_as_alone("llama", request, choice, completion.tokens)
    # Choices 1 and 2 read the prompt's last token for themselves: 13 of its 14 are found.
    assert engine.statistics()["num_tokens_found"] == 26 and len(copies) >= 2


def test_a_prompt_of_whole_blocks_may_come_again():
    """All of it is known then, but the last token is read again: somebody must say what follows it."""
    engine, request = small_engine(), Request(TEXTS[0], 5)
    for _ in range(2):
        engine.add(request)
        (completion,) = drain(engine).values()
        assert_as_alone("llama", request, 0, completion.tokens)
    assert len(TEXTS[0]) % 4 == 0 and engine.statistics()["num_tokens_found"] == len(TEXTS[0]) - 4


def test_a_block_with_a_name_is_not_written_on():
    blocks = Blocks(num_blocks=2, block_size=2)
    named, nameless = blocks.take(), blocks.take()
    blocks.give_name(named, blocks.names_of([1, 2])[0])
    assert not blocks.is_private(named) and blocks.is_private(nameless)
    blocks.share(nameless)
    assert not blocks.is_private(nameless)


def test_what_was_not_used_for_the_longest_time_makes_room():
    blocks = Blocks(num_blocks=3, block_size=2)
    names = blocks.names_of([1, 2, 3, 4, 5, 6])
    table = [blocks.take() for _ in range(3)]
    for block, name in zip(table, names):
        blocks.give_name(block, name)
    for n in (1, 0, 2):
        blocks.release(table[n])
    blocks.share(table[1])  # used again, and so the youngest
    blocks.release(table[1])
    assert [blocks.take(), blocks.take(), blocks.take()] == [table[0], table[2], table[1]]
    assert blocks.find(names) == [] and blocks.num_available == 0


def test_a_block_is_found_behind_the_same_beginning_only():
    blocks = Blocks(num_blocks=4, block_size=2)
    for name in blocks.names_of([1, 2, 3, 4]):
        blocks.give_name(blocks.take(), name)
    assert len(blocks.find(blocks.names_of([1, 2, 3, 4, 9, 9]))) == 2
    assert blocks.find(blocks.names_of([3, 4])) == blocks.find(blocks.names_of([9, 9, 3, 4])) == []
    assert blocks.names_of([1, 2, 3, 4], blocks.names_of([1, 2])) == blocks.names_of([1, 2, 3, 4])
    # No text can be made to look like another by how its numbers are written.
    assert blocks.names_of([1, 23]) != blocks.names_of([12, 3])


# Who is served when -----------------------------------------------------------------------------------------


def test_a_long_prompt_holds_nobody_up():
    """Who writes gets a token with every step, while another's prompt is read in chunks."""
    engine = small_engine(chunk=3)
    engine.add(Request(TEXTS[0][:3], 12))
    assert len(engine.step()) == 1
    engine.add(Request(TEXTS[1], 3))
    steps = [[event.request for event in engine.step()] for _ in range(6)]
    assert steps == [[0], [0], [0], [0], [0, 1], [0, 1]]


def test_who_comes_joins_and_the_oldest_is_never_sent_away():
    engine = small_engine(num_blocks=9)
    for number in range(5):
        engine.add(Request(TEXTS[0][number:], 20))
    sent_away, ended = set(), []
    engine.scheduler.preempt, preempt = (
        (lambda one: (sent_away.add(one.number), preempt(one))),
        engine.scheduler.preempt,
    )
    while engine.has_work:
        oldest = engine.scheduler.running[:1]
        ended += [event.request for event in engine.step() if event.finish_reason]
        check_accounts(engine)
        assert not oldest or oldest[0].place is not None or oldest[0].number in ended
    assert ended[0] == 0 and sorted(ended) == [0, 1, 2, 3, 4] and sent_away and 0 not in sent_away


def test_a_cancelled_request_is_gone_at_once():
    engine = small_engine()
    numbers = [engine.add(Request(TEXTS[0], 20, num_choices=2)), engine.add(Request(TEXTS[1], 20))]
    for _ in range(3):
        engine.step()
    engine.cancel(numbers[0])
    check_accounts(engine)
    assert {event.request for event in engine.step()} == {numbers[1]}
    engine.cancel(numbers[1])
    engine.cancel(99)
    assert not engine.has_work and engine.blocks.num_in_use == 0


def test_who_stops_listening_frees_the_place():
    engine = small_engine()
    stream = engine.stream(Request(TEXTS[0], 20))
    assert [next(stream).token for _ in range(3)] == alone("llama", tuple(TEXTS[0]), GREEDY, 0)[:3]
    stream.close()
    assert not engine.has_work and engine.blocks.num_in_use == 0


@pytest.mark.parametrize("name", [*DECODERS, "recurrence"])
def test_who_takes_a_place_finds_it_empty(name):
    """One text at a time, each in the place and the blocks of the one before it."""
    engine = small_engine(name, max_running=1, num_blocks=10)
    requests = [Request(TEXTS[0], 12), Request(TEXTS[1], 9), Request(TEXTS[0][1:4], 12)]
    for number, (completion,) in enumerate(engine.generate(requests)):
        assert_as_alone(name, requests[number], 0, completion.tokens)


def test_nan_in_one_text_harms_no_other():
    """Its blocks are used again, and what is masked in them is multiplied by 0."""
    model = copy.deepcopy(model_named("llama"))
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.token_embed.weight[55] = torch.nan
    engine = Engine(model, num_blocks=12, block_size=4)
    bad = engine.add(Request([1, 2, 3, 4, 5, 55, 6], 9, num_choices=2))
    good = [engine.add(Request(TEXTS[n], 12)) for n in (0, 1)]
    made = drain(engine)
    assert [made[bad, c].finish_reason for c in (0, 1)] == [ERROR, ERROR] and made[bad, 0].tokens == []
    good += [engine.add(Request(TEXTS[n][::-1], 12)) for n in (0, 1)]
    made |= drain(engine)
    for number, prompt in zip(good, TEXTS[:2] + [text[::-1] for text in TEXTS[:2]]):
        assert_as_alone("llama", Request(prompt, 12), 0, made[number, 0].tokens)
    assert all(pool.isfinite().all() for pool in engine.memory.all_pools())


# What a request asks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "llama"
    tiny_checkpoints.save_checkpoint(folder, "llama")
    return tiny_checkpoints.load(folder)


def test_texts_and_stop_strings_are_those_of_runs_ar(with_text):
    model, tokenizer = with_text
    prompts = [tokenizer.encode(text) for text in ("def save", "import json", "the small")]
    engine = Engine(model, tokenizer, num_blocks=40)
    plain = [completion for (completion,) in engine.generate([Request(p, 30) for p in prompts])]
    stops = [completion.text[4:6] for completion in plain]
    stopped = engine.generate([Request(p, 30, stop_strings=(s,)) for p, s in zip(prompts, stops)])
    for prompt, stop, (completion,), whole in zip(prompts, stops, stopped, plain):
        stream = TextStream(tokenizer, prompt, (stop,))
        pieces = [text for _, text in generate_text(model, prompt, stream, max_new_tokens=30)]
        assert completion.text == "".join(pieces) + stream.finish()
        assert completion.finish_reason == STOP and whole.finish_reason == LENGTH
        assert whole.text.startswith(completion.text) and stop not in completion.text


def test_an_eos_is_the_last_token():
    free = alone("llama", tuple(TEXTS[0]), GREEDY, 0)
    ((completion,),) = small_engine().generate([Request(TEXTS[0], 20, eos_ids=frozenset(free[5:7]))])
    assert completion.finish_reason == STOP and completion.tokens == free[: len(completion.tokens)]
    assert completion.tokens[-1] in free[5:7] and not set(completion.tokens[:-1]) & set(free[5:7])


def test_logprobs_are_those_of_the_whole_pass():
    request = Request(TEXTS[0], 8, SAMPLINGS[1], seed=3, num_logprobs=2)
    ((completion,),) = small_engine().generate([replace(request, num_draft_tokens=3)])
    tokens = torch.tensor([request.prompt + completion.tokens])
    with torch.inference_mode():
        expected = model_named("llama")(tokens)[0, len(request.prompt) - 1 : -1].log_softmax(dim=-1)
    for row, token, logprob, best in zip(
        expected, completion.tokens, completion.logprobs, completion.top_logprobs, strict=True
    ):
        assert logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [n for n, _ in best] == row.topk(2).indices.tolist()
        assert [p for _, p in best] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


def test_drafts_change_no_token_and_save_steps():
    """Also where tokens are drawn: a draft is taken if it is what would have been drawn."""
    prompt = TEXTS[1]
    for sampling in (GREEDY, Sampling(temperature=0.3)):
        plain, drafting = small_engine(), small_engine()
        request = Request(prompt, 40, sampling, seed=1)
        ((expected,),), ((made,),) = (
            plain.generate([request]),
            drafting.generate([replace(request, num_draft_tokens=4)]),
        )
        assert made.tokens == expected.tokens
        assert drafting.num_drafts_accepted > 0
        assert drafting.num_steps == plain.num_steps - drafting.num_drafts_accepted


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request([], 4), "the prompt is empty"),
        (Request([61], 4), "token 61 is not among the 61"),
        (Request([-1, 3], 4), "token -1 is negative"),
        (Request([1] * 64, 4), "context only 64"),
        (Request([1] * 30, 12), "a prompt of 30 tokens and up to 12 new ones are more than the 41 tokens"),
        (Request([1], 0), "max_new_tokens is 0; give 1 or more"),
        (Request([1], num_choices=0), "num_choices is 0"),
        (Request([1], num_logprobs=-1), "num_logprobs is -1"),
        (Request([1], stop_strings=("x",)), "stop strings need a tokenizer"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_in_one_sentence(request_, message):
    engine = small_engine(num_blocks=10)
    with pytest.raises(UserError, match=message):
        engine.add(request_)
    assert not engine.has_work
    ((completion,),) = engine.generate([Request([1] * 30, 11)])
    assert len(completion.tokens) == 11


# Memory -----------------------------------------------------------------------------------------------------


def test_blocks_are_as_many_as_a_share_of_the_memory_holds(monkeypatch):
    model = model_named("llama")
    config = model.config
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    plan = Plan(model, num_slots=64, block_size=16)
    assert plan.bytes_per_token == per_token and plan.bytes_per_place == 0
    monkeypatch.setattr(paged_cache, "available_memory", lambda device: 10 * 16 * per_token)
    assert Engine(model, memory_share=0.5).blocks.num_blocks == 5
    assert Engine(model, memory_share=1.0, max_running=2).blocks.num_blocks == 2 * 64 // 16
    with pytest.raises(UserError, match="5% of the .* that cpu has free is too little for 32 texts at once"):
        Engine(model, memory_share=0.05)
    # States take no blocks, but a place for each text.
    states = Plan(model_named("recurrence"), num_slots=64, block_size=16, num_undo=4)
    assert states.bytes_per_token == 0 and states.bytes_per_place == 2 * 5 * (7 * 24 * 4 + 8)


def test_no_memory_is_taken_to_see_what_a_cache_is_like():
    """A row of Llama 3's context alone would be 16 GB; a plan has shapes, and a pool what it is given."""
    config = replace(model_named("llama").config, max_seq_len=2**30)
    model = build_model("llama", config, device="cpu")
    engine = Engine(model, num_blocks=3, block_size=4)
    assert sum(pool.numel() for pool in engine.memory.all_pools()) == 4 * 4 * 2 * 2 * 2 * 10
