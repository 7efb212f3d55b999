"""structure/rope.py: the picture's numbers are the oracle's, and no picture in git is out of date."""

import math
import re

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models import config_from_dict, config_to_dict, load_config
from models.utils.errors import UserError
from show_structure import IMAGES, rope_images
from structure import rope
from structure.picture import picture

YARN = {
    "factor": 4.0,
    "original_max_seq_len": 32768,
    "fast_turns": 32.0,
    "slow_turns": 1.0,
    "rotation_scale": 0.1 * math.log(4) + 1,
}


def turns_of(name, **changes):
    fields = config_to_dict(*load_config(name)) | changes
    return rope.turns_of(*config_from_dict(fields, name))


def assert_turns(one, frequencies):
    torch.testing.assert_close(torch.tensor(one.tokens), 2 * math.pi / frequencies, rtol=1e-4, atol=0)


def test_llama_3_1():
    theirs = LlamaConfig(
        hidden_size=4096,
        num_attention_heads=32,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    [one] = turns_of("llama-3.1-8b")
    assert_turns(one, ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")[0])
    torch.testing.assert_close(
        torch.tensor(one.plain), 2 * math.pi * 500000.0 ** (torch.arange(64) / 64), rtol=1e-4, atol=0
    )
    assert one.scale == 1
    assert rope.in_words(one).startswith("29 pairs as they were, 6 in between, 29 turn 8 times slower: ")


def test_yarn():
    theirs = Qwen3Config(
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    )
    [one] = turns_of("qwen3-0.6b", rope_scaling=YARN)
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    assert_turns(one, frequencies)
    assert one.scale == pytest.approx(scale, abs=1e-4)
    assert rope.in_words(one).endswith("; q and k grow by 1.139")


def test_a_part_of_the_head_and_no_scaling():
    [one] = turns_of("pythia-70m")
    assert len(one.tokens) == 8 and one.slowed == pytest.approx([1] * 8, rel=1e-4)
    assert rope.in_words(one) == "not scaled: the slowest pair turns once in 19,869 tokens"


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3"])
def test_a_model_with_experts(name):
    """How many tokens an expert gets is unknown on the meta device, where the model runs; rope came first."""
    [one] = turns_of(name, num_layers=4)
    config = load_config(name)[1]
    assert len(one.tokens) == getattr(config, "rotary_dim", config.head_dim) // 2
    assert (max(one.slowed) > 1.5) == (config.rope_scaling is not None)


def test_layers_of_two_kinds_are_two_lines():
    """Gemma 3's layers with a window turn by another base than those that see the whole text."""
    config = load_config("gemma-3-1b")[1]
    both = turns_of("gemma-3-1b")
    assert len(both) == 2
    pairs = torch.arange(config.head_dim // 2) * 2 / config.head_dim
    assert_turns(both[0], 1 / config.local_rope_base**pairs)
    assert_turns(both[1], 1 / config.rope_base**pairs / config.rope_factor)


def test_an_error_before_rope_is_not_hidden(monkeypatch):
    def fail(*args):
        raise NotImplementedError("before rope")

    monkeypatch.setattr("models.llama.Model.hidden", fail)
    with pytest.raises(NotImplementedError, match="before rope"):
        turns_of("llama-3.1-8b")


def test_a_model_without_rope_is_told():
    with pytest.raises(UserError, match="models/gpt2.py has no RoPE"):
        turns_of("gpt2")


@pytest.mark.parametrize("name", ["gemma-3-1b", "gpt-oss-20b", "llama-3.1-8b"])
def test_no_word_stands_on_a_curve(name):
    figure = rope.draw(name, *load_config(name))
    axes, renderer = figure.axes[0], figure.canvas.get_renderer()
    words = [text.get_window_extent(renderer) for text in axes.texts]
    assert words
    for curve in axes.lines:
        for point in axes.transData.transform(curve.get_xydata()) if len(curve.get_xydata()) > 2 else []:
            assert not any(word.contains(*point) for word in words), point


def test_lengths_are_those_of_the_config_and_its_scaling():
    config = load_config("llama-3.1-8b")[1]
    assert rope.lengths_of(config) == {131072: "max_seq_len", 8192: "original_max_seq_len"}


@pytest.mark.parametrize("dark", [False, True])
def test_a_picture_says_what_it_shows(tmp_path, dark):
    figure = rope.draw("llama-3.1-8b", *load_config("llama-3.1-8b"), dark=dark)
    picture.save(figure, tmp_path / "rope")
    said = picture.shown(tmp_path / "rope.png")
    assert said == picture.shown(tmp_path / "rope.svg") == figure.facts
    assert said[:2] == ["max_seq_len 131072", "original_max_seq_len 8192"]
    # 2 pi * 500000 ** (63 / 64) = 2,559,195 tokens without scaling.
    pair, tokens, plain = re.fullmatch(r"pair (\d+): (\S+), without scaling (\S+)", said[-1]).groups()
    assert pair == "63"
    assert float(plain.replace(",", "")) == pytest.approx(2 * math.pi * 500000 ** (63 / 64), rel=1e-4)
    assert float(tokens.replace(",", "")) == pytest.approx(16 * math.pi * 500000 ** (63 / 64), rel=1e-4)


def test_no_picture_is_out_of_date():
    assert rope_images(IMAGES)
    for name, dark in rope_images(IMAGES):
        figure = rope.draw(name, *load_config(name), dark=dark)
        said = picture.shown(IMAGES / f"{name}-rope{'-dark' * dark}.png")
        assert said == figure.facts, f"draw again: python show_structure.py {name} --rope"
