"""The page that trains encoder-decoders: dates are right, runs go on exactly, transformers agrees."""

import json
import random
import re
from datetime import date, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MarianMTModel, MarianTokenizer

from conversion.convert import convert
from models import load_model
from models.utils.errors import UserError
from models.utils.tokenizer import load_tokenizer
from runs_train import dates_data, exact_match, pair_data
from runs_train.dates_data import TEMPLATES, all_days, write_date, write_days
from runs_train.exact_match import exact_matches, share, translate
from runs_train.pair_data import Batches, Pair, split_pairs
from runs_train.seq2seq import main, parse_options
from runs_train.translation import Run, learning_rate, smoothed_loss
from tests import tiny_marian
from tests.training_runs import CONFIGS, ROWS, small_run, state_of

CONFIG, FP32 = CONFIGS["seq2seq"], ("--dtype", "float32")
DAYS = all_days()
ALL_ROWS = "".join("\t".join(row) + "\n" for row in ROWS)


@pytest.fixture
def command(tmp_path, monkeypatch):
    # A model that knows nothing seldom ends a target; a few pairs are enough to see what it would write.
    monkeypatch.setattr(pair_data, "is_held_out", lambda target: target.endswith("-12"))
    return small_run("seq2seq", tmp_path, data=ALL_ROWS)


# Dates ------------------------------------------------------------------------------------------------------

# By the standard library, for the templates and the spellings that it reads.
STRPTIME = {
    "{month} {d}, {year}": "%B %d, %Y",
    "{mon} {d}, {year}": "%b %d, %Y",
    "{mon}. {d}, {year}": "%b. %d, %Y",
    "{d} {month} {year}": "%d %B %Y",
    "{d} {month}, {year}": "%d %B, %Y",
    "{d} {month} '{yy}": "%d %B '%y",
    "{month} {d} '{yy}": "%B %d '%y",
    "{d} {mon} {year}": "%d %b %Y",
    "{dd} {mon} {yy}": "%d %b %y",
    "{d}-{mon}-{year}": "%d-%b-%Y",
    "{dd}-{mon}-{yy}": "%d-%b-%y",
    "{weekday}, {d} {month} {year}": "%A, %d %B %Y",
    "{weekday}, {month} {d}, {year}": "%A, %B %d, %Y",
    "{weekday} {d} {mon} '{yy}": "%A %d %b '%y",
    "{wkd} {d} {mon} {year}": "%a %d %b %Y",
    "{wkd}, {dd} {mon} {year}": "%a, %d %b %Y",
    "{wkd} {mon} {d} {year}": "%a %b %d %Y",
    "{wkd} {d}/{m}/{year}": "%a %d/%m/%Y",
    "{d}/{m}/{yy}": "%d/%m/%y",
    "{d}/{m}/{year}": "%d/%m/%Y",
    "{dd}/{mm}/{yy}": "%d/%m/%y",
    "{dd}/{mm}/{year}": "%d/%m/%Y",
    "{d}.{m}.{yy}": "%d.%m.%y",
    "{dd}.{mm}.{year}": "%d.%m.%Y",
    "{d}. {m}. {year}": "%d. %m. %Y",
    "{d}-{m}-{yy}": "%d-%m-%y",
    "{dd}-{mm}-{year}": "%d-%m-%Y",
    "{year}-{mm}-{dd}": "%Y-%m-%d",
    "{year}/{m}/{d}": "%Y/%m/%d",
    "{year} {month} {d}": "%Y %B %d",
}
SPELLINGS = {"Sept": "Sep", "Tues": "Tue", "Thurs": "Thu", "Thur": "Thu"}


class Plain(random.Random):
    """Draws that leave a date as the template has it."""

    def random(self):
        return 1.0

    def choice(self, options):
        return options[0]


def test_the_standard_library_reads_the_dates():
    """Two digits: %y takes 69 for 1969, which these dates have as 2069."""
    for template, form in STRPTIME.items():
        for day in DAYS[:: 977 if "{yy}" not in template else 311]:
            text = write_date(day, template, Plain())
            assert day.strftime("%a") in text or "wkd" not in template  # which strptime does not check
            read = datetime.strptime(text, form).date()
            read = read.replace(year=read.year + 100) if read.year == 1969 else read
            assert read == day, template


