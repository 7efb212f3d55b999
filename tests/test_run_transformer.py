"""The proof of runs_ar/transformer.py, beam_search.py, translator.py and attention_picture.py.

Tiny random Marians; every target that `transformers` writes must come out here token for token.
"""

import itertools
import json
import math
import shutil

import pytest
import torch

import run
from models.utils.errors import UserError
from models.utils.sampling import Sampling, seeded_generators
from models.utils.tokenizer import load_tokenizer
from runs_ar import terminal, translator
from runs_ar import transformer as page
from runs_ar.attention_picture import cross_attention, draw, shortened, spoken
from runs_ar.beam_search import Beams, beam_search
from runs_ar.transformer import Decoder, Rules, check_source, generate, generation_rules
from tests import tiny_marian

VOCAB_SIZE, PAD, EOS, LONGEST = 60, 59, 0, 24
RULES = Rules(PAD, frozenset([EOS]), LONGEST - 1, banned_ids=(PAD,), forced_eos_id=EOS)
# Random models: the seed, and how much the end token is favoured. Some targets end early, some never.
RANDOM_MODELS = [(1, 1.5), (2, 0.0), (5, -1.0), (2, 1.0), (5, 0.5), (4, 0.0)]
BEAM_OPTIONS = list(itertools.product([2, 3, 4, 5], [0.0, 0.6, 1.0, 2.0, -1.0], [True, False, "never"]))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Of each random model (the oracle, ours) with the same weights."""
    pairs = []
    for seed, eos_bias in RANDOM_MODELS:
        folder = tmp_path_factory.mktemp("transformer") / "marian"
        oracle = tiny_marian.save_checkpoint(folder, seed, eos_bias=eos_bias)
        pairs.append((oracle, tiny_marian.load(folder)))
    return pairs


@pytest.fixture(scope="module")
def model(pairs):
    return pairs[1][1]


def sources_of(seed, lengths=(9, 3, 14, 1)):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, PAD, (length,), generator=generator).tolist() for length in lengths]
    return [[*row, EOS] for row in rows]


def rows_of(steps):
    return [[token for token in row if token is not None] for row in zip(*steps)]


def written(model, sources, rules=RULES, *options):
    return rows_of(generate(model, sources, rules, *options))


def searched(model, sources, rules=RULES, num_beams=4, **options):
    beams = Beams(num_beams, **options)
    return [tokens for tokens, _ in beam_search(Decoder(model, sources, num_beams), rules, beams)]


def oracle_targets(oracle, sources, **options):
    """What `transformers` makes of the sources, without the start token and padding."""
    longest = max(map(len, sources))
    tokens = torch.tensor([source + [PAD] * (longest - len(source)) for source in sources])
    options = {"bad_words_ids": [[PAD]], "max_length": LONGEST, "forced_eos_token_id": EOS, **options}
    made = oracle.generate(tokens, attention_mask=(tokens != PAD).long(), do_sample=False, **options)
    return [[token for token in row if token != PAD] for row in made[:, 1:].tolist()]


# Against the oracle -----------------------------------------------------------------------------------------


def test_greedy_equals_the_oracle(pairs):
    lengths = set()
    for number, (oracle, model) in enumerate(pairs):
        made = written(model, sources_of(number))
        assert made == oracle_targets(oracle, sources_of(number), num_beams=1)
        lengths |= set(map(len, made))
    assert len(lengths) > 5 and max(lengths) == LONGEST - 1  # targets of many lengths, some of them forced


@pytest.mark.parametrize("number", range(len(RANDOM_MODELS)))
def test_beam_search_equals_the_oracle(pairs, number):
    oracle, model = pairs[number]
    seen = set()
    for num_beams, length_penalty, early_stopping in BEAM_OPTIONS[number :: len(RANDOM_MODELS)]:
        options = {"length_penalty": length_penalty, "early_stopping": early_stopping, "num_beams": num_beams}
        made = searched(model, sources_of(number), **options)
        assert made == oracle_targets(oracle, sources_of(number), **options), options
        seen.add(str(made))
    assert len(seen) > 1, "the options change nothing"


RULES_AND_OPTIONS = {
    "nothing forced": ({"forced_eos_id": None}, {"forced_eos_token_id": None}, {}),
    "nothing banned": ({"banned_ids": ()}, {"bad_words_ids": None}, {}),
    "more banned": ({"banned_ids": (PAD, 7, 11)}, {"bad_words_ids": [[PAD], [7], [11]]}, {}),
    "several ends": ({"eos_ids": frozenset([EOS, 5, 17])}, {"eos_token_id": [EOS, 5, 17]}, {}),
    "renormalized": ({"banned_ids": range(20, PAD + 1)}, {"bad_words_ids": [[n] for n in range(20, PAD + 1)]},
                     {"renormalize": True}),
    "one token": ({"max_new_tokens": 1}, {"max_length": 2}, {}),
    "longer than the first cache": ({"max_new_tokens": 50}, {"max_length": 51}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES_AND_OPTIONS)
def test_rules_are_those_of_the_oracle(pairs, name):
    ours, theirs, beams = RULES_AND_OPTIONS[name]
    rules = Rules(**{**RULES.__dict__, **ours})
    for number in (1, 2):
        oracle, model = pairs[number]
        sources = sources_of(10 + number)
        if beams:
            theirs = {**theirs, "renormalize_logits": True}
        assert written(model, sources, rules) == oracle_targets(oracle, sources, num_beams=1, **theirs)
        assert searched(model, sources, rules, 3, **beams) == oracle_targets(
            oracle, sources, num_beams=3, **theirs
        )


def test_the_score_is_the_oracle_s(pairs):
    oracle, model = pairs[3]
    options = {"num_beams": 4, "length_penalty": 0.7}
    results = beam_search(Decoder(model, sources_of(2), 4), RULES, Beams(**options))
    lengths = [len(tokens) for tokens, _ in results]
    assert len(set(lengths)) > 2
    for source, (tokens, score) in zip(sources_of(2), results):
        made = oracle.generate(
            torch.tensor([source]), max_length=LONGEST, bad_words_ids=[[PAD]], forced_eos_token_id=EOS,
            output_scores=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        assert score == pytest.approx(made.sequences_scores.item(), abs=1e-5)
        # And what the docstring says it is; a forced end costs nothing.
        log_probs = model(torch.tensor([source]), torch.tensor([[PAD, *tokens[:-1]]])).log_softmax(-1)[0]
        sums = log_probs.gather(1, torch.tensor(tokens)[:, None])[
            : len(tokens) - (len(tokens) == LONGEST - 1)
        ]
        assert score == pytest.approx(sums.sum().item() / len(tokens) ** 0.7, abs=1e-4)


# Batches ----------------------------------------------------------------------------------------------------


def test_a_row_of_a_batch_is_what_it_is_alone(pairs):
    sampling = Sampling(temperature=1.3, top_k=30)
    for number, (_, model) in enumerate(pairs[:3]):
        sources = sources_of(20 + number, (2, 11, 5, 30))
        assert written(model, sources) == [written(model, [source])[0] for source in sources]
        assert searched(model, sources) == [searched(model, [source])[0] for source in sources]
        together = written(model, sources, RULES, sampling, seeded_generators(7, 4))
        for row, source in enumerate(sources):
            (alone,) = written(model, [source], RULES, sampling, seeded_generators(7 + row, 1))
            assert together[row] == alone and PAD not in alone
        assert together != written(model, sources, RULES, sampling, seeded_generators(8, 4))


def test_rows_end_one_by_one(model):
    steps = list(generate(model, sources_of(2), RULES))
    lengths = [len(row) for row in rows_of(steps)]
    assert min(lengths) < max(lengths) == len(steps)
    for row, length in enumerate(lengths):
        assert all(step[row] is None for step in steps[length:])


def test_tokens_come_as_they_are_made(model):
    calls = []
    handle = model.decoder_layers[0].register_forward_hook(lambda *_: calls.append(1))
    steps = generate(model, sources_of(2), RULES)
    next(steps)
    next(steps)
    steps.close()
    handle.remove()
    assert len(calls) == 2


def test_the_source_is_read_once_and_each_step_feeds_one_token(model):
    encoded, fed = [], []
    handles = [
        model.encoder_layers[0].register_forward_hook(lambda _, inputs, __: encoded.append(1)),
        model.decoder_layers[0].register_forward_hook(lambda _, inputs, __: fed.append(inputs[0].shape[:2])),
    ]
    searched(model, sources_of(2), num_beams=3)
    for handle in handles:
        handle.remove()
    assert encoded == [1] and set(fed) == {(12, 1)}


def test_the_cache_starts_small_and_grows(model, monkeypatch):
    expected = written(model, sources_of(1)), searched(model, sources_of(1))
    monkeypatch.setattr(page, "FIRST_SLOTS", 1)
    assert (written(model, sources_of(1)), searched(model, sources_of(1))) == expected
    decoder = Decoder(model, sources_of(1))
    sizes = []
    for _ in range(9):
        decoder.step(torch.full((4,), 3))
        sizes.append(decoder.cache.past[0].k.shape[2])
    assert not decoder.cache.memory[0].k.requires_grad
    assert sizes == [1, 2, 4, 4, 8, 8, 8, 8, 16]


# Beam search by itself --------------------------------------------------------------------------------------


class Table:
    """A decoder whose next token depends on the last one alone: a table of probabilities."""

    device = torch.device("cpu")

    def __init__(self, probs, num_beams):
        self.log_probs, self.num_rows = torch.tensor(probs).log(), num_beams

    def step(self, tokens):
        return self.log_probs[tokens]

    def reorder(self, rows):
        pass


# From 3 one goes to 1 (0.6) or 2 (0.4); from 1 every end is improbable, from 2 it is almost certain.
GARDEN = [[1.0, 0, 0, 0], [0.3, 0.25, 0.25, 0.2], [0.98, 0.01, 0.01, 0], [0, 0.6, 0.4, 0]]


def test_beam_search_finds_what_greedy_misses():
    rules = Rules(start_id=3, eos_ids=frozenset([0]), max_new_tokens=4)
    for num_beams, expected in [(1, [1, 0]), (2, [2, 0])]:
        ((tokens, score),) = beam_search(
            Table(GARDEN, num_beams), rules, Beams(num_beams, length_penalty=0.0)
        )
        assert tokens == expected
    assert math.exp(score) == pytest.approx(0.4 * 0.98)


# [0] ends with 0.2 and [1, 0] with 0.08, while the best is under way: [1, 2, 0] with 0.72.
PATIENCE = [[1.0, 0, 0, 0], [0.1, 0, 0.9, 0], [1.0, 0, 0, 0], [0.2, 0.8, 0, 0]]


@pytest.mark.parametrize("length_penalty", [0.0, -1.0])
@pytest.mark.parametrize("early_stopping, best", [(True, [0]), (False, [1, 2, 0]), ("never", [1, 2, 0])])
def test_early_stopping_takes_what_is_finished(length_penalty, early_stopping, best):
    rules = Rules(start_id=3, eos_ids=frozenset([0]), max_new_tokens=20)
    beams = Beams(2, length_penalty, early_stopping)
    ((tokens, _),) = beam_search(Table(PATIENCE, 2), rules, beams)
    assert tokens == best


def test_enough_candidates_are_kept_when_there_are_several_ends():
    """The three best tokens all end; the fourth runs on, and a length penalty makes it win."""
    probs = [[1.0, 0, 0, 0, 0]] * 4 + [[0.3, 0.28, 0.22, 0.2, 0]]
    rules = Rules(start_id=4, eos_ids=frozenset([0, 1, 2]), max_new_tokens=4)
    ((tokens, score),) = beam_search(
        Table(probs, 1), rules, Beams(1, length_penalty=2.0, early_stopping="never")
    )
    assert tokens == [3, 0] and score == pytest.approx(math.log(0.2) / 4)


def test_probabilities_are_fp32_whatever_the_logits_are():
    rules = Rules(start_id=3, eos_ids=frozenset([0]), max_new_tokens=20)
    decoder = Table(torch.rand(4, 4, generator=torch.Generator().manual_seed(3)).tolist(), 2)
    decoder.log_probs = decoder.log_probs.bfloat16()
    ((tokens, score),) = beam_search(decoder, rules, Beams(2, length_penalty=0.0))
    log_probs = decoder.log_probs.double().log_softmax(dim=-1)
    assert score == pytest.approx(log_probs[[3, *tokens[:-1]], tokens].sum().item(), abs=1e-5)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.5])
def test_wide_enough_it_finds_the_best_of_all(length_penalty):
    probs = torch.rand(4, 4, generator=torch.Generator().manual_seed(3)).softmax(-1).tolist()
    rules = Rules(start_id=3, eos_ids=frozenset([0]), max_new_tokens=4)
    scores = {}
    for length in range(1, 5):
        for tokens in itertools.product(range(4), repeat=length):
            if 0 not in tokens[:-1] and (tokens[-1] == 0 or length == 4):
                steps = zip((3, *tokens), tokens)
                scores[tokens] = sum(math.log(probs[a][b]) for a, b in steps) / length**length_penalty
    beams = Beams(200, length_penalty, early_stopping="never")
    ((tokens, score),) = beam_search(Table(probs, 200), rules, beams)
    assert tuple(tokens) == max(scores, key=scores.get) and score == pytest.approx(max(scores.values()))


@pytest.mark.parametrize(
    "fields", [{"num_beams": 0}, {"num_beams": 2.5}, {"num_beams": 2, "early_stopping": 1.5}]
)
def test_beams_that_make_no_sense(fields):
    with pytest.raises(UserError, match=list(fields)[-1]):
        Beams(**fields)


# What the checkpoint says -----------------------------------------------------------------------------------


def rules_of(tmp_path, model, fields, *options):
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    return generation_rules(tmp_path, model.config, frozenset([EOS]), *options)


def test_generation_config_is_read(tmp_path, model):
    published = {"bad_words_ids": [[PAD], [EOS]], "max_length": 40, "num_beams": 6, "forced_eos_token_id": 0}
    published |= {"decoder_start_token_id": 58, "length_penalty": 0.8, "early_stopping": True}
    rules, beams = rules_of(tmp_path, model, published | {"renormalize_logits": True})
    assert rules == Rules(58, frozenset([EOS]), 39, [PAD], 0) and beams == Beams(6, 0.8, True, True)
    assert rules_of(tmp_path, model, published, 7)[0].max_new_tokens == 7
    assert rules_of(tmp_path, model, published | {"max_new_tokens": 9})[0].max_new_tokens == 9
    assert rules_of(tmp_path, model, {}) == (Rules(PAD, frozenset([EOS]), 64, [], None), Beams(1))
    assert rules_of(tmp_path, model, {}, 1000)[0].max_new_tokens == 64  # the context
    (tmp_path / "generation_config.json").unlink()
    assert generation_rules(tmp_path, model.config, frozenset([EOS]))[0].max_new_tokens == 64


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bad_words_ids": [[1, 2]]}, "words of one token"),
        ({"max_length": "x"}, "max_length"),
        ({"forced_eos_token_id": [0, 1]}, "forced_eos_token_id"),
        ({"num_beams": "4"}, "num_beams"),
        ({"length_penalty": "1"}, "length_penalty"),
        ({"decoder_start_token_id": 60}, "beyond the 60"),
        ({"bad_words_ids": [[60]]}, "beyond the 60"),
    ],
)
def test_a_generation_config_that_makes_no_sense(tmp_path, model, fields, message):
    with pytest.raises(UserError, match=message):
        rules_of(tmp_path, model, fields)


def test_what_is_not_implemented_is_said(tmp_path, model, capsys):
    rules_of(tmp_path, model, {"no_repeat_ngram_size": 3, "repetition_penalty": 1.0, "min_length": None})
    (line,) = capsys.readouterr().err.splitlines()
    assert "no_repeat_ngram_size" in line and "generation_config.json" in line


def test_sources_that_cannot_be_read(model):
    with pytest.raises(UserError, match="65 tokens.*only 64"):
        check_source(model.config, [3] * 65)
    with pytest.raises(UserError, match="token 60"):
        check_source(model.config, [3, 60])
    check_source(model.config, [3] * 64)


# Cross-attention --------------------------------------------------------------------------------------------


def test_cross_attention_equals_the_oracle(pairs):
    oracle, model = pairs[1]
    source, target = sources_of(5, (8,))[0], [PAD, 4, 9, 12, 33]
    out = oracle(torch.tensor([source]), decoder_input_ids=torch.tensor([target]), output_attentions=True)
    probs = cross_attention(model, source, target)
    assert probs.shape == (3, 4, 5, 9)
    torch.testing.assert_close(probs, torch.cat(out.cross_attentions), atol=1e-5, rtol=0)
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(3, 4, 5))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_picture_is_a_png_and_whole_or_not_there(tmp_path):
    probs = torch.rand(2, 4, 5, 3).softmax(-1)
    draw(tmp_path / "a.png", probs, ["▁the", "▁", "3", "r", "d"], ["▁" + letter for letter in "abcde"])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    # The model attends to means of two tokens each.
    assert shortened(["▁the", "▁", "3", "r", "d"], 3) == ["▁the▁", "3r", "d"]
    assert [spoken(name) for name in ("▁the▁", "▁", "</s>")] == ["the", "␣", "</s>"]


# run.py -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(the oracle, the folder), not converted, with a tokenizer and languages."""
    folder = tmp_path_factory.mktemp("run") / "opus-mt-tiny"
    return tiny_marian.save_checkpoint(folder, 2, tokenizer="opus", eos_bias=0.5), folder


