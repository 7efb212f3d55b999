"""BERT's training page: runs go on exactly, transformers reads the result, gaps are what they say."""

import email.message
import inspect
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from conversion.convert import convert
from conversion.tables import to_hf_state
from models import create_model, load_model
from models.utils.errors import UserError
from models.utils.tokenizer import load_tokenizer
from runs_train import passage_data, text_data
from runs_train.masked_language_model import main
from runs_train.masked_tokens import EVALUATION_TOKENS, Run, masked_accuracy, start_near
from runs_train.passage_data import CLS, MASK, PAD, SEP, SPECIAL_TOKENS, Passages
from runs_train.text_data import Document
from tests.training_runs import CONFIGS, TEXT, small_run, state_of, tokens_of

CONFIG, FP32 = CONFIGS["masked_language_model"], ("--dtype", "float32")
# Verses of several lengths, so that batches need padding.
SONG = (
    "ten green bottles\nhanging on the wall\n\nif one green bottle should fall\n\nthere will be nine\n\n" * 30
)


@pytest.fixture
def command(tmp_path):
    return small_run("masked_language_model", tmp_path)


# Runs -------------------------------------------------------------------------------------------------------


def test_it_learns(command, tmp_path, capsys):
    """A song that repeats itself is soon known by heart, and half of a line is enough to know the rest."""
    (tmp_path / "data").write_text(SONG)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"dropout": 0.0}))
    main(command("run", "--vocab-size", "50", *FP32, "--masked", "0.3", steps=150))
    state = state_of(tmp_path / "run")
    assert state["losses"][0] == pytest.approx(np.log(50), rel=0.1)
    share = float(re.search(r"([\d.]+)% of the hidden tokens guessed", capsys.readouterr().out).group(1))
    assert share > 80