def test_the_other_templates_are_ordinals():
    """What the standard library cannot read: written out, so that one sees it."""
    day = date(2011, 9, 22)
    written = {template: write_date(day, template, Plain()) for template in set(TEMPLATES) - set(STRPTIME)}
    assert set(written.values()) == {
        "the 22nd of September, 2011", "the 22nd of September 2011", "22nd of September 2011",
        "22nd of Sep '11", "22nd September 2011", "22nd September 11", "22nd Sep, 2011",
        "September the 22nd, 2011", "September 22nd, 2011", "Sep 22nd 2011",
        "Thursday, September 22nd, 2011", "Thursday the 22nd of September, 2011",
        "Thursday 22nd September 2011",
    }  # fmt: skip
    assert len(set(TEMPLATES)) == len(TEMPLATES) >= 20


def test_ordinals():
    written = " ".join(dates_data.ordinal(n) for n in range(1, 32))
    assert written == (
        "1st 2nd 3rd 4th 5th 6th 7th 8th 9th 10th 11th 12th 13th 14th 15th 16th 17th 18th 19th 20th 21st "
        "22nd 23rd 24th 25th 26th 27th 28th 29th 30th 31st"
    )


def test_hands_vary_what_they_write():
    """All that is drawn comes up, and leaves the letters and digits as they are."""
    rng, plain, letters = random.Random(0), Plain(), re.compile(r"[^a-z0-9]+")
    day, template = date(2033, 9, 8), "{wkd}, {dd} {mon} {year}"
    texts = {write_date(day, template, rng) for _ in range(2000)}
    assert {"Thu, 08 Sep 2033", "Thurs, 08 Sept 2033", "thur, 08 sep 2033", "THU 08 SEPT 2033"} <= texts
    assert {"Thu ,08 Sep 2033", "Thu,08 Sep 2033", "Thu , 08 Sep 2033"} <= texts
    bare = {letters.sub("", re.sub("sept", "sep", re.sub("thurs?", "thu", text.lower()))) for text in texts}
    assert bare == {letters.sub("", write_date(day, template, plain).lower())}


def test_the_days():
    assert (DAYS[0], DAYS[-1], len(DAYS)) == (date(1970, 1, 1), date(2069, 12, 31), 100 * 365 + 25)
    rows = list(write_days(DAYS[:300], 10, seed=3))
    assert {template for *_, template in rows} == set(TEMPLATES)
    assert [target for _, target, _ in rows[::10]] == [day.isoformat() for day in DAYS[:300]]
    assert all(len({template for *_, template in rows[n : n + 10]}) == 10 for n in range(0, 3000, 10))
    assert rows == list(write_days(DAYS[:300], 10, seed=3)) != list(write_days(DAYS[:300], 10, seed=4))


def test_whole_days_are_held_out(monkeypatch):
    monkeypatch.setattr(pair_data, "all_days", lambda: DAYS[:400])
    train, held_out = split_pairs("dates")
    days = [{pair.target for pair in pairs} for pairs in (train, held_out)]
    assert not days[0] & days[1] and len(days[0] | days[1]) == 400
    assert len(days[1]) == pytest.approx(40, abs=15)
    assert {pair.kind for pair in held_out} == set(TEMPLATES)


# Runs -------------------------------------------------------------------------------------------------------