@pytest.fixture
def start(checkpoint, capsys, monkeypatch):
    """start(*options, lines=None) -> what a run printed."""

    def start(*options, lines=None):
        capsys.readouterr()
        if lines is not None:
            content = type("Buffer", (), {"read": lambda self: lines.encode()})()
            monkeypatch.setattr(terminal.sys, "stdin", type("Stdin", (), {"buffer": content})())
            monkeypatch.setattr(terminal, "is_piped", lambda stream: True)
        run.main(["--checkpoint", str(checkpoint[1]), "--device", "cpu", *map(str, options)])
        return capsys.readouterr()

    return start


def expected_text(checkpoint, text, **options):
    """The whole way in `transformers`, with the checkpoint's own generation_config.json."""
    from transformers import MarianMTModel, MarianTokenizer

    oracle = MarianMTModel.from_pretrained(checkpoint[1])
    tokenizer = MarianTokenizer.from_pretrained(checkpoint[1])
    made = oracle.generate(**tokenizer(text, return_tensors="pt"), **options)
    return tokenizer.decode(made[0], skip_special_tokens=True)


TEXT = ">>fra<< Where is the next station?"


def test_it_translates_as_the_oracle_does(checkpoint, start):
    output = start("--prompt", TEXT)
    assert output.out == expected_text(checkpoint, TEXT) + "\n" != "\n"
    assert "4 beams" in output.err and "tokens/s" in output.err and "peak memory" in output.err
    assert "of weights (float32)" in output.err
    greedy = start("--prompt", TEXT, "--beams", 1)
    assert greedy.out == expected_text(checkpoint, TEXT, num_beams=1) + "\n"
    assert "seed" in greedy.err and "first token after" in greedy.err
    short = start("--prompt", TEXT, "--beams", 2, "--max-new-tokens", 5)
    assert short.out == expected_text(checkpoint, TEXT, num_beams=2, max_new_tokens=5) + "\n"