def test_the_loss_is_the_mean_over_the_hidden_tokens_of_all_batches(command, tmp_path, monkeypatch):
    """By transformers, from the first weights; a token that is not hidden does not count."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"dropout": 0.0}))
    (tmp_path / "data").write_text(SONG)
    made, initialise = {}, Run.__init__

    def keep(run, *arguments):
        initialise(run, *arguments)
        with torch.no_grad():  # fresh weights lose the same everywhere; these do not
            for parameter in run.model.parameters():
                parameter *= 3
        made["run"], made["state"] = run, {k: v.clone() for k, v in run.model.state_dict().items()}

    monkeypatch.setattr(Run, "__init__", keep)
    options = ["--accumulate", "3", "--warmup", "0", "--masked", "0.35", "--vocab-size", "50"]
    main(command("run", *options, "--batch-tokens", "300", *FP32, steps=1))
    batches = [made["run"].batch(n) for n in range(3)]
    oracle = transformers.BertForMaskedLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    first = with_weights(oracle, made["state"])
    assert sum(chosen.sum() for _, _, chosen in batches) / sum(b.gt(4).sum() for b, _, _ in batches) > 0.3
    losses = [
        F.cross_entropy(
            first(inputs, attention_mask=tokens != PAD).logits[chosen], tokens[chosen], reduction="none"
        )
        for tokens, inputs, chosen in batches
    ]
    assert torch.equal(*(made["state"][f"layers.0.attn.{name}_proj.weight"] for name in "qk"))
    assert any((tokens == PAD).any() for tokens, _, _ in batches)
    counts = {len(loss) for loss in losses}
    assert len(counts) > 1, "batches of as many hidden tokens do not show how they are weighted"
    assert state_of(tmp_path / "run")["losses"] == [pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)]


def with_weights(oracle, state):
    """The oracle with our weights."""
    missing, unexpected = oracle.load_state_dict(to_hf_state("bert", CONFIG, state), strict=False)
    assert not unexpected and all("decoder" in name for name in missing)
    return oracle.eval()


def test_the_first_weights_look_at_neighbours():
    model = create_model("tiny-bert-python", num_layers=1)
    start_near(model)
    table = model.pos_embed.weight
    products = table @ table.T / table.square().sum(dim=1)
    by_distance = torch.stack([products.diagonal(n).mean() for n in range(20)])
    assert by_distance[0].item() == pytest.approx(1) and by_distance.argmax() == 0
    assert (by_distance[:6].diff() < 0).all()
    # Position 1 has every frequency once: sin and cos of 1000^(-2i/D), as in the paper but for its 10000.
    scale = table.square().sum(dim=1).mean().sqrt() / math.sqrt(model.config.d_model / 2)
    assert (table[1] / scale)[:3].tolist() == pytest.approx(
        [math.sin(1000 ** (-2 * i / model.config.d_model)) for i in range(3)], rel=1e-3
    )
    assert table.std().item() == pytest.approx(model.token_embed.weight.std().item(), rel=0.3)

    tokens = torch.randint(5, 4096, (20, 60), generator=torch.Generator().manual_seed(0))
    found = {}
    attention = model.layers[0].attn
    attention.dropout.register_forward_pre_hook(lambda module, inputs: found.update(probs=inputs[0]))
    model(tokens)
    near = (torch.arange(60)[:, None] - torch.arange(60)).abs() <= 2
    share = found["probs"].masked_fill(~near, 0).sum(dim=-1).mean().item()
    assert share > 3 * near.float().mean().item()


# What a run leaves behind -----------------------------------------------------------------------------------


@pytest.fixture
def trained(command, tmp_path):
    """(folder, its README) of a run that learned something."""
    (tmp_path / "data").write_text(SONG)
    main(command("run", "--vocab-size", "50", steps=40))
    return tmp_path / "run", (tmp_path / "run" / "README.md").read_text()


def test_transformers_loads_the_result(trained):
    folder, _ = trained
    state = state_of(folder)["model"]
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    theirs = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    assert theirs.dtype == torch.bfloat16
    convert(folder)
    ours = load_model(folder)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, state[name].bfloat16())
    tokens = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.float()(tokens), theirs.float()(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_transformers_reads_the_tokenizer(trained, tmp_path, file):
    (tmp_path / "tokenizer").mkdir()
    for name in (file, "tokenizer_config.json"):
        shutil.copy(trained[0] / name, tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    ours = load_tokenizer(tmp_path / "tokenizer")
    # What looks like a special token is one to transformers; the pages here take it for text.
    for text in [
        "Every one is read once; isn't it?",
        "Größe 大小 (x == 3)\u00a0\u200b",
        TEXT.replace("[", " "),
    ]:
        assert ours.encode(text) == theirs(text)["input_ids"]
    assert theirs.mask_token_id == MASK and theirs.pad_token_id == PAD and theirs.model_max_length == 24


def test_the_readme_says_what_is_stored(trained, command):
    folder, readme = trained
    facts = json.loads((tokens_of(folder) / "data.json").read_text())
    assert facts["file_list_sha256"] in readme and f"--config {command('run')[1]}" in readme
    assert f"{facts['train_passages']:,} passages" in readme
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")

    convert(folder)
    model = load_model(folder, dtype=torch.float32)
    held_out = np.fromfile(tokens_of(folder) / "held_out.bin", dtype=np.uint16)
    measured = masked_accuracy(model, held_out, 24)
    assert f"all held-out text | {measured.accuracy:.2%} |" in readme
    assert f"constant guess | {measured.constant:.2%} |" in readme
    guess = load_tokenizer(folder).token_text(measured.constant_id)
    assert f"always `{guess}`" in readme


def test_the_accuracy_is_that_of_transformers_on_each_passage_alone(trained):
    """The same gaps, found by comparing what the model reads with what stands there; no padding, no batch."""
    folder, _ = trained
    held_out = np.fromfile(tokens_of(folder) / "held_out.bin", dtype=np.uint16)
    oracle = transformers.BertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = sorted(passage_data.cut(held_out, 24), key=len)
    batches = [
        passage_data.padded(rows[i:j]) for i, j in passage_data.spans(list(map(len, rows)), EVALUATION_TOKENS)
    ]
    right, truths = 0, []
    for n, batch in enumerate(batches):
        for tokens, inputs in zip(batch, passage_data.hide_for_evaluation(batch, seed=n)[0]):
            size = (tokens != PAD).sum()
            with torch.no_grad():
                guesses = oracle(inputs[None, :size]).logits[0].argmax(dim=-1)
            gaps = (inputs[:size] == MASK).nonzero()[:, 0]
            truths += tokens[gaps].tolist()
            right += (guesses[gaps] == tokens[gaps]).sum().item()
    convert(folder)
    measured = masked_accuracy(load_model(folder, dtype=torch.float32), held_out, 24)
    most = max(set(truths), key=truths.count)
    assert measured.accuracy == pytest.approx(right / len(truths)) and right > 0
    assert measured.constant == pytest.approx(truths.count(most) / len(truths))
    assert truths.count(measured.constant_id) == truths.count(most)


# Passages ---------------------------------------------------------------------------------------------------

MODULE = '''"""Of a module."""
# not this
def function():
    """Of a function,

            with an indented line
        and another.
    """
    "nor this"
class Class:
    async def method(self):
        """Of a method."""
    def without(self): pass
'''


def test_docstrings_are_those_that_python_shows():
    names = {}
    exec(compile(MODULE, "module.py", "exec"), names)
    shown = [names["__doc__"], names["function"].__doc__, names["Class"].method.__doc__]
    found = passage_data.docstrings(Document("module.py", MODULE))
    assert [text.split("\n")[0] for text in found] == ["Of a module.", "Of a function,", "Of a method."]
    assert found[1] == "Of a function,\n\n    with an indented line\nand another."
    assert found == [inspect.cleandoc(text) for text in shown]


def test_of_the_standard_library_only_docstrings_are_read(monkeypatch):
    """Here of a part of it, that is soon read: the package email."""
    monkeypatch.setattr(text_data.sysconfig, "get_path", lambda name: Path(email.__file__).parent)
    *_, train, held_out = passage_data.split_passages("stdlib")
    assert not any(text_data.is_held_out(passage.name) for passage in train)
    assert all(text_data.is_held_out(passage.name) for passage in held_out) and held_out
    texts = [passage.text for passage in train + held_out]
    for thing in (email, email.message, email.message.Message, email.message.Message.get_payload):
        assert inspect.getdoc(thing) in texts
    assert not any("def " in text for text in texts)


def test_paragraphs_lie_between_empty_lines():
    document = Document("text", "\n\none\nline\r\n\r\n  two \n \t\n\n three\n")
    assert passage_data.paragraphs(document) == ["one\nline", "two", "three"]


def test_the_tokens_are_the_passages(tmp_path):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    corpus = passage_data.prepare(tmp_path / "text", tmp_path, 300)
    _, _, train, held_out = passage_data.split_passages(tmp_path / "text")
    reference = transformers.BertTokenizer(vocab=vocabulary_of(corpus.folder))
    for tokens, passages in ((corpus.train, train), (corpus.held_out, held_out)):
        # A text that names a special token is a text.
        texts = [re.sub(r"\[(PAD|UNK|CLS|SEP|MASK)\]", r"[ \1 ]", passage.text) for passage in passages]
        rows = passage_data.cut(tokens, 10_000)
        assert [row.tolist() for row in rows] == reference(texts)["input_ids"]

    made = (corpus.folder / "train.bin").stat().st_mtime_ns
    passage_data.prepare(tmp_path / "text", tmp_path, 300)
    assert (corpus.folder / "train.bin").stat().st_mtime_ns == made


def vocabulary_of(folder):
    pieces = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert pieces[: len(SPECIAL_TOKENS)] == list(SPECIAL_TOKENS)
    return {piece: id for id, piece in enumerate(pieces)}


def test_the_same_text_gives_the_same_vocabulary():
    """The library alone gives another one each time."""
    passages = [Document("text", text) for text in TEXT.split("\n\n")]
    vocabularies = [passage_data.train_vocabulary(passages, 500) for _ in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies[1:])


# Batches ----------------------------------------------------------------------------------------------------


def tokens_with(*lengths):
    """Passages of these many tokens, special ones included, each with numbers of its own."""
    numbers = iter(range(5, 10_000))
    rows = [[CLS, *(next(numbers) for _ in range(length - 2)), SEP] for length in lengths]
    return np.array(sum(rows, []), dtype=np.uint16)


def test_long_passages_are_cut_in_equal_parts():
    rows = passage_data.cut(tokens_with(3, 10, 11, 28), context=10)
    assert [row[1:-1].tolist() for row in rows] == [
        [5], [*range(6, 14)], [*range(14, 19)], [*range(19, 23)],
        [*range(23, 30)], [*range(30, 37)], [*range(37, 43)], [*range(43, 49)],
    ]  # fmt: skip
    assert all(row[0] == CLS and row[-1] == SEP for row in rows)


@pytest.mark.parametrize("batch_tokens", [1, 40, 64, 1000])
def test_every_passage_is_read_once_in_a_pass(batch_tokens):
    lengths = np.random.default_rng(0).integers(3, 21, size=60)
    passages = Passages(tokens_with(*lengths), 20, batch_tokens, seed=3)
    orders = []
    for number_of_pass in range(3):
        batches = [passages.batch(number_of_pass * passages.per_pass + n) for n in range(passages.per_pass)]
        for batch in batches:
            assert batch.numel() <= max(batch_tokens, 20)
            # Whole passages, then nothing but padding.
            assert ((batch == PAD).int().diff(dim=1) >= 0).all() and (batch == SEP).sum() == len(batch)
        rows = [tuple(row[row != PAD].tolist()) for batch in batches for row in batch]
        assert sorted(rows) == sorted(tuple(row.tolist()) for row in passages.rows)
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2]
    if batch_tokens == 64:
        places = sum(passages.batch(n).numel() for n in range(passages.per_pass))
        assert sum(lengths) / places > 0.9

    # A batch is a function of its number: asked for out of turn it is the same.
    again = Passages(tokens_with(*lengths), 20, batch_tokens, seed=3)
    number = 2 * again.per_pass - 1
    again.batch(0)
    assert torch.equal(again.batch(number), passages.batch(number))


# Masks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens():
    """(B, T): 4000 passages of 3 to 42 tokens, padded."""
    rows = passage_data.cut(tokens_with(*[3 + n % 40 for n in range(400)]), context=42)
    return passage_data.padded(rows).repeat(10, 1)


def test_of_the_chosen_tokens_80_percent_are_hidden(tokens):
    inputs, chosen = passage_data.hide_for_training(tokens, 0.4, vocab_size=20_000, seed=1)
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    read, there = inputs[chosen], tokens[chosen]
    num_chosen = len(there)
    hidden, kept = read == MASK, read == there
    # Four standard deviations of a share among so many.
    assert hidden.sum().item() / num_chosen == pytest.approx(0.8, abs=4 * (0.8 * 0.2 / num_chosen) ** 0.5)
    assert kept.sum().item() / num_chosen == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / num_chosen) ** 0.5)
    others = read[~hidden & ~kept]
    assert others.min() >= len(SPECIAL_TOKENS) and others.max() < 20_000
    assert others.float().mean().item() == pytest.approx(10_000, rel=0.1)


@pytest.mark.parametrize("hide", [lambda t, seed: passage_data.hide_for_training(t, 0.15, 20_000, seed),
                                  passage_data.hide_for_evaluation])  # fmt: skip
def test_15_percent_are_chosen_in_each_passage(tokens, hide):
    _, chosen = hide(tokens, 7)
    words = (tokens >= len(SPECIAL_TOKENS)).sum(dim=1)
    expected = [max(1, round(0.15 * count)) for count in words.tolist()]
    assert chosen.sum(dim=1).tolist() == expected
    assert not chosen[tokens < len(SPECIAL_TOKENS)].any()
    # Each place as often as any other: of passages with 40 words, 6 are chosen.
    long = chosen[words == 40]
    assert len(long) >= 90 and long.sum(dim=0)[1:41].float().std() < 8

    assert torch.equal(hide(tokens, 7)[0], hide(tokens, 7)[0])
    assert not torch.equal(hide(tokens, 7)[1], hide(tokens, 8)[1])


def test_in_evaluation_every_chosen_token_is_hidden(tokens):
    inputs, chosen = passage_data.hide_for_evaluation(tokens, seed=1)
    assert torch.equal(inputs == MASK, chosen) and torch.equal(inputs[~chosen], tokens[~chosen])


# Mistakes ---------------------------------------------------------------------------------------------------

MISTAKES = {
    "no such data": (["--data", "nowhere"], "--data nowhere: no such file or folder"),
    "no passages": (["--data", "spaces"], "--data spaces: no passages in one of its two parts"),
    "too large a vocabulary": (["--vocab-size", "60000"], "--vocab-size 60000 does not suit this text"),
    "too small a vocabulary": (["--vocab-size", "10"], "--vocab-size 10 does not suit this text"),
    "another head": (["--config", "sentence.json"], 'has the head "None"; give one with "masked_lm"'),
    "longer than the model": (["--context", "25"], "--context 25 is longer than the model's max_seq_len, 24"),
    "too short": (["--context", "2"], "--context: '2' is not a whole number from 3 up"),
    "more than all": (["--masked", "1.5"], "--masked: '1.5' is not a number from 0 to 1"),
    "no batch": (["--batch-tokens", "0"], "--batch-tokens: '0' is not a whole number from 1 up"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(command, tmp_path, mistake, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spaces").write_text("x" + " \n" * 1000)
    (tmp_path / "sentence.json").write_text(json.dumps(CONFIG | {"head": None}))
    options, message = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        main(command("run", *options))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()