def test_it_learns(command, tmp_path):
    """To copy the second of two words, of ten that there are; a word is a few pieces."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    pairs = [f"{first} {second}\t{second}\n" for first in words for second in words]
    (tmp_path / "words.tsv").write_text("".join(pairs) + "one zwölf-12\tzwölf-12\n")
    sizes = {"dropout": 0.0, "d_model": 32, "d_ff": 64, "num_decoder_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | sizes))
    options = ["--data", tmp_path / "words.tsv", "--vocab-size", 40, *FP32, "--batch-size", 16]
    options += ["--label-smoothing", 0, "--warmup", 30, "--eval-every", 250]
    main(command("run", *options, steps=250))
    losses = state_of(tmp_path / "run")["losses"]
    assert losses[0] > 3 and sum(losses[-10:]) / 10 < 0.2
    convert(tmp_path / "run")
    model, tokenizer = load_model(tmp_path / "run", dtype=torch.float32), load_tokenizer(tmp_path / "run")
    assert translate(model, tokenizer, ["one two", "nine ten"]) == ["two", "ten"]


def test_the_loss_is_that_of_transformers(command, tmp_path, monkeypatch):
    """From the first weights; two uneven batches count as one, token for token."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"dropout": 0.0}))
    # Targets of many lengths, in batches that hold short and long ones: padding must not count.
    lines = [f"{n}\t{'7' * (n % 4 * 10)}{n}\n" for n in range(200)]
    (tmp_path / "data").write_text("".join(lines) + "1\t-12\n")
    monkeypatch.setattr(pair_data, "POOL", 1)
    options = [*FP32, "--label-smoothing", "0", "--accumulate", "2"]
    # So small a rate that the weights stay what they are.
    main(command("run", *options, "--lr", "1e-30", steps=3))
    theirs = MarianMTModel.from_pretrained(tmp_path / "run").float()
    tokenizer = MarianTokenizer.from_pretrained(tmp_path / "run")
    pad = tokenizer.pad_token_id

    corpus = pair_data.prepare(tmp_path / "data", tmp_path / "run" / "training")
    batches = Batches(corpus.train, corpus.tokenizer, longest=40, batch_size=4, seed=0)
    nats = num_tokens = 0
    for n in (0, 1):
        source, target = batches.batch(n)
        labels = target.masked_fill(target == pad, -100)
        out = theirs(input_ids=source, attention_mask=(source != pad).long(), labels=labels)
        nats += out.loss.item() * (labels >= 0).sum().item()
        num_tokens += (labels >= 0).sum().item()
    # The checkpoint's weights are rounded to bf16.
    assert state_of(tmp_path / "run")["losses"][0] == pytest.approx(nats / num_tokens, rel=2e-3)


def test_label_smoothing():
    """By definition: cross-entropy to a distribution with 1 - e on the right token and e spread evenly."""
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[4, 2, 0], [5, 6, 6]])
    expected, count = 0.0, 0
    for row, token in zip(logits.reshape(-1, 7).double(), target.flatten().tolist()):
        if token == 6:  # a pad
            continue
        goal = [0.1 / 7 + 0.9 * (token == other) for other in range(7)]
        expected -= sum(p * q for p, q in zip(goal, row.log_softmax(0).tolist()))
        count += 1
    assert smoothed_loss(logits, target, 0.1, pad_id=6).item() == pytest.approx(expected / count, rel=1e-5)


def test_the_learning_rate():
    """Eq. 3, and what section 5.3 says of it: the base model's 4,000 steps of warm-up peak at 7e-4."""
    options = parse_options(["--config", "x", "--data", "x", "--steps", "100000", "--warmup", "4000"])
    rates = [learning_rate(step, 512, options) for step in range(100_000)]
    for step in 1, 10, 3999, 4000, 4001, 77_777:
        eq_3 = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert rates[step - 1] == pytest.approx(eq_3)
    assert max(rates) == rates[3999] == pytest.approx(6.99e-4, rel=1e-3)


def test_adam_has_the_papers_constants(command, tmp_path):
    """Section 5.3."""
    main(command("run", steps=3))
    for group in state_of(tmp_path / "run")["optimizer"]["param_groups"]:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-9, 0.0)


def test_the_running_mean_of_the_weights(command, tmp_path, monkeypatch):
    """It begins with the weights after the first step, and is what the checkpoint holds."""
    weights, update = [], Run.update

    def keep(run, loss):
        update(run, loss)
        weights.append(run.model.decoder_layers[0].ffn.up_proj.weight.detach().clone())

    monkeypatch.setattr(Run, "update", keep)
    main(command("run", "--average", "0.75", steps=3))
    mean = weights[0]
    for later in weights[1:]:
        mean = 0.75 * mean + 0.25 * later
    stored = load_file(tmp_path / "run" / "model.safetensors")["model.decoder.layers.0.fc1.weight"]
    assert not torch.equal(weights[-1].bfloat16(), stored)
    torch.testing.assert_close(stored.float(), mean, rtol=2**-8, atol=0)


# What a run leaves behind -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that can be used, converted: (folder, model in fp32, tokenizer)."""
    root = tmp_path_factory.mktemp("trained")
    options = ["--batch-size", "16", "--eval-every", "60"]
    main(small_run("seq2seq", root, data=ALL_ROWS)("run", *options, steps=60))
    convert(root / "run")
    return root / "run", load_model(root / "run", dtype=torch.float32), load_tokenizer(root / "run")