def test_each_line_of_a_pipe_is_a_text(checkpoint, start):
    lines = ["We do not know.", "", ">>rus<< Please close the window!"]
    output = start(lines="\n".join(lines) + "\n")
    assert output.out == "".join((expected_text(checkpoint, line) if line else "") + "\n" for line in lines)
    objects = [json.loads(line) for line in start("--json", lines="\n".join(lines)).out.splitlines()]
    assert [result["prompt"] for result in objects] == lines
    assert "".join(result["text"] + "\n" for result in objects) == output.out
    assert objects[1]["tokens"] == [] and objects[1]["finish_reason"] == "empty text"


def test_sampling_follows_the_seed(start):
    options = ("--prompt", TEXT, "--json", "--temperature", 2.0, "--top-k", 50)
    first = json.loads(start(*options).out)
    again = json.loads(start(*options, "--seed", first["seed"]).out)
    assert (first["tokens"], first["text"]) == (again["tokens"], again["text"])
    assert first["num_beams"] == 1 and first["temperature"] == 2.0 and first["top_k"] == 50
    assert first["timings"]["num_tokens"] == len(first["tokens"])
    others = [json.loads(start(*options, "--seed", seed).out)["tokens"] for seed in range(3)]
    assert any(tokens != first["tokens"] for tokens in others)


