"""The proof of runs_ar/generate.py and runs_ar/chat.py, on tiny random models."""

import json

import pytest
import torch

from models.utils.errors import UserError
from models.utils.sampling import GREEDY, Sampling, seeded_generators
from runs_ar import chat
from runs_ar import generate as page
from runs_ar.chat import Conversation
from runs_ar.generate import TextStream, generate, generate_text, generation_defaults
from tests import tiny_checkpoints
from tests.tiny_checkpoints import EOS, MAX_SEQ_LEN, VOCAB_SIZE

PROMPTS = [[1, 40, 50, 60, 70, 80], [1, 99], [1, 7, 8, 9, 200, 201, 202, 203, 204, 205, 206]]
SAMPLING = Sampling(temperature=1.2, top_k=40, top_p=0.95, min_p=0.01)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def trio(request, tmp_path_factory):
    """(the oracle, our model, the tokenizer) with the same weights."""
    folder = tmp_path_factory.mktemp("generate") / request.param
    oracle = tiny_checkpoints.save_checkpoint(folder, request.param, chat=True)
    return oracle, *tiny_checkpoints.load(folder)


@pytest.fixture(scope="module")
def model(trio):
    return trio[1]


@pytest.fixture(scope="module")
def tokenizer(trio):
    return trio[2]


def rows_of(steps):
    """The tokens of each row, from the steps that generate yields."""
    return [[token for token in row if token is not None] for row in zip(*steps)]


def alone(model, prompt, max_new_tokens, **options):
    return rows_of(generate(model, [prompt], max_new_tokens, **options))[0]


# The oracle -------------------------------------------------------------------------------------------------


def oracle_greedy(oracle, prompt, max_new_tokens, eos_ids):
    tokens = torch.tensor([prompt])
    made = oracle.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, do_sample=False,
        eos_token_id=eos_ids or None, pad_token_id=0,
    )  # fmt: skip
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_equals_the_oracle(trio, prompt):
    oracle, model, _ = trio
    assert alone(model, prompt, 60) == oracle_greedy(oracle, prompt, 60, [])


def test_greedy_equals_the_oracle_with_several_eos_ids(trio):
    oracle, model, _ = trio
    free = alone(model, PROMPTS[0], 30)
    # Two tokens that come late and early: the earlier one ends the text, and is its last token.
    eos_ids = [free[20], free[9]]
    made = alone(model, PROMPTS[0], 30, eos_ids=eos_ids)
    assert made == oracle_greedy(oracle, PROMPTS[0], 30, eos_ids)
    assert made[-1] in eos_ids and len(made) <= 10


def test_a_long_prompt_in_chunks_equals_the_oracle(trio, monkeypatch):
    oracle, model, _ = trio
    prompts = [[1, *range(3, 3 + length)] for length in (49, 20, 7, 8, 1)]
    expected = [oracle_greedy(oracle, prompt, 12, []) for prompt in prompts]
    for size in (8, 7, 1, 50, 512):
        monkeypatch.setattr(page, "PREFILL_CHUNK", size)
        assert rows_of(generate(model, prompts, 12)) == expected


def test_no_chunk_attends_through_a_mask_longer_than_itself(trio, monkeypatch):
    """What the layers are called with: the first chunk without positions, the rest with."""
    calls = []

    class Recorder:
        config, lm_head, new_cache = trio[1].config, trio[1].lm_head, trio[1].new_cache

        def hidden(self, tokens, positions=None, cache=None):
            calls.append((tokens.shape[1], None if positions is None else positions[0].tolist()))
            return trio[1].hidden(tokens, positions, cache)

        def __call__(self, *inputs):
            return self.lm_head(self.hidden(*inputs))

    monkeypatch.setattr(page, "PREFILL_CHUNK", 8)
    alone(Recorder(), [1, *range(3, 22)], 3)
    assert calls == [(8, None), (8, list(range(8, 16))), (4, list(range(16, 20))), (1, [20]), (1, [21])]


# Batches ----------------------------------------------------------------------------------------------------


def test_a_greedy_batch_equals_each_row_alone(model):
    together = rows_of(generate(model, PROMPTS, 40))
    assert together == [alone(model, prompt, 40) for prompt in PROMPTS]


def test_a_sampled_batch_equals_each_row_alone(model):
    together = rows_of(generate(model, PROMPTS, 40, SAMPLING, seeded_generators(5, 3)))
    for row, prompt in enumerate(PROMPTS):
        assert together[row] == alone(
            model, prompt, 40, sampling=SAMPLING, generators=seeded_generators(5 + row, 1)
        )
    assert together[0] != rows_of(generate(model, PROMPTS, 40, SAMPLING, seeded_generators(6, 3)))[0]