def test_transformers_writes_the_same(trained):
    """Its own classes, from the published files alone: the same ids, the same texts."""
    folder, model, tokenizer = trained
    oracle = MarianMTModel.from_pretrained(folder).float().eval()
    their_tokenizer = MarianTokenizer.from_pretrained(folder)
    texts = ["the 3rd of March, 1987", " Tue  3 Mar 1987 ", "3/3/87", "3. 3. 1987!", "ＪＵＮＥ 4th, ’99 é"]
    inputs = their_tokenizer(texts, return_tensors="pt", padding=True)
    ours = [tokenizer.encode(text) for text in texts]
    assert ours == [row[: len(ids)] for row, ids in zip(inputs["input_ids"].tolist(), ours)]
    target = their_tokenizer(text_target="1987-03-03")["input_ids"]
    assert tokenizer.encode_target("1987-03-03") == target

    with torch.no_grad():
        written = oracle.generate(**inputs)
    assert translate(model, tokenizer, texts) == their_tokenizer.batch_decode(
        written, skip_special_tokens=True
    )
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    for settings in oracle.generation_config, oracle.config:
        assert settings.decoder_start_token_id == settings.pad_token_id == their_tokenizer.pad_token_id
        assert settings.eos_token_id == their_tokenizer.eos_token_id
    assert oracle.generation_config.forced_eos_token_id == their_tokenizer.eos_token_id


@pytest.mark.parametrize("seed, eos_bias", [(0, 3.0), (2, 1.0), (5, 3.0)])
def test_greedy_is_that_of_transformers(tmp_path, seed, eos_bias):
    """Random weights, whose targets end early, late, or not by themselves."""
    oracle = tiny_marian.save_checkpoint(tmp_path / "marian", seed, tokenizer="opus", eos_bias=eos_bias)
    oracle.final_logits_bias[:, -1] = 9.0  # of the pad, which must not be written all the same
    oracle.save_pretrained(tmp_path / "marian")
    model, tokenizer = tiny_marian.load(tmp_path / "marian"), load_tokenizer(tmp_path / "marian")
    texts = [line[:30] for line in tiny_marian.SOURCE_TEXT.splitlines()] + ["fox", "the garden"]
    inputs = MarianTokenizer.from_pretrained(tmp_path / "marian")(texts, return_tensors="pt", padding=True)
    settings = {"num_beams": 1, "max_length": model.config.max_seq_len, "bad_words_ids": [[tokenizer.pad_id]]}
    with torch.no_grad():
        written = oracle.generate(**inputs, **settings)
    ours = translate(model, tokenizer, texts)
    assert ours == [tokenizer.decode(row) for row in written.tolist()]
    assert len(set(ours)) > 1


def test_the_tokenizer_is_made_of_characters(trained):
    _, _, tokenizer = trained
    ids = tokenizer.encode("the  3rd  of March , 1987 ")
    assert [tokenizer.pieces[id] for id in ids] == [*"▁the▁3rd▁of▁March▁,▁1987", "</s>"]
    assert tokenizer.decode(tokenizer.encode_target("1987-03-03")) == "1987-03-03"


def test_exact_matches_are_counted_by_kind(trained, monkeypatch):
    """A translation is taken as it is; here one that is right where the source says so."""
    _, model, tokenizer = trained
    monkeypatch.setattr(exact_match, "translate", lambda model, tokenizer, texts: [t.lower() for t in texts])
    pairs = [Pair("A", "a", "x"), Pair("B", "b", "x"), Pair("C", "d", "x"), Pair("LONG", "long", "y")]
    pairs += [Pair("two words", "two  words"), Pair("", "")]
    measured = exact_matches(model, tokenizer, pairs, batch_size=2)
    assert measured == {"": (2, 2), "x": (2, 3), "y": (1, 1)}
    assert share(measured) == 5 / 6


def test_translations_do_not_depend_on_the_batch(trained):
    _, model, tokenizer = trained
    texts = [row[0] for row in ROWS[:9]]
    assert translate(model, tokenizer, texts) == [translate(model, tokenizer, [text])[0] for text in texts]


def test_the_readme_says_what_is_stored(trained):
    folder, model, tokenizer = trained
    readme = (folder / "README.md").read_text()
    _, held_out = split_pairs(folder.parent / "data")
    matches = exact_matches(model, tokenizer, held_out)
    assert f"| exact match, all held-out pairs | {share(matches):.2%} |" in readme
    for kind, (right, total) in matches.items():
        assert f"| `{kind}` | {right} of {total} |" in readme
    lines = "".join("\t".join(pair) + "\n" for pair in [*split_pairs(folder.parent / "data")[0], *held_out])
    assert pair_data.hashlib.sha256(lines.encode()).hexdigest() in readme
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


