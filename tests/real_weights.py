"""SmolLM2 135M Instruct, really published: one GGUF file, as ours, as transformers and as llama.cpp read it.

    make test-real       fetches the file of `make chat`, 100 MB, if it is not there; takes some minutes

It is no part of the suite. Each test prints what it measured. Without llama_cpp its tests are skipped.
"""

import ast
import random
import re
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.convert import convert
from conversion.gguf_write import export
from models import load_model
from models.utils.quantize import Quantization
from models.utils.tokenizer import load_tokenizer
from runs_ar.generate import generate
from runs_ar.score import figures, negative_log_likelihood
from tests.test_gguf_write import llama_cpp_object

NAME = "SmolLM2-135M-Instruct.Q4_1"
FILE = Path(__file__).parent.parent / "checkpoints" / NAME / f"{NAME}.gguf"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
TOKENS = 441  # of a text whose logits are compared
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time, in a village by the sea,"]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "You answer in one sentence."}, {"role": "user", "content": "Why?"}],
    [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi. How can I help?"},
        {"role": "user", "content": "Count to 3, Ünïcödé 漢字 🙂."},
    ],
]

pytestmark = pytest.mark.skipif(not FILE.is_file(), reason=f"{FILE} is not there: make test-real fetches it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The file converted as it is: matrices in fp32, codes dequantized."""
    return convert(FILE, out=tmp_path_factory.mktemp("real") / NAME)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def theirs():
    model = AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def their_tokenizer():
    return AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)


@pytest.fixture(scope="module")
def text():
    return (STDLIB / "statistics.py").read_text()


def texts():
    """318 texts: paragraphs of code, docstrings, and what is hard on a tokenizer."""
    found = [
        "",
        " ",
        "  two  spaces",
        "12345 + 678 = 13023",
        "it's, they'LL",
        "a" * 60,
        "\t\n\r\n  x",
        "🙂🙃 漢字 Ünïcödé",
    ]
    for name in ("argparse.py", "json/decoder.py", "random.py", "turtle.py"):
        source = (STDLIB / name).read_text()
        found += source.split("\n\n")
        found += [
            ast.get_docstring(node) or ""
            for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef)
        ]
    return found[:8] + random.Random(0).sample(found[8:], 310)


def test_logits(model, theirs, tokenizer, text):
    tokens = torch.tensor([tokenizer.encode(text)[:TOKENS]])
    with torch.inference_mode():
        ours, expected = model(tokens)[0], theirs(tokens).logits[0]
    largest = ((ours - expected).abs().amax(dim=-1) / expected.abs().amax(dim=-1)).aminmax()
    same = (ours.argmax(dim=-1) == expected.argmax(dim=-1)).sum().item()
    print(f"\nlogits of {TOKENS} tokens: off by {largest.min:.1e} to {largest.max:.1e} of a token's largest")
    print(f"{same} of {TOKENS} argmaxes equal")
    assert largest.max < 1e-4 and same == TOKENS


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text(model, theirs, tokenizer, prompt):
    ids = tokenizer.encode(prompt)
    said = theirs.generate(
        torch.tensor([ids]), max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = [token for (token,) in generate(model, [ids], 200)]
    print(f"\n200 greedy tokens after {prompt!r}: equal")
    assert ours == said[0, len(ids) :].tolist()


def test_chats(tokenizer, their_tokenizer):
    for chat in CHATS:
        for prompt in (True, False):
            expected = their_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert tokenizer.render_chat(chat, add_generation_prompt=prompt) == expected
            ids = their_tokenizer(expected, add_special_tokens=False).input_ids
            assert tokenizer.encode_chat(chat, add_generation_prompt=prompt) == ids
    print(f"\n{len(CHATS)} conversations: equal in text and ids")


def test_ids(tokenizer, their_tokenizer):
    """transformers reads no tokenizer.ggml.pre, which says that digits stand alone here; llama.cpp does."""
    differ = [text for text in texts() if tokenizer.encode(text) != their_tokenizer(text).input_ids]
    print(f"\nids of {len(texts())} texts: {len(texts()) - len(differ)} equal transformers'")
    assert all(re.search(r"\d\d", text) for text in differ)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts())


def test_bits_per_byte(tmp_path, tokenizer, text):
    """The file's own codes in int4 cost nothing; groups of 128 are rounded once more."""
    ids, found = tokenizer.encode(text), {}
    kinds = {
        "float32": (None, None),
        "bfloat16": (torch.bfloat16, None),
        "int8": (torch.bfloat16, Quantization("int8")),
        "int4, groups of 32": (torch.bfloat16, Quantization("int4", 32)),
        "int4, groups of 128": (torch.bfloat16, Quantization("int4", 128)),
    }
    print()
    for name, (dtype, quantization) in kinds.items():
        model = load_model(convert(FILE, out=tmp_path / name, dtype=dtype, quantization=quantization))
        nats, count = negative_log_likelihood(model, ids[:4096], window=1024, stride=512)
        num_bytes = len(tokenizer.decode(ids[: count + 1]).encode())
        found[name] = figures(nats, count, num_bytes)["bits_per_byte"]
        print(f"bits per byte of {num_bytes:,} bytes, {name}: {found[name]:.4f}")
    for name in ("bfloat16", "int8", "int4, groups of 32"):
        assert found[name] == pytest.approx(found["float32"], rel=0.01)
    assert found["int4, groups of 128"] < 1.2 * found["float32"]


# llama.cpp --------------------------------------------------------------------------------------------------


def test_llama_cpp_cuts_texts_alike(tokenizer):
    peer = llama_cpp_object(FILE, vocab_only=True)
    differ = [
        text for text in texts() if peer.tokenize(text.encode(), add_bos=False) != tokenizer.encode(text)
    ]
    print(f"\nids of {len(texts())} texts: {len(texts()) - len(differ)} equal llama.cpp's")
    assert not differ, differ[:3]


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_llama_cpp_continues_what_we_write_alike(folder, model, tokenizer, tmp_path, kind):
    """The model written as GGUF again: 300 texts have the same ids, three prompts the same greedy text."""
    pytest.importorskip("llama_cpp")
    from benchmarks.llama_cpp_peer import LlamaCpp

    path = export(folder, kind, out=tmp_path / f"{kind}.gguf")
    vocabulary = llama_cpp_object(path, vocab_only=True)
    for text in texts()[:300]:
        assert vocabulary.tokenize(text.encode(), add_bos=False) == tokenizer.encode(text)
    assert vocabulary.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    peer = LlamaCpp(str(path), threads=1, num_slots=256)
    peer.load()
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        assert peer.run([ids], 100)["tokens"][0] == [token for (token,) in generate(model, [ids], 100)]
    print(f"\n{kind} of ours in llama.cpp: 300 texts' ids, 100 greedy tokens of {len(PROMPTS)} prompts equal")