def test_rows_that_end_early_leave_the_others_alone(model):
    free = [alone(model, prompt, 40) for prompt in PROMPTS]
    eos_ids = {free[0][3], free[1][11]}
    steps = list(generate(model, PROMPTS, 40, eos_ids=eos_ids))
    assert rows_of(steps) == [alone(model, prompt, 40, eos_ids=eos_ids) for prompt in PROMPTS]
    lengths = [len(row) for row in rows_of(steps)]
    assert min(lengths) < max(lengths) == len(steps)
    for row, length in enumerate(lengths):
        assert all(step[row] is None for step in steps[length:])


def test_the_end_of_the_context_ends_a_row_and_no_other(model):
    prompts = [[1, *range(3, 3 + MAX_SEQ_LEN - 5)], [1, 99]]
    rows = rows_of(generate(model, prompts, 1000))
    assert [len(row) for row in rows] == [4, MAX_SEQ_LEN - 2]
    assert rows == [alone(model, prompt, 1000) for prompt in prompts]


def test_a_caller_can_end_a_row(model):
    finished, steps = [False] * 3, []
    for step in generate(model, PROMPTS, 12, finished=finished):
        steps.append(step)
        finished[1] = finished[1] or len(steps) == 4
    expected = [alone(model, prompt, 12) for prompt in PROMPTS]
    assert rows_of(steps) == [expected[0], expected[1][:4], expected[2]]


def test_tokens_come_as_they_are_made(model):
    """A consumer that stops asking stops the work."""
    calls = []
    handle = model.token_embed.register_forward_hook(lambda *_: calls.append(1))
    try:
        steps = generate(model, [PROMPTS[0]], 50)
        for count in (1, 2, 3):
            next(steps)
            assert len(calls) == count
    finally:
        handle.remove()


def test_the_head_sees_only_the_tokens_that_are_picked(model):
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    try:
        list(generate(model, PROMPTS, 3))
    finally:
        handle.remove()
    assert shapes == [(3, 32), (3, 1, 32), (3, 1, 32)]


@pytest.mark.parametrize(
    "prompt, message",
    [([], "empty"), ([1] * MAX_SEQ_LEN, "context"), ([1, VOCAB_SIZE], "another model")],
    ids=["empty", "long", "unknown"],
)
def test_prompts_that_cannot_be_continued(model, prompt, message):
    with pytest.raises(UserError, match=message):
        next(generate(model, [[1, 2], prompt], 5))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_compute_no_number_are_an_error(model, value):
    weight = model.final_norm.weight
    before = weight.detach().clone()
    try:
        weight.data[0] = float(value)
        with pytest.raises(UserError, match="NaN"):
            next(generate(model, [[1, 2]], 5))
    finally:
        weight.data.copy_(before)


# Text and stop strings --------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose token n is pieces[n]."""

    eos_id = None

    def __init__(self, *pieces):
        self.pieces = pieces
        self.vocab_size = len(pieces)

    def stream(self):
        return self

    def push(self, token):
        return self.pieces[token]

    def finish(self):
        return ""


def stream_of(pieces, stop_strings, tail=""):
    """What is shown after each piece, and at the end."""
    tokenizer = Letters(*pieces)
    tokenizer.finish = lambda: tail
    stream = TextStream(tokenizer, stop_strings=stop_strings)
    return [stream.push(token) for token in range(len(pieces))] + [stream.finish()], stream.stopped


@pytest.mark.parametrize(
    "pieces, stop_strings, shown, stopped",
    [
        (["ab", "cd"], [], ["ab", "cd", ""], False),
        (["ab", "cd", "ef"], ["cd"], ["ab", "", "", ""], True),
        # Across a token border, and nothing of it shown too early.
        (["a.", "\n", "\nb"], ["\n\n"], ["a.", "", "", ""], True),
        (["xST", "O", "Py"], ["STOP"], ["x", "", "", ""], True),
        # Held back in vain: shown as soon as it cannot be a stop string any more, or at the end.
        (["xST", "O", "Oy"], ["STOP"], ["x", "", "STOOy", ""], False),
        (["xST"], ["STOP"], ["x", "ST"], False),
        (["aab", "aac"], ["aabaad"], ["", "aabaac", ""], False),
        (["aaa", "ab"], ["aab"], ["a", "a", ""], True),
        # Inside one token, with text on both sides.
        (["one<end>two"], ["<end>"], ["one", ""], True),
        # Of two, the one that is complete first counts, whatever the tokens are.
        (["abcd"], ["abcd", "bc"], ["a", ""], True),
        (["ab", "c", "d"], ["abcd", "bc"], ["", "a", "", ""], True),
        (["xabc"], ["bc", "abc"], ["x", ""], True),
    ],
)
def test_stop_strings(pieces, stop_strings, shown, stopped):
    assert stream_of(pieces, stop_strings) == (shown, stopped)


