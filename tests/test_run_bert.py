"""The proof of runs_encoder/bert.py, on tiny random checkpoints, against the pipelines of `transformers`."""

import json
import shutil
import sys

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

import run
from conversion import checkpoint
from models.utils.errors import UserError
from models.utils.tokenizer import load_tokenizer
from runs_encoder import bert

MAX_SEQ_LEN = 40
LABELS = ["joy", "anger", "fear"]
TEXTS = [
    "the length of the list",
    "Return the Größe of a string, or None.",
    "an unexpected end of file; 中文 is read one character at a time (always)",
]
WITH_MASKS = [
    "return the [MASK] of the list.",
    "[MASK] raise [MASK]un[MASK]",
    "a list of many [MASK] and strings",
]
CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": MAX_SEQ_LEN,
}


def wordpiece_vocabulary():
    """Trained on the texts by the library's own recipe for BERT."""
    tokenizer = tokenizers.BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator([*TEXTS, *WITH_MASKS], vocab_size=130, min_frequency=1, show_progress=False)
    return tokenizer.get_vocab()


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(class name, **config) -> (the oracle, its tokenizer, the folder of its checkpoint)."""
    vocab = wordpiece_vocabulary()

    def make(class_name, **config):
        folder = tmp_path_factory.mktemp("bert") / class_name
        tokenizer = transformers.BertTokenizer(vocab=vocab)
        config = transformers.BertConfig(vocab_size=len(tokenizer), **CONFIG, **config)
        oracle = getattr(transformers, class_name)(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in oracle.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        oracle.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return oracle, tokenizer, folder

    return make


@pytest.fixture(scope="module")
def masked(make):
    return make("BertForMaskedLM")


@pytest.fixture
def start(capsys):
    """start(folder, texts, *options) -> what a run printed."""

    def start(folder, texts, *options):
        capsys.readouterr()
        prompts = [word for text in texts for word in ("--prompt", text)]
        run.main(["--checkpoint", str(folder), "--device", "cpu", *prompts, *map(str, options)])
        return capsys.readouterr()

    return start


@pytest.fixture
def result(start):
    """What --json says."""
    return lambda *args: json.loads(start(*args, "--json").out)


def close(value):
    return pytest.approx(value, rel=1e-4, abs=1e-6)


# Gaps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", ["BertForMaskedLM", "BertForPreTraining"])
def test_gaps_are_filled_as_by_the_pipeline(class_name, make, result):
    oracle, tokenizer, folder = make(class_name)
    if class_name == "BertForPreTraining":  # of which the pipeline knows only the first head
        oracle = transformers.BertForMaskedLM.from_pretrained(folder)
    pipeline = transformers.pipeline("fill-mask", model=oracle, tokenizer=tokenizer, top_k=5)
    ours = result(folder, WITH_MASKS)
    assert [len(one["masks"]) for one in ours] == [1, 3, 1]
    for text, one in zip(WITH_MASKS, ours):
        theirs = pipeline(text)
        theirs = [theirs] if text.count("[MASK]") == 1 else theirs
        assert one["text"] == text
        for guesses, expected in zip(one["masks"], theirs, strict=True):
            assert [guess["id"] for guess in guesses] == [guess["token"] for guess in expected]
            assert [guess["token"] for guess in guesses] == tokenizer.convert_ids_to_tokens(
                [guess["token"] for guess in expected]
            )
            assert [g["probability"] for g in guesses] == close([g["score"] for g in expected])


def test_gaps_for_people(masked, start):
    output = start(masked[2], WITH_MASKS[:2])
    first, second = output.out.split("\n\n")
    lines = first.splitlines()
    assert lines[0] == WITH_MASKS[0] and len(lines) == 6 and "[MASK] 1" not in first
    assert all(line.split()[0].endswith("%") for line in lines[1:])
    assert [line.strip() for line in second.splitlines()][:1] == [WITH_MASKS[1]]
    assert [f"  [MASK] {n}" in second.splitlines() for n in (1, 2, 3, 4)] == [True, True, True, False]
    assert "of weights (float32), on cpu" in output.err


def test_what_looks_like_another_special_token_is_text(masked, result):
    """The pipeline would read [SEP] as the end of the text."""
    _, tokenizer, folder = masked
    pieces = ["[", "sep", "]"]
    assert result(folder, ["[SEP] [MASK]"])[0]["masks"]
    ((ids, segments),) = bert.FillMask(folder, load_tokenizer(folder)).encode(["[SEP] [MASK]"])
    plain = tokenizer(" ".join(pieces), add_special_tokens=False)["input_ids"]
    assert ids == [tokenizer.cls_token_id, *plain, tokenizer.mask_token_id, tokenizer.sep_token_id]
    assert segments == [0] * len(ids)


# Labels -----------------------------------------------------------------------------------------------------

PROBLEMS = {
    "one of three": {"id2label": dict(enumerate(LABELS))},
    "any of three": {"id2label": dict(enumerate(LABELS)), "problem_type": "multi_label_classification"},
    "a number": {"num_labels": 1, "problem_type": "regression"},
    "three numbers": {"id2label": dict(enumerate(LABELS)), "problem_type": "regression"},
    "yes or no": {"num_labels": 1},
    "without names": {"num_labels": 4},
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_texts_are_classified_as_by_the_pipeline(problem, make, result, start):
    oracle, tokenizer, folder = make("BertForSequenceClassification", **PROBLEMS[problem])
    pipeline = transformers.pipeline("text-classification", model=oracle, tokenizer=tokenizer, top_k=None)
    kind = "value" if "number" in problem else "probability"
    shown = start(folder, TEXTS).out
    for text, ours in zip(TEXTS, result(folder, TEXTS), strict=True):
        theirs = {one["label"]: one["score"] for one in pipeline([text])[0]}
        assert {one["label"]: one[kind] for one in ours["labels"]} == close(theirs)
        order = list(oracle.config.id2label.values()) if kind == "value" else list(theirs)
        assert [one["label"] for one in ours["labels"]] == order
        for one in ours["labels"]:
            number = f"{one[kind]:.4f}" if kind == "value" else f"{one[kind]:.2%}"
            assert f"{number}  {one['label']}\n" in shown


def test_tokens_are_labelled_as_by_the_pipeline(make, result, start):
    names = dict(enumerate(LABELS))
    oracle, tokenizer, folder = make("BertForTokenClassification", id2label=names)
    pipeline = transformers.pipeline(
        "token-classification", model=oracle, tokenizer=tokenizer, ignore_labels=[]
    )
    texts = [*TEXTS, "an unknown \u0416 stays in its place"]
    for text, ours in zip(texts, result(folder, texts), strict=True):
        theirs = pipeline(text)
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        assert [token["token"] for token in ours["tokens"]] == pieces[1:-1]
        assert [token["label"] for token in ours["tokens"]] == [one["entity"] for one in theirs]
        assert [t["probability"] for t in ours["tokens"]] == close([one["score"].item() for one in theirs])
    assert "[UNK]" in [token["token"] for token in ours["tokens"]]
    token = ours["tokens"][0]
    line = start(folder, texts[-1:]).out.splitlines()[1]
    assert line.split() == [f"{token['probability']:.2%}", token["token"], token["label"]]


def test_whether_a_text_follows(make, result, start):
    oracle, tokenizer, folder = make("BertForNextSentencePrediction")
    with torch.no_grad():
        logits = oracle(**tokenizer(*TEXTS[:2], return_tensors="pt")).logits
    ours = result(folder, TEXTS[:2])
    assert [one["probability"] for one in ours["labels"]] == close(logits.softmax(dim=-1)[0].tolist())
    assert "follows" in start(folder, TEXTS[:2]).out
    for texts in (TEXTS, TEXTS[:1]):
        with pytest.raises(UserError, match=f"{len(texts)} texts; this model compares two"):
            start(folder, texts)


# Sentence vectors -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentences(make):
    return make("BertModel")


def pooled(oracle, tokenizer, modes):
    """The formulas of sentence-transformers, on a padded batch."""
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = oracle(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).expand(hidden.size()).float()
    vectors = {
        "cls": hidden[:, 0],
        "max": hidden.masked_fill(mask == 0, -1e9).max(1).values,
        "mean": (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9),
    }
    return torch.nn.functional.normalize(torch.cat([vectors[mode] for mode in modes], dim=1), p=2, dim=1)


def add_modules(folder, modes, kinds=("Transformer", "Pooling", "Normalize")):
    """What sentence-transformers saves beside the model."""
    names = [f"{n}_{kind}" if n else "" for n, kind in enumerate(kinds)]
    modules = [
        {"idx": n, "name": str(n), "path": name, "type": f"sentence_transformers.models.{kind}"}
        for n, (name, kind) in enumerate(zip(names, kinds))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    all_modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
    config = {f"pooling_mode_{mode}": mode in modes for mode in all_modes}
    (folder / "1_Pooling").mkdir()
    config |= {"word_embedding_dimension": 32, "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("modes", [None, "mean", "cls", "max", "cls max mean"])
def test_sentences_become_vectors(modes, sentences, tmp_path, result):
    oracle, tokenizer, folder = sentences
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("converted"))
    names = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
    if modes:
        add_modules(tmp_path / "copy", [names[mode] for mode in modes.split()])
    ours = result(tmp_path / "copy", TEXTS)
    theirs = pooled(oracle, tokenizer, (modes or "mean").split())
    assert ours["texts"] == TEXTS
    torch.testing.assert_close(torch.tensor(ours["embeddings"]), theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(ours["similarities"]), theirs @ theirs.T, rtol=1e-4, atol=1e-5)


def test_sentences_for_people(sentences, start, result):
    lines = start(sentences[2], TEXTS).out.splitlines()
    similarities = result(sentences[2], TEXTS)["similarities"]
    assert lines[0] == f"1  {TEXTS[0]}" and "32 numbers: " in lines[1]
    assert lines[-4] == "         1      2      3"
    assert lines[-3:] == [
        f"{n + 1:>3}" + "".join(f"{x:7.3f}" for x in row) for n, row in enumerate(similarities)
    ]

    many = [text + " list" * n for n in range(6) for text in TEXTS]
    lines = start(sentences[2], many).out.splitlines()
    similarities = torch.tensor(result(sentences[2], many)["similarities"]).fill_diagonal_(-2)
    assert [int(line.split()[2]) - 1 for line in lines[-18:]] == similarities.argmax(dim=1).tolist()
    assert "similarity" not in start(sentences[2], TEXTS[:1]).out


def test_what_is_not_pooled_here_is_said(sentences, tmp_path, start):
    for n, (modes, kinds, message) in enumerate(
        [
            (
                ["mean_sqrt_len_tokens"],
                ("Transformer", "Pooling"),
                "asks for pooling_mode_mean_sqrt_len_tokens",
            ),
            ([], ("Transformer", "Pooling"), "asks for "),
            (["mean_tokens"], ("Transformer", "Pooling", "Dense"), "lists Transformer, Pooling, Dense"),
            (["mean_tokens"], ("Transformer",), "lists Transformer; supported"),
        ]
    ):
        folder = tmp_path / str(n)
        shutil.copytree(sentences[2], folder, ignore=shutil.ignore_patterns("converted"))
        add_modules(folder, modes, kinds)
        with pytest.raises(UserError, match=message):
            start(folder, TEXTS)


# Texts ------------------------------------------------------------------------------------------------------


def test_a_batch_says_what_each_text_says_alone(sentences, masked, result, monkeypatch):
    monkeypatch.setattr(bert, "BATCH_SIZE", 2)
    together = result(sentences[2], TEXTS)["embeddings"]
    for text, vector in zip(TEXTS, together, strict=True):
        assert result(sentences[2], [text])["embeddings"][0] == pytest.approx(vector, abs=1e-5)
    together = result(masked[2], WITH_MASKS)
    for text, one in zip(WITH_MASKS, together, strict=True):
        alone = result(masked[2], [text])[0]["masks"][0]
        assert [g["probability"] for g in alone] == close([g["probability"] for g in one["masks"][0]])


def test_lines_that_are_piped_in_are_texts(masked, result, tmp_path, monkeypatch):
    piped = tmp_path / "lines"
    piped.write_text(f"{WITH_MASKS[0]}\n\n  {WITH_MASKS[1]}\r\n", encoding="utf-8")
    with open(piped) as file:
        monkeypatch.setattr(sys, "stdin", file)
        # A result for each line, also for the empty one.
        assert [one["text"] for one in result(masked[2], [])] == [WITH_MASKS[0], "", WITH_MASKS[1]]
        assert [one["text"] for one in result(masked[2], WITH_MASKS[2:])] == WITH_MASKS[2:]


def test_every_head_has_an_example(make, masked, sentences, result):
    assert result(masked[2], [])[0]["text"] == "Return the [MASK] of the list."
    assert len(result(sentences[2], [])["texts"]) == 3
    for name in "SequenceClassification", "TokenClassification", "NextSentencePrediction":
        assert result(make(f"BertFor{name}")[2], [])


@pytest.mark.parametrize("words", [["--json"], []])
def test_nan_is_no_answer(masked, tmp_path, start, words):
    folder = shutil.copytree(checkpoint.find_checkpoint(masked[2]), tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["token_embed.weight"][5] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="NaN"):
        start(folder, WITH_MASKS[:1], *words)


# What is wrong is said in one line, before anything is loaded -----------------------------------------------


def test_wrong_input_is_one_line(masked, sentences, make, start, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "load_weights", lambda *_: pytest.fail("checked too late"))
    long = "[MASK] " * (MAX_SEQ_LEN - 1)
    binary = tmp_path / "binary"
    binary.write_bytes("Größe".encode("latin-1"))
    for folder in (masked[2], sentences[2]):
        checkpoint.find_checkpoint(folder)
    for folder, texts, options, message in [
        (masked[2], ["no gap here"], [], r"'no gap here' has no \[MASK\]"),
        (masked[2], ["[mask]"], [], r"'\[mask\]' has no \[MASK\]"),
        (masked[2], [WITH_MASKS[0], "none"], [], r"'none' has no \[MASK\]"),
        (masked[2], [long], [], f"has {MAX_SEQ_LEN + 1} tokens, the model only {MAX_SEQ_LEN} positions"),
        (sentences[2], ["length " * 400], [], "'length length .*' has .* positions"),
        (masked[2], [""], [], "--prompt is empty"),
        (sentences[2], ["a", " "], [], "--prompt is empty"),
        (masked[2], [], ["--chat"], "--chat: a BERT neither writes nor chats"),
        (masked[2], [], ["--score", __file__], "--score: a BERT"),
        (masked[2], WITH_MASKS, ["--temperature=0.5", "--stop", "x"], "--stop, --temperature: a BERT"),
        (masked[2], WITH_MASKS, ["--max-new-tokens", "200"], "--max-new-tokens: a BERT"),
        (masked[2], WITH_MASKS, ["--seed", "0"], "--seed: a BERT"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            start(folder, texts, *options)
        assert "\n" not in str(error.value)
    with open(binary) as file, pytest.raises(UserError, match="standard input: no UTF-8 text"):
        monkeypatch.setattr(sys, "stdin", file)
        start(masked[2], [])


def test_the_longest_text_that_fits(masked, result):
    text = "[MASK] " * (MAX_SEQ_LEN - 2)
    assert len(result(masked[2], [text])[0]["masks"]) == MAX_SEQ_LEN - 2


def test_a_tokenizer_of_another_model(masked, tmp_path, start):
    folder = tmp_path / "copy"
    shutil.copytree(masked[2], folder, ignore=shutil.ignore_patterns("converted"))
    tokenizer = transformers.BertTokenizer(vocab=wordpiece_vocabulary())
    tokenizer.add_tokens(["outside"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="this tokenizer belongs to another model"):
        start(folder, ["outside [MASK]"])


def test_several_prompts_are_for_bert_alone(start):
    with pytest.raises(UserError, match="--prompt is given 2 times"):
        start(run.DEFAULT_CHECKPOINT, ["def", "class"])
