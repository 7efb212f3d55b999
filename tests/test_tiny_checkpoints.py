"""The checkpoints that come with the project do what their README says: every one, and the decoders' figures.

What only one kind has is measured in test_tiny_bert.py, test_tiny_transformer.py and, of the ViT, in
test_train_image_classifier.py.
"""

import importlib
import re
import shlex

import pytest
import sentencepiece
import torch
from safetensors import safe_open

from conversion.convert import convert
from models import DECODER, load_config, load_model
from models.utils.command_line import CHECKPOINTS
from models.utils.sampling import Sampling, seeded_generators
from models.utils.tokenizer import load_tokenizer
from runs_ar.generate import generate
from runs_train.evaluation import bits_per_byte, bytes_of_tokens
from runs_train.text_data import file_list_hash, split_documents
from tests.tiny_readmes import NAMES, of_kind, readme_of, row

DECODERS = of_kind(DECODER)
DATA = CHECKPOINTS.parent / "tests" / "data"
SAMPLE = DATA / "held_out_python.txt"
MOST_BITS = 1.5  # per byte of the held-out files; xz -9 needs 1.48


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """converted(name): the folder, converted here, whatever was converted before."""
    root, done = tmp_path_factory.mktemp("converted"), {}

    def folder(name):
        if name not in done:
            done[name] = convert(CHECKPOINTS / name, out=root / name)
        return done[name]

    return folder


# Every checkpoint -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_is_about_this_model(converted, name):
    """Its size, and a command that trains a model of this form, for as long as the table says."""
    model = load_model(converted(name))
    assert row(name, "parameters") == f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    page, arguments = re.search(r"^    python -m runs_train\.(\w+) (.+)$", readme_of(name), re.M).groups()
    options = importlib.import_module(f"runs_train.{page}").parse_options(shlex.split(arguments))
    assert (options.config, options.out) == (name, None)
    assert load_config(name)[1] == model.config
    if "batch_size" in options:
        seen = options.steps * options.accumulate * options.batch_size
        seen *= model.config.max_seq_len if page == "language_model" else 1
        key = {"language_model": "tokens read", "seq2seq": "pairs read"}.get(page, "images seen")
        assert row(name, key).startswith(f"{seen:,}, ")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_stored_in_bf16_and_nothing_twice(converted, name):
    path = CHECKPOINTS / name / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        assert {file.get_slice(key).get_dtype() for key in names} == {"BF16"}
    num_parameters = sum(parameter.numel() for parameter in load_model(converted(name)).parameters())
    # Besides the numbers, a name and a shape for each tensor: an expert has three of its own.
    assert 2 * num_parameters <= path.stat().st_size < 2 * num_parameters + 1000 + 200 * len(names)


def test_together_they_are_small():
    """What lies in git stays there."""
    files = [path for name in NAMES for path in (CHECKPOINTS / name).glob("*.*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60e6


# Decoders ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request, converted):
    """(name, model in fp32, tokenizer)"""
    folder = converted(request.param)
    return request.param, load_model(folder, dtype=torch.float32), load_tokenizer(folder)


def test_bits_per_byte_on_the_sample(decoder):
    name, model, tokenizer = decoder
    (sample,) = re.findall(r"^\| bits per byte, tests/data/(\S+) \|", readme_of(name), re.M)
    claimed = row(name, f"bits per byte, tests/data/{sample}")
    tokens = torch.tensor(tokenizer.encode((DATA / sample).read_bytes().decode(), bos=True)).numpy()
    context = model.config.max_seq_len
    measured = bits_per_byte(model, tokens, bytes_of_tokens(tokenizer), context, context // 2)
    assert measured == pytest.approx(float(claimed), abs=1e-4)
    assert float(row(name, "bits per byte, all held-out text")) <= MOST_BITS


def test_the_sample_was_held_out():
    """Where this Python's library is the one that was trained on, its held-out files hold the sample."""
    train, held_out = split_documents("stdlib")
    if file_list_hash(train, held_out) != row("tiny-llama-python", "sha256 of the file list"):
        pytest.skip("this Python's library is not the one that was trained on")
    rest = SAMPLE.read_bytes().decode()
    for document in held_out:
        rest = rest.replace(document.text, "") if len(document.text) > 5000 else rest
    assert rest == ""


def test_they_speak_the_same_tokens():
    """So that one may draft for another, and their bits per byte may be compared."""
    names = [name for name in DECODERS if "-python" in name]
    assert len({(CHECKPOINTS / name / "tokenizer.model").read_bytes() for name in names}) == 1


def test_its_tokenizer_is_sentencepiece_itself(decoder):
    name, _, tokenizer = decoder
    text = SAMPLE.read_bytes().decode()[:20_000]
    path = CHECKPOINTS / name / "tokenizer.model"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.encode(text) == [reference.bos_id(), *reference.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert row(name, "vocabulary").startswith(f"{tokenizer.vocab_size} ")


def test_it_writes_python(decoder):
    """A body follows the header, indented by fours, and comes to a return, in most of what it writes."""
    _, model, tokenizer = decoder
    prompt = tokenizer.encode("def read_lines(path):", bos=True)
    made = generate(model, [prompt] * 4, 120, Sampling(temperature=0.5), generators=seeded_generators(0, 4))
    texts = [tokenizer.decode(list(tokens)) for tokens in zip(*made)]
    lines = [line for text in texts for line in text.split("\n")[1:-1] if line.strip()]
    assert sum("return " in text for text in texts) >= 2
    assert all(text.lstrip("\n").startswith("    ") for text in texts)
    assert sum((len(line) - len(line.lstrip())) % 4 == 0 for line in lines) >= 0.8 * len(lines)
