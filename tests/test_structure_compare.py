"""Two models side by side: what a flag changes is the difference found, no more and no less."""

import dataclasses
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from matplotlib import rc_context

from models import load_config
from structure.capture.capture import capture, capture_model
from structure.compare import compare
from structure.picture import ink, picture, place

ROOT = Path(__file__).resolve().parent.parent


@lru_cache
def box_of(name, **changes):
    model_name, config = load_config(name)
    return capture(model_name, dataclasses.replace(config, **changes))


@lru_cache
def comparison(one, other):
    return compare(box_of(one), box_of(other))


def found(one, other):
    """(part, sentence) of each difference."""
    return [(each.part, each.sentence) for each in comparison(one, other).differences]


def test_gpt2_and_llama():
    assert found("gpt2", "llama-3-8b") == [
        ("model", "pos_embed / rope"),
        ("Layer", "LayerNorm / RMSNorm"),
        ("Layer", "each head has keys and values / query heads share key/value heads"),
        ("attn", "bias / no bias"),
        ("attn", "– / rotate"),
        ("attn", "matmul, mask, softmax / attention"),
        ("ffn", "gelu / gate_proj, silu, ×"),
        ("model", "tied to token_embed / a matrix of its own"),
    ]


def test_the_other_way_round():
    def mirrored(each):
        return each.right, each.left, each.says[::-1], each.sources[::-1]

    there = {mirrored(each) for each in comparison("gpt2", "llama-3-8b").differences}
    back = comparison("llama-3-8b", "gpt2").differences
    assert {(each.left, each.right, each.says, each.sources) for each in back} == there


def test_sizes_are_no_difference():
    assert found("gpt2", "gpt2-xl") == []
    assert comparison("gpt2", "gpt2-xl").sentences == ()


@pytest.mark.parametrize(
    "name, change, sentences",
    [
        ("llama-3-8b", {"qkv_bias": True}, ["no bias / bias"]),
        (
            "llama-3-8b",
            {"num_kv_heads": 32},
            ["query heads share key/value heads / each head has keys and values"],
        ),
        ("llama-3-8b", {"tied_head": True}, ["a matrix of its own / tied to token_embed"]),
        (
            "pythia-1b",
            {"parallel_residual": False},
            ["beside the sublayer before it / norm before the sublayer (pre-LN)"],
        ),
        ("transformer-base", {"activation": "silu"}, ["relu / silu"]),
    ],
)
def test_a_flag_of_the_config_is_the_one_difference(name, change, sentences):
    assert [each.sentence for each in compare(box_of(name), box_of(name, **change)).differences] == sentences


def test_a_bias_is_marked_where_it_stands():
    [difference] = compare(box_of("llama-3-8b"), box_of("llama-3-8b", qkv_bias=True)).differences
    assert difference.left == difference.right
    assert difference.left == tuple(f"layers.0.attn.{letter}_proj" for letter in "qkv")


def test_a_decoder_is_compared_with_the_decoder_and_an_encoder_with_the_encoder():
    sentences = [sentence for _, sentence in found("transformer-base", "gpt2")]
    assert "encoder / –" in sentences and "cross_attn / –" in sentences
    sentences = [sentence for _, sentence in found("transformer-base", "bert-base-uncased")]
    assert "decoder / –" in sentences and "cross_attn / –" not in sentences


def test_the_lines_are_those_that_differ():
    """Each line of a difference names what it is about."""
    lines = {}
    for each in comparison("gpt2", "llama-3-8b").differences:
        for side, sources in zip(("gpt2", "llama"), each.sources):
            for source in sources:
                text = (ROOT / source.file).read_text(encoding="utf-8").splitlines()[source.first - 1]
                assert Path(source.file).stem == side
                lines.setdefault(each.sentence, []).append(text)
    assert all("norm" in line for line in lines["LayerNorm / RMSNorm"])
    assert all("_proj" in line for line in lines["bias / no bias"])
    assert all("rotate" in line for line in lines["– / rotate"])
    assert any("gelu" in line for line in lines["gelu / gate_proj, silu, ×"])
    assert any("silu" in line for line in lines["gelu / gate_proj, silu, ×"])
    assert any("pos_embed" in line for line in lines["pos_embed / rope"])