# Data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [7, 400])
def test_every_pair_is_read_once_in_a_pass(trained, batch_size):
    _, _, tokenizer = trained
    pairs = [Pair(*row) for row in ROWS]
    batches = Batches(pairs, tokenizer, 40, batch_size, seed=5)
    orders = []
    for first in range(0, 3 * batches.per_pass, batches.per_pass):
        rows = []
        for n in range(first, first + batches.per_pass):
            source, target = batches.batch(n)
            assert (source[:, -1] != tokenizer.pad_id).any() and (target[:, -1] != tokenizer.pad_id).any()
            rows += [
                tuple(row[row != tokenizer.pad_id].tolist() for row in pair) for pair in zip(source, target)
            ]
        expected = [(tokenizer.encode(pair.source), tokenizer.encode_target(pair.target)) for pair in pairs]
        assert sorted(rows) == sorted(expected)
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2]

    # A batch is a function of its number: asked for out of turn it is the same.
    last = Batches(pairs, tokenizer, 40, batch_size, seed=5).batch(3 * batches.per_pass - 1)
    assert all(map(torch.equal, last, (source, target)))


def test_pairs_of_a_length_go_together(trained):
    _, _, tokenizer = trained
    batches = Batches([Pair(*row) for row in ROWS], tokenizer, 40, batch_size=16, seed=0)
    places = tokens = 0
    for n in range(batches.per_pass):
        source, _ = batches.batch(n)
        places, tokens = places + source.numel(), tokens + (source != tokenizer.pad_id).sum().item()
    assert tokens / places > 0.8


def test_long_pairs_are_left_out(command, tmp_path, capsys):
    with open(tmp_path / "data", "a") as file:
        file.write(f"{'7' * 50}\t1999-09-09\n")
    main(command("run", steps=3))
    assert "1 pairs longer than max_seq_len, 40, are left out" in capsys.readouterr().out


def test_a_vocabulary_of_pieces(command, tmp_path):
    main(command("run", "--vocab-size", "80", steps=3))
    vocabulary = json.loads((tmp_path / "run" / "vocab.json").read_text())
    assert any(len(piece) > 2 for piece in set(vocabulary) - {"</s>", "<unk>", "<pad>"})
    assert list(vocabulary)[:2] == ["</s>", "<unk>"] and list(vocabulary)[-1] == "<pad>"
    assert f"| vocabulary | {len(vocabulary)} pieces |" in (tmp_path / "run" / "README.md").read_text()


# Mistakes ---------------------------------------------------------------------------------------------------

MISTAKES = {
    "no such data": (["--data", "nowhere"], "--data nowhere: no such file (the word dates"),
    "no text": (["--data", "binary"], "--data binary: cannot be read as UTF-8"),
    "one column": (["--data", "columns"], "--data columns, line 2: not source TAB target"),
    "an empty target": (["--data", "empty"], "--data empty, line 1: not source TAB target"),
    "too few": (["--data", "few"], "--data few: 1 pairs, too few"),
    "too large a vocabulary": (["--vocab-size", "9999"], "--vocab-size 9999 does not suit"),
    "no warm-up": (["--warmup", "0"], "--warmup: '0' is not a whole number from 1 up"),
    "more than all": (["--label-smoothing", "1.5"], "--label-smoothing: '1.5' is not a number from 0 to 1"),
    "all too long": (["--config", "short.json"], "every pair is longer than the model's max_seq_len, 3"),
    "it explodes": (["--lr", "1e30"], "the loss is"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(command, tmp_path, mistake, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"\xff\xfe\0")
    Path("columns").write_text("a\tb\nonly one\n")
    Path("empty").write_text("a\t\n")
    Path("few").write_text("a\tb\n")
    Path("short.json").write_text(json.dumps(CONFIG | {"max_seq_len": 3}))
    options, message = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        main(command("run", *options))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_goes_on_only_as_it_began(command, tmp_path):
    main(command("run", steps=3))
    with pytest.raises(UserError, match=r"was started with label_smoothing 0.1, not 0.2; .*--restart"):
        main(command("run", "--label-smoothing", "0.2", steps=3))
    with open(tmp_path / "data", "a") as file:
        file.write("a\tb\n")
    with pytest.raises(UserError, match="was started with pairs_sha256"):
        main(command("run", steps=3))