def test_a_stop_string_in_what_finish_brings():
    assert stream_of(["ab"], ["bc"], tail="c!") == (["a", ""], True)


def test_stop_strings_at_any_token_borders():
    """However a text is cut into tokens, what is shown is what stands before the stop string."""
    text, generator = "aabaabaaabab|ba", torch.Generator().manual_seed(0)
    for stop in ("aab|", "aaab", "ab|", "bab|b", "ba|", "zz"):
        expected = text[: text.find(stop)] if stop in text else text
        for _ in range(40):
            cuts = sorted({0, len(text), *torch.randint(1, len(text), (4,), generator=generator).tolist()})
            pieces = [text[start:end] for start, end in zip(cuts, cuts[1:])]
            shown, stopped = stream_of(pieces, [stop])
            assert "".join(shown) == expected and stopped == (stop in text)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="stop string"):
        TextStream(Letters("a"), stop_strings=["x", ""])


def test_a_token_that_the_tokenizer_does_not_have_shows_nothing():
    stream = TextStream(Letters("a", "b"))
    assert [stream.push(token) for token in (0, 2, 1)] == ["a", "", "b"]


def test_streamed_text_is_the_decoded_text(model, tokenizer):
    prompt = tokenizer.encode("def redraw(model, ")
    stream, pieces, tokens = TextStream(tokenizer, prompt), [], []
    options = {"sampling": Sampling(), "generators": seeded_generators(0, 1)}
    for token, text in generate_text(model, prompt, stream, max_new_tokens=60, **options):
        tokens.append(token)
        pieces.append(text)
    pieces.append(stream.finish())
    assert tokenizer.decode(prompt) + "".join(pieces) == tokenizer.decode(prompt + tokens)
    assert sum(map(bool, pieces)) > 20


def test_the_first_new_word_keeps_its_space(tokenizer):
    """At the beginning of a text sentencepiece drops the space of a word; behind a prompt it counts."""
    pieces = {id: tokenizer.core.id_to_piece(id) for id in range(tokenizer.vocab_size)}
    word, piece = next((id, piece) for id, piece in pieces.items() if piece[0] == "▁" and piece[1:].isalpha())
    assert TextStream(tokenizer).push(word) == piece[1:]
    assert TextStream(tokenizer, tokenizer.encode("def")).push(word) == " " + piece[1:]


def test_a_character_that_the_prompt_begins_is_finished(tokenizer):
    """More than the prompt's last token counts: of the three bytes of a euro it holds two, the text one."""
    tokens = [tokenizer.core.piece_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    stream = TextStream(tokenizer, tokenizer.encode("def") + tokens[:2])
    assert stream.push(tokens[2]) + stream.finish() == "€"


def test_a_stop_string_ends_the_generation(model, tokenizer):
    prompt = tokenizer.encode("def ")
    tokens = alone(model, prompt, 40, sampling=SAMPLING, generators=seeded_generators(0, 1))
    whole = tokenizer.decode(prompt + tokens)[len(tokenizer.decode(prompt)) :]
    stop = whole[12:15]
    stream = TextStream(tokenizer, prompt, [stop])
    options = {"sampling": SAMPLING, "generators": seeded_generators(0, 1)}
    steps = list(generate_text(model, prompt, stream, max_new_tokens=40, **options))
    assert "".join(text for _, text in steps) + stream.finish() == whole[: whole.find(stop)]
    assert stream.stopped and len(steps) < 40


# generation_config.json -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, sampling, eos_ids",
    [
        ({}, GREEDY, {7}),
        ({"eos_token_id": 5}, GREEDY, {5}),
        ({"eos_token_id": [5, 8]}, GREEDY, {5, 8}),
        ({"temperature": 0.6, "top_p": 0.9}, GREEDY, {7}),
        ({"do_sample": False, "temperature": 0.6}, GREEDY, {7}),
        ({"do_sample": True}, Sampling(), {7}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "eos_token_id": [1]},
            Sampling(0.6, top_p=0.9),
            {1},
        ),
        ({"do_sample": True, "top_k": 20, "min_p": 0.1}, Sampling(top_k=20, min_p=0.1), {7}),
    ],
    ids=str,
)
def test_defaults_come_from_generation_config(tmp_path, fields, sampling, eos_ids):
    tokenizer = Letters()
    tokenizer.eos_id = 7
    if fields:
        (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    assert generation_defaults(tmp_path, tokenizer) == (sampling, eos_ids)


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"do_sample": True, "temperature": "hot"}, "temperature"),
        ({"do_sample": True, "top_k": True}, "top_k"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"do_sample": True, "top_p": -1}, "top_p"),
    ],
    ids=str,
)
def test_a_broken_generation_config_is_an_error(tmp_path, fields, name):
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=name):
        generation_defaults(tmp_path, Letters())