def test_the_sentences_are_those_of_the_docstrings(tmp_path):
    """Of what differs, and only where a page says something."""
    said = {"first": "Differs from gpt2: halves what a feed-forward adds.", "second": ""}
    pages = {name: captured_page(tmp_path / f"{name}.py", text) for name, text in said.items()}
    [(part, *sentences)] = compare(pages["first"], pages["second"]).sentences
    assert (part, sentences) == ("ffn", ["Differs from gpt2: halves what a feed-forward adds.", ""])
    # Of what is drawn the same, nothing: another word is no difference.
    (tmp_path / "again").mkdir()
    again = captured_page(tmp_path / "again" / "third.py", "Differs from gpt2: in words alone.")
    assert compare(pages["first"], again).sentences == ()
    assert comparison("gpt2", "gpt2-xl").sentences == ()


PAGE = '''
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Config:
    d_model: int  # D: width


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(7, config.d_model)
        self.ffn = FeedForward(config)

    def forward(
        self,
        tokens,  # (B, T)
    ):
        x = self.token_embed(tokens)  # (B, T, D)
        return x + self.ffn(x)  # (B, T, D)


class FeedForward(nn.Module):
    """Two maps.

    SAID Another sentence.
    """

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, 30)
        self.down_proj = nn.Linear(30, config.d_model)

    def forward(self, x):
        return self.down_proj(self.up_proj(x).relu())  # (B, T, D)
'''


def captured_page(path, said):
    """The box of a model whose feed-forward says something; without a word it has another activation."""
    path.write_text(PAGE.replace("SAID", said).replace("relu", "relu" if said else "tanh"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    with torch.device("meta"):
        return capture_model(module.Model(module.Config(12)))


# ---------------------------------------------------------------------------- the picture


def test_where_nothing_is_said_no_table_is_drawn():
    """Not even its headings, "models/gpt2.py" and the other page."""
    infos = [{"name": name, "model": load_config(name)[0]} for name in ("gpt2", "gpt2-xl")]
    figure = picture.compare(box_of("gpt2"), infos[0], box_of("gpt2-xl"), infos[1])
    assert not any("models/" in text.get_text() for text in figure.axes[0].texts)


@pytest.mark.parametrize("other", ["llama-3-8b", "transformer-base"])
def test_the_picture_has_a_number_for_each_difference_and_no_words_over_words(other):
    infos = [{"name": name, "model": load_config(name)[0]} for name in ("gpt2", other)]
    figure = picture.compare(box_of("gpt2"), infos[0], box_of(other), infos[1])
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    numbers = {text.get_text() for text in texts if text.get_text().isdigit() and len(text.get_text()) < 3}
    differences = comparison("gpt2", other).differences
    assert {str(n) for n in range(1, len(differences) + 1)} <= numbers
    assert figure.facts == picture.facts_compared(box_of("gpt2"), box_of(other))

    with rc_context(picture.FILES):
        renderer = figure.canvas.get_renderer()
        places = [text.get_window_extent(renderer) for text in texts]
    width, height = figure.get_size_inches() * figure.dpi
    for text, at in zip(texts, places):
        assert at.x0 > 0 and at.x1 < width and at.y0 > 0 and at.y1 < height, text
    for n, one in enumerate(places):
        for m, other_place in enumerate(places[:n]):
            wide = min(one.x1, other_place.x1) - max(one.x0, other_place.x0)
            high = min(one.y1, other_place.y1) - max(one.y0, other_place.y0)
            assert wide <= 0 or high <= 2, (texts[n], texts[m])


def test_what_is_the_same_is_faded():
    def colours(marks):
        drawing = ink.Ink(sheet.right, sheet.top, dark=False)
        ink.draw_sheet(drawing, sheet, marks)
        return {text.get_text(): text.get_color() for text in drawing.axes.texts}

    sheet = place.lay_out(box_of("gpt2"))
    plain, marked = colours(None), colours({"pos_embed": [1]})
    assert marked["pos_embed"] == plain["pos_embed"]
    assert marked["token_embed"] != plain["token_embed"]
