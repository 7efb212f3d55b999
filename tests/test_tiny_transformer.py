"""tiny-transformer-dates does what its README says, measured again here."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MarianMTModel, MarianTokenizer

from conversion.convert import convert
from models import load_model
from models.utils.tokenizer import load_tokenizer
from runs_train.dates_data import TEMPLATES
from runs_train.exact_match import exact_matches, share, translate
from runs_train.pair_data import read_pairs
from runs_train.text_data import is_held_out
from tests.tiny_readmes import row

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "checkpoints" / "tiny-transformer-dates"
SAMPLE = ROOT / "tests" / "data" / "held_out_dates.tsv"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model in fp32, tokenizer), converted here, whatever was converted before."""
    out = tmp_path_factory.mktemp("dates") / "converted"
    convert(FOLDER, out=out)
    return load_model(out, dtype=torch.float32), load_tokenizer(out)


def test_exact_match_on_the_sample(tiny):
    matches = exact_matches(*tiny, read_pairs(SAMPLE))
    assert f"{share(matches):.2%}" == row(FOLDER.name, "exact match, tests/data/held_out_dates.tsv")
    assert row(FOLDER.name, "vocabulary") == f"{tiny[1].vocab_size} characters"
    assert share(matches) >= 0.99 and set(matches) == set(TEMPLATES)


def test_exact_match_on_all_held_out_dates():
    """Every template is in the table; its rows add up to the figure above it, which is at least 99%."""
    counts = [row(FOLDER.name, f"`{template}`").replace(",", "").split(" of ") for template in TEMPLATES]
    right, total = (sum(map(int, column)) for column in zip(*counts))
    assert f"{total:,}" == row(FOLDER.name, "held-out pairs")
    assert f"{right / total:.2%}" == row(FOLDER.name, "exact match, all held-out pairs")
    assert right / total >= 0.99


def test_the_sample_was_held_out():
    pairs = read_pairs(SAMPLE)
    assert len(pairs) >= 500 and all(is_held_out(pair.target) for pair in pairs)


@pytest.mark.parametrize(
    "text",
    [
        "the 3rd of March, 1987",
        "Tue 3 Mar 1987",
        "March 3, 1987",
        "3/3/87",
        "03.03.1987",
        "TUESDAY THE 3RD OF MARCH 1987",
        "  the   3rd of march ,1987 ",
        "1987-03-03",
    ],
)
def test_one_day_in_many_words(tiny, text):
    assert translate(*tiny, [text]) == ["1987-03-03"]


def test_days_come_first_and_centuries_are_right(tiny):
    texts = ["3/4/87", "4/3/87", "31.12.69", "1.1.70", "03.04.1987"]
    days = ["1987-04-03", "1987-03-04", "2069-12-31", "1970-01-01", "1987-04-03"]
    assert translate(*tiny, texts) == days


def test_transformers_writes_the_same(tiny):
    """From the files as they are published, with its own tokenizer and generation."""
    texts = [pair.source for pair in read_pairs(SAMPLE)[::5]]
    oracle = MarianMTModel.from_pretrained(FOLDER).float().eval()
    tokenizer = MarianTokenizer.from_pretrained(FOLDER)
    with torch.no_grad():
        written = oracle.generate(**tokenizer(texts, return_tensors="pt", padding=True))
    assert tokenizer.batch_decode(written, skip_special_tokens=True) == translate(*tiny, texts)


def test_the_command_of_the_readme():
    command = [sys.executable, "run.py", "--checkpoint", FOLDER, "--prompt", "the 3rd of March, 1987"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "1987-03-03")