# Chat -------------------------------------------------------------------------------------------------------


def fresh_answer(model, tokenizer, messages, max_new_tokens):
    """What the assistant says when the whole conversation goes through the model anew."""
    prompt = tokenizer.encode_chat(messages)
    tokens = alone(model, prompt, max_new_tokens, eos_ids=chat.end_of_turn_ids(tokenizer))
    return tokenizer.decode(tokens).strip()


def test_the_turn_ends_with_the_template_s_own_token(tokenizer):
    assert [tokenizer.special_tokens["<|end|>"]] == list(chat.end_of_turn_ids(tokenizer))


def test_a_turn_ends_with_either_token(model, tokenizer):
    end = tokenizer.special_tokens["<|end|>"]
    assert Conversation(model, tokenizer, [EOS]).eos_ids == {EOS, end}


def test_the_cache_holds_what_the_conversation_takes_it_to_hold(model, tokenizer):
    conversation = Conversation(model, tokenizer)
    for question, num_pieces in (("Hi", 5), ("why?", 9), ("x", 1)):
        answer = conversation.answer(question, 8)
        for _ in range(num_pieces):
            next(answer)
        answer.close()
        size, fresh = len(conversation.cached), model.new_cache(1, MAX_SEQ_LEN)
        page.prefill(model, [conversation.cached], fresh)
        for layer, expected in zip(conversation.cache, fresh):
            torch.testing.assert_close(layer.k[:, :, :size], expected.k[:, :, :size], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer.v[:, :, :size], expected.v[:, :, :size], atol=1e-5, rtol=1e-5)


def test_the_last_token_of_a_prompt_is_fed_even_when_all_is_cached(model, tokenizer):
    conversation = Conversation(model, tokenizer)
    conversation.prepare_cache([1, 7, 8], 5)
    conversation.cached = [1, 7, 8, 9]
    assert conversation.prepare_cache([1, 7, 8], 5) == 2


def test_a_conversation_with_its_cache_equals_one_without(model, tokenizer):
    conversation = Conversation(model, tokenizer, [EOS])
    fed, known = [], 0
    handle = model.token_embed.register_forward_hook(lambda _, inputs, __: fed.append(inputs[0].shape[1]))
    for question in ("Hi", "why?", "x = 1"):
        del fed[:]
        "".join(conversation.answer(question, 8))
        prompt = tokenizer.encode_chat(conversation.messages[:-1])
        assert fed[0] <= len(prompt) - known, "the prompt of the turn before went through the model again"
        known = len(prompt)
        answer = fresh_answer(model, tokenizer, conversation.messages[:-1], 8)
        assert conversation.messages[-1]["content"] == answer
    handle.remove()
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 3


def test_leaving_off_keeps_what_was_said(model, tokenizer):
    conversation = Conversation(model, tokenizer)
    answer = conversation.answer("Hi", 20)
    said = [next(answer) for _ in range(5)]
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(said).strip()}
    "".join(conversation.answer("go on", 8))
    again = fresh_answer(model, tokenizer, conversation.messages[:-1], 8)
    assert conversation.messages[-1]["content"] == again


def test_a_conversation_that_outgrows_the_context_forgets_its_oldest_turns(model, tokenizer):
    conversation = Conversation(model, tokenizer)
    for number in range(8):
        question = "?" * number
        "".join(conversation.answer(question, 10))
        assert conversation.messages[-2]["content"] == question
        assert conversation.messages[0]["role"] == "user", "a question is forgotten with its answer"
        again = fresh_answer(model, tokenizer, conversation.messages[:-1], 10)
        assert conversation.messages[-1]["content"] == again
    assert len(conversation.messages) < 16


def test_a_question_that_does_not_fit_is_not_asked(model, tokenizer):
    conversation = Conversation(model, tokenizer)
    "".join(conversation.answer("Hi", 5))
    before = list(conversation.messages)
    with pytest.raises(UserError, match="context"):
        "".join(conversation.answer("x" * 200, 5))
    assert conversation.messages in (before, [])
