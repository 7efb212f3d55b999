"""The worked examples in docstrings are true: every `>>>` of a page is run, and what it prints compared."""

import doctest
import importlib
import re
import textwrap
from pathlib import Path

import pytest
import torch

from models import bert, create_model, llama, load_config, transformer_lm
from runs_ar import generate
from runs_encoder.bert import padded

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["models", "runs_ar", "runs_encoder", "runs_serve", "runs_ss", "runs_train"]
PAGES = [
    f"{room}.{path.stem}"
    for room in ROOMS
    for path in sorted((ROOT / room).glob("*.py"))
    if path.stem != "__init__" and ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("page", PAGES)
def test_examples(page):
    results = doctest.testmod(importlib.import_module(page))
    assert results.attempted > 0 and results.failed == 0


def test_every_model_has_an_example():
    models = {path.stem for path in (ROOT / "models").glob("*.py")} - {"__init__"}
    assert models <= {page.removeprefix("models.") for page in PAGES}


def test_position_3_turns_llamas_pairs_by_3_and_by_003_radians():
    """The numbers in the docstring of rope_frequencies."""
    assert "position 3 turns the two pairs by 3 and by 0.03 radians" in " ".join(
        llama.rope_frequencies.__doc__.split()
    )
    fields = vars(load_config("llama-2-7b")[1]) | {"head_dim": 4, "rope_base": 10_000.0}
    cos, sin = llama.rope(torch.tensor([[3]]), llama.Config(**fields))
    assert torch.atan2(sin, cos).flatten().tolist() == pytest.approx([3, 0.03])


def test_rms_norm_of_3_and_4():
    """The numbers in its docstring."""
    assert "(0.85, 1.13)" in transformer_lm.RMSNorm.__doc__
    normed = transformer_lm.RMSNorm(2, eps=0.0)(torch.tensor([3.0, 4.0]))
    assert normed.tolist() == pytest.approx([0.85, 1.13], abs=0.005)


def test_berts_row_of_two_texts():
    """The table in the docstring of hidden is what the runner makes of two texts in a batch."""
    rows = dict(re.findall(r"^ +(tokens|segments|attention_mask)  +(.+)$", bert.Model.hidden.__doc__, re.M))
    tokens, segments, mask = (rows[name].split() for name in ("tokens", "segments", "attention_mask"))
    ids = {token: n for n, token in enumerate(["[PAD]", "[CLS]", "[SEP]", "[MASK]", "a", "it", "sat"])}
    first, second = ["[CLS]", "a", "[MASK]", "[SEP]"], ["it", "sat", "[SEP]"]
    row = [ids[token] for token in first + second], [0] * len(first) + [1] * len(second)
    longer = [1] * 8, [0] * 8
    made = padded([row, longer], "cpu")
    assert made[0][0].tolist() == [ids[token] for token in tokens]
    assert made[1][0].tolist() == [int(segment) for segment in segments]
    assert made[2][0].tolist() == [mark == "1" for mark in mask]


def test_the_loop_in_six_lines_is_what_generate_does():
    """The loop at the top of runs_ar/generate.py, run as it stands there."""
    loop = re.search(r"^    tokens = list\(prompt\)\n(?:    .*\n)+", generate.__doc__, re.M)[0]
    assert len(loop.splitlines()) == 6
    model = create_model("tiny-llama-python", num_layers=1, d_model=32, d_ff=64, vocab_size=50).eval()
    options = {"prompt": [3, 1, 4, 1, 5], "max_new_tokens": 12}

    def written(eos_ids):
        names = {"torch": torch, "model": model, "eos_ids": eos_ids, **options}
        with torch.no_grad():
            exec(textwrap.dedent(loop), names)
        steps = generate.generate(model, [options["prompt"]], 12, eos_ids=eos_ids)
        assert names["tokens"] == options["prompt"] + [token for (token,) in steps]
        return names["tokens"]

    whole = written(eos_ids=())
    assert len(whole) == 5 + 12
    # Ended early, by a token that it wrote before.
    assert written(eos_ids={whole[9]}) == whole[: whole.index(whole[9], 5) + 1]
