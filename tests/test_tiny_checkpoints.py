"""The checkpoints that come with the project do what their README says, measured again here."""

import re
import shlex
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors import safe_open

from conversion.convert import convert
from models import load_model
from models.utils.sampling import Sampling, seeded_generators
from models.utils.tokenizer import load_tokenizer
from runs_ar.generate import generate
from runs_train.evaluation import bits_per_byte, bytes_of_tokens
from runs_train.language_model import parse_options
from runs_train.text_data import file_list_hash, split_documents

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "tests" / "data" / "held_out_python.txt"
# The most bits per byte that each may need on the held-out files; xz -9 needs 1.48.
LIMITS = {
    "tiny-llama-python": 1.3,
    "tiny-llama-python-draft": 1.8,
    "tiny-gpt2-python": 1.5,
    "tiny-neox-python": 1.5,
}


def readme_of(name):
    return (ROOT / "checkpoints" / name / "README.md").read_text(encoding="utf-8")


def row(readme, key):
    """A value in the README's table."""
    return re.search(rf"^\| {re.escape(key)} \| (.+) \|$", readme, flags=re.M).group(1)


@pytest.fixture(scope="module", params=LIMITS)
def tiny(request, tmp_path_factory):
    """(name, model in fp32, tokenizer), converted here, whatever was converted before."""
    out = tmp_path_factory.mktemp(request.param) / "converted"
    convert(ROOT / "checkpoints" / request.param, out=out)
    return request.param, load_model(out, dtype=torch.float32), load_tokenizer(out)


def test_bits_per_byte_on_the_sample(tiny):
    name, model, tokenizer = tiny
    text = SAMPLE.read_bytes().decode()
    tokens = torch.tensor(tokenizer.encode(text, bos=True)).numpy()
    context = model.config.max_seq_len
    measured = bits_per_byte(model, tokens, bytes_of_tokens(tokenizer), context, context // 2)
    claimed = row(readme_of(name), "bits per byte, tests/data/held_out_python.txt")
    assert measured == pytest.approx(float(claimed), abs=1e-4)
    assert float(row(readme_of(name), "bits per byte, all held-out text")) <= LIMITS[name]


def test_the_readme_is_about_this_model(tiny):
    name, model, tokenizer = tiny
    readme = readme_of(name)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert row(readme, "parameters") == f"{num_parameters:,}"
    assert row(readme, "vocabulary").startswith(f"{tokenizer.vocab_size} ")

    command = re.search(r"^    python -m runs_train.language_model (.+)$", readme, flags=re.M).group(1)
    options = parse_options(shlex.split(command))
    assert options.config == name and options.data == "stdlib"
    tokens_read = options.steps * options.accumulate * options.batch_size * model.config.max_seq_len
    assert row(readme, "tokens read").startswith(f"{tokens_read:,}, ")


def test_the_sample_was_held_out():
    """Where this Python's library is the one that was trained on, its held-out files hold the sample."""
    train, held_out = split_documents("stdlib")
    if file_list_hash(train, held_out) != row(readme_of("tiny-llama-python"), "sha256 of the file list"):
        pytest.skip("this Python's library is not the one that was trained on")
    rest = SAMPLE.read_bytes().decode()
    for document in held_out:
        rest = rest.replace(document.text, "") if len(document.text) > 5000 else rest
    assert rest == ""


def test_it_is_stored_in_bf16(tiny):
    name, model, _ = tiny
    path = ROOT / "checkpoints" / name / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
    assert path.stat().st_size < 2 * sum(parameter.numel() for parameter in model.parameters()) + 20_000


def test_they_speak_the_same_tokens():
    """So that one may draft for another, and their bits per byte may be compared."""
    assert len({(ROOT / "checkpoints" / name / "tokenizer.model").read_bytes() for name in LIMITS}) == 1


def test_its_tokenizer_is_sentencepiece_itself(tiny):
    name, _, tokenizer = tiny
    path = ROOT / "checkpoints" / name / "tokenizer.model"
    text = SAMPLE.read_bytes().decode()[:20_000]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.encode(text) == [reference.bos_id(), *reference.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_it_writes_python(tiny):
    """A body follows the header, indented by fours, and comes to a return, in most of what it writes."""
    _, model, tokenizer = tiny
    prompt = tokenizer.encode("def read_lines(path):", bos=True)
    made = generate(model, [prompt] * 4, 120, Sampling(temperature=0.5), generators=seeded_generators(0, 4))
    texts = [tokenizer.decode(list(tokens)) for tokens in zip(*made)]
    lines = [line for text in texts for line in text.split("\n")[1:-1] if line.strip()]
    assert sum("return " in text for text in texts) >= 2
    assert all(text.lstrip("\n").startswith("    ") for text in texts)
    assert sum((len(line) - len(line.lstrip())) % 4 == 0 for line in lines) >= 0.8 * len(lines)
