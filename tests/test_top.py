"""run.py --top and --attention: each new token's probability is the oracle's; the picture is a PNG."""

import re

import pytest
import torch
import transformers

import run
from conversion.convert import convert
from models import load_model
from models.utils.command_line import CHECKPOINTS
from models.utils.errors import UserError
from runs_ar.attention_picture import self_attention, spoken
from runs_ar.top import continuation, translation


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root, done = tmp_path_factory.mktemp("converted"), {}

    def folder(name):
        if name not in done:
            done[name] = convert(CHECKPOINTS / name, out=root / name, progress=False)
        return done[name]

    return folder


def oracle_of(name, cls=transformers.AutoModelForCausalLM):
    return cls.from_pretrained(CHECKPOINTS / name, dtype=torch.float32).eval()


def equal(found, tokens, expected):
    for (probability, best), token, probs in zip(found, tokens, expected, strict=True):
        assert probability == pytest.approx(probs[token].item(), abs=1e-5)
        values, ids = probs.topk(len(best))
        assert [id for id, _ in best] == ids.tolist()
        assert [p for _, p in best] == pytest.approx(values.tolist(), abs=1e-5)


def test_probabilities_of_what_is_written(converted):
    model = load_model(converted("tiny-gpt2-python"), dtype=torch.float32)
    prompt, tokens = [5, 6, 7, 8], list(range(100, 140))  # more than a PIECE
    with torch.no_grad():
        logits = oracle_of("tiny-gpt2-python")(torch.tensor([prompt + tokens])).logits[0, 3:-1]
    equal(continuation(model, prompt, tokens, 3), tokens, logits.softmax(dim=-1))


def test_probabilities_of_a_translation(converted):
    name = "tiny-transformer-dates"
    model = load_model(converted(name), dtype=torch.float32)
    source, start, tokens = [9, 10, 11, 12], 0, [13, 14, 15]
    oracle = oracle_of(name, transformers.MarianMTModel)
    with torch.no_grad():
        logits = oracle(
            torch.tensor([source]), decoder_input_ids=torch.tensor([[start, *tokens[:-1]]])
        ).logits
    equal(translation(model, source, start, tokens, 2), tokens, logits[0].softmax(dim=-1))


@pytest.mark.parametrize("name", ["tiny-llama-python", "tiny-bert-python", "tiny-transformer-dates"])
def test_at_the_terminal(name, converted, tmp_path, capsys):
    prompt = {"tiny-bert-python": "the [MASK] of a list", "tiny-transformer-dates": "May 3, 1999"}.get(
        name, "def $f"
    )
    writes = [] if "bert" in name else ["--max-new-tokens", "6", "--temperature", "0"]
    run.main(
        [
            str(converted(name)),
            "--prompt",
            prompt,
            *writes,
            "--top",
            "3",
            "--attention",
            str(tmp_path / "a.png"),
        ]
    )
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if re.match(r" +[\d.]+%  ", line)]
    assert len(lines) == (3 if "bert" in name else 6)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_whole_text_is_looked_at(converted):
    model = load_model(converted("tiny-llama-python"), dtype=torch.float32)
    probs = self_attention(model, torch.tensor([[4, 5, 6]]))
    assert probs.shape == (6, 8, 3, 3) and not probs.triu(1).any()
    assert [spoken(name) for name in ("\n", "  ", "\x00", "$x")] == ["↵", "␣", "�", r"\$x"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt", "x", "--top", "0"], "--top is 0"),
        (["--top", "2", "--chat"], "--top: of one text"),
        (["--attention", "a.png", "--score", __file__], "--attention: of one text"),
        (["--prompt", "x", "--attention", "/dev/null/a.png"], "--attention"),
    ],
)
def test_what_makes_no_sense(options, message, converted):
    with pytest.raises(UserError, match=message):
        run.main([str(converted("tiny-llama-python")), *options])