def test_json_says_how_it_was_made(checkpoint, start):
    result = json.loads(start("--prompt", TEXT, "--json", "--beams", 3).out)
    tokenizer = load_tokenizer(checkpoint[1])
    assert (
        result["text"] == tokenizer.decode(result["tokens"]) == expected_text(checkpoint, TEXT, num_beams=3)
    )
    assert (result["num_beams"], result["length_penalty"], result["early_stopping"]) == (3, 1.0, False)
    assert result["finish_reason"] == "end of text" and result["tokens"][-1] == EOS


def test_a_stop_string_ends_the_text(start):
    whole = start("--prompt", TEXT, "--beams", 1).out.strip()
    middle = whole[len(whole) // 2 :][:2]
    output = start("--prompt", TEXT, "--beams", 1, "--stop", middle)
    assert output.out == whole[: whole.index(middle)] + "\n"
    result = json.loads(start("--prompt", TEXT, "--beams", 1, "--stop", middle, "--json").out)
    assert result["finish_reason"] == "stop string" and result["tokens"][-1] != EOS


def test_the_picture_shows_the_translation(checkpoint, start, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(translator, "save", lambda path, *about: (drawn.append(about), draw(path, *about)))
    output = start("--prompt", TEXT, "--beams", 2, "--json", "--attention", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    ((probs, source, target),) = drawn
    tokenizer = load_tokenizer(checkpoint[1])
    assert [tokenizer.id_of(name) for name in source] == tokenizer.encode(TEXT)
    assert [tokenizer.id_of(name) for name in target] == json.loads(output.out)["tokens"]
    assert probs.shape == (3, 4, len(target), len(source))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--chat"], "--chat: .*translates"),
        (["--score", __file__], "--score: .*translates"),
        (["--prompt", TEXT, "--window", 4], "--window: .*translates"),
        (["--prompt", ""], "empty"),
        (["--prompt", TEXT, "--beams", 0], "num_beams is 0"),
        (["--prompt", TEXT, "--beams", 2, "--top-p", 0.5], "--top-p samples, --beams 2 searches"),
        (["--prompt", "the house " * 40], "only 64"),
        (["--prompt", ">>xyz<< the house"], ">>xyz<<: .*>>fra<< >>rus<<"),
        (["--prompt", TEXT, "--stop", ""], "--stop is empty"),
        (["--prompt", TEXT, "--attention", f"{__file__}/x.png"], "--attention .*cannot be written"),
        (["--prompt", "  ", "--attention", "x.png"], "one text"),
    ],
)
def test_bad_options(start, options, message):
    with pytest.raises(UserError, match=message) as error:
        start(*options)
    assert "\n" not in str(error.value)


def test_bad_pipes(start):
    with pytest.raises(UserError, match="nothing to translate"):
        start(lines="")
    with pytest.raises(UserError, match="one text; 2 lines"):
        start("--attention", "x.png", lines="a\nb\n")


def test_other_models_take_no_beams():
    with pytest.raises(UserError, match="for a model that translates"):
        run.main(["--beams=2"])


def test_a_model_that_computes_nan_is_an_error(model, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint[1], tmp_path / "copy")
    broken = tiny_marian.load(folder)
    broken.encoder_layers[0].attn.q_proj.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="NaN"):
        Decoder(broken, sources_of(1))
