"""Tokenizers and whole checkpoints written as GGUF: the same ids and text by our reader and llama.cpp."""

import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gguf_file import write_gguf
from benchmarks.weights import redrawn
from conversion import find
from conversion.checkpoint import read_or_convert
from conversion.convert import convert
from conversion.gguf import GGUFFile
from conversion.gguf_vocabulary import vocabulary_fields
from conversion.gguf_write import export
from conversion.gguf_write import write_gguf as write_file
from conversion.source import open_source
from conversion.weight_files import open_weights
from models import config_to_dict, create_model, load_model
from models.utils.command_line import CHECKPOINTS
from models.utils.errors import UserError
from models.utils.files import read_json
from models.utils.quantize import Quantization, dequantize_mxfp4
from models.utils.tokenizer import load_tokenizer
from runs_ar.generate import generate
from tests.test_gguf import PRES, TEXTS, read_tokenizer, small_bpe, write_tokenizer
from tests.test_gguf_write import (
    LLAMA,
    MOE,
    NEWER,
    PROMPT,
    SIZES,
    llama_cpp_object,
    llama_cpp_says,
    newer,
    read,
)

HELD_OUT = [
    *TEXTS,
    *Path(json.__file__).read_text().split("\n"),
    *Path(random.__file__).read_text().split("\n\n"),
]
HELD_OUT = [text for text in HELD_OUT if "<|im_start|>" not in text][:300]


def llama_cpp_ids(path, texts):
    """What llama.cpp makes of texts with the vocabulary of a file, with what stands around them."""
    peer = llama_cpp_object(path, vocab_only=True)
    return [peer.tokenize(text.encode(), add_bos=True, special=False) for text in texts]


# Checkpoints ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny checkpoints, converted when asked for."""
    folder, done = tmp_path_factory.mktemp("tiny"), {}

    def find(name):
        if name not in done:
            done[name] = convert(CHECKPOINTS / name, out=folder / name, dtype=torch.float32, progress=False)
        return done[name]

    return find


def test_a_checkpoint_goes_out_and_comes_back(tiny, tmp_path):
    """Every tensor, every id of 300 texts, and the chat template."""
    folder = tiny("tiny-llama-python")
    template = "{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(template)
    path = export(folder, "F32", out=tmp_path / "x.gguf", progress=False)
    (folder / "chat_template.jinja").unlink()
    again = convert(path, out=tmp_path / "again", progress=False)
    ours, theirs = load_model(folder).state_dict(), load_model(again).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    before, after = load_tokenizer(folder), load_tokenizer(again)
    assert len(HELD_OUT) == 300 and after.chat_template == template
    for text in HELD_OUT:
        assert after.encode(text) == before.encode(text)
    assert (after.bos_id, after.eos_id) == (before.bos_id, before.eos_id)
    assert read_json(folder / "config.json") == read_json(again / "config.json")


@pytest.mark.parametrize("kind", ["F32", "F16"])
@pytest.mark.parametrize(
    "name", ["tiny-llama-python", "tiny-gpt2-python", "tiny-moe-python", "tiny-gemma-python"]
)
def test_llama_cpp_loads_what_is_written(tiny, tmp_path, name, kind):
    """The same ids of 300 texts, and the same greedy text."""
    pytest.importorskip("llama_cpp")
    from benchmarks.llama_cpp_peer import LlamaCpp

    folder = tiny(name)
    path, tokenizer, model = (
        export(folder, kind, out=tmp_path / f"{kind}.gguf"),
        load_tokenizer(folder),
        load_model(folder),
    )
    if kind == "F32":
        assert llama_cpp_ids(path, HELD_OUT) == [tokenizer.encode(text) for text in HELD_OUT]
    peer = LlamaCpp(str(path), threads=1, num_slots=128)
    peer.load()
    ids = tokenizer.encode("def main(argv):\n    ")
    assert peer.run([ids], 40)["tokens"][0] == [token for (token,) in generate(model, [ids], 40)]


# What transformers reads of it, for which the constants that it does not read must be those of its silence.
GEMMA = {**NEWER["gemma3"][1], "num_layers": 7, "full_every": 6, "num_heads": 2, "num_kv_heads": 1}
GEMMA |= {"head_dim": 256, "score_scale": 256, "rope_factor": 1.0, "local_rope_base": 10000.0}
READ_BY_TRANSFORMERS = {
    "llama": ("tiny-llama-python", LLAMA),
    "gpt2": ("tiny-gpt2-python", {**SIZES, "num_heads": 4, "d_ff": 256, "max_seq_len": 1024}),
    "qwen3": ("qwen3-0.6b", {**SIZES, "num_heads": 2, "num_kv_heads": 1}),
    "qwen3_moe": ("tiny-moe-python", {**MOE, "d_expert": 768}),
    "gemma3": ("gemma-3-1b", GEMMA),
}


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_what_is_written(tmp_path, name):
    config, fields = READ_BY_TRANSFORMERS[name]
    model = redrawn(create_model(config, **fields))
    write_gguf(tmp_path / "x.gguf", name, model, "F32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32).eval()
    tokens = torch.tensor([PROMPT * 3])
    with torch.inference_mode():
        ours, expected = model(tokens), theirs(tokens).logits
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


# MXFP4 ------------------------------------------------------------------------------------------------------


def test_the_codes_of_gpt_oss_go_in_and_out(tmp_path):
    """A file as the gguf package rounds it: codes are kept, mean what the package says, and go out again."""
    model_name, model = newer("gpt_oss")
    rounded = tmp_path / "F32.gguf"
    write_mxfp4(rounded, model_name, model)
    folder = convert(rounded, out=tmp_path / "codes", progress=False)
    assert read_json(folder / "config.json")["quantization"] == {"kind": "mxfp4", "group_size": 32}
    codes, expected = open_weights(folder), read(rounded)
    for n, layer in enumerate(model.layers):
        for e, expert in enumerate(layer.ffn.experts):
            for part in ("gate", "up", "down"):
                name = f"layers.{n}.ffn.experts.{e}.{part}_proj"
                packed, scale = codes.read(f"{name}.weight"), codes.read(f"{name}.scale")
                weight = expected[f"blk.{n}.ffn_{part}_exps.weight"][e]
                assert torch.equal(dequantize_mxfp4(packed, scale, torch.float32), weight)
                getattr(expert, f"{part}_proj").weight.data.copy_(weight)
    again = GGUFFile(export_without_tokenizer(folder, tmp_path / "again.gguf"))
    for name, tensor in GGUFFile(rounded).tensors.items():
        if tensor.type == "MXFP4":
            assert again.tensors[name].type == "MXFP4"
            assert again.bytes_of(again.tensors[name]) == GGUFFile(rounded).bytes_of(tensor), name
    logits, _ = llama_cpp_says(str(rounded))
    expected = model(torch.tensor([PROMPT]))[0, -1]
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


def write_mxfp4(path, model_name, model):
    """The file of gguf_write.py, but its experts rounded by the gguf package to MXFP4."""
    write_gguf(path, model_name, model, "F32")
    reader = gguf.GGUFReader(path)
    tensors = [(t.name, np.array(t.data), t.tensor_type) for t in reader.tensors]
    writer = gguf.GGUFWriter(path, "gpt-oss")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0])
    kind = gguf.GGMLQuantizationType.MXFP4
    for name, data, stored in tensors:
        is_expert = name.endswith("_exps.weight")
        data = gguf.quants.quantize(data, kind) if is_expert else data
        writer.add_tensor(name, data, raw_dtype=kind if is_expert else stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def export_without_tokenizer(folder, path):
    from benchmarks.gguf_file import vocabulary

    config = read_json(folder / "config.json")
    read = open_weights(folder).read
    write_file(path, "gpt_oss", config, read, vocabulary(96), "F32", Quantization("mxfp4", 32))
    return path


# Tokenizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", PRES)
def test_byte_level_bpe(tmp_path, pre):
    """Read, written and read again: the same fields; llama.cpp cuts texts as we do."""
    tokens, merges = small_bpe()
    fields = {"model": "gpt2", "pre": pre, "tokens": [*tokens, "<|end|>", "<|user|>"], "merges": merges}
    fields |= {"token_type": [1] * len(tokens) + [3, 4], "eos_token_id": len(tokens), "add_bos_token": False}
    write_tokenizer(tmp_path / "x.gguf", **fields)
    ours = read_tokenizer(tmp_path / "x.gguf", tmp_path / "out")
    written = vocabulary_fields(tmp_path / "out", {"vocab_size": len(tokens) + 5})
    for name, value in fields.items():
        padding = {"tokens": [f"[PAD{len(tokens) + n}]" for n in (2, 3, 4)], "token_type": [5] * 3}.get(
            name, []
        )
        assert written[f"tokenizer.ggml.{name}"] == (value + padding if padding else value), name
    texts = [text for text in HELD_OUT if text]
    expected = [ours.encode(text) for text in texts]
    assert llama_cpp_ids(tmp_path / "x.gguf", texts) == expected


def test_several_tokens_end_a_text(tmp_path):
    """Llama 3's three: what ends a text, a tool's turn and a turn."""
    tokens, merges = small_bpe()
    fields = {"model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "merges": merges, "add_bos_token": False}
    write_tokenizer(tmp_path / "x.gguf", **fields, eos_token_id=1)
    read_tokenizer(tmp_path / "x.gguf", tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").write_text('{"eos_token_id": [1, 5, 7]}')
    written = vocabulary_fields(tmp_path / "out", {"vocab_size": len(tokens)})
    ends = {name: written[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eom", "eot")}
    assert ends == {"eos": 1, "eom": 5, "eot": 7}
    write_tokenizer(tmp_path / "y.gguf", **fields, **{f"{name}_token_id": id for name, id in ends.items()})
    assert open_source(tmp_path / "y.gguf").generation == {"eos_token_id": [1, 5, 7]}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT without a head, with the vocabulary of tiny-bert-python, as a folder; (folder, model)."""
    folder = tmp_path_factory.mktemp("bert") / "encoder"
    convert(CHECKPOINTS / "tiny-bert-python", out=folder, progress=False)
    sizes = {**SIZES, "vocab_size": read_json(folder / "config.json")["vocab_size"], "num_heads": 4}
    model = redrawn(create_model("tiny-bert-python", **sizes, head=None, pooler=True))
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_to_dict("bert", model.config)))
    return folder, model


def test_a_sentence_encoder(encoder, tmp_path, capsys):
    folder, model = encoder
    path = export(folder, "F32", out=tmp_path / "x.gguf", progress=False)
    assert "left out: 2 tensors of what tells whether two texts belong together" in capsys.readouterr().err
    again = convert(path, out=tmp_path / "again", progress=False)
    before, after = load_tokenizer(folder), load_tokenizer(again)
    for text in HELD_OUT:
        assert after.encode(text) == before.encode(text)
    state = load_model(again).state_dict()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items() if not n.startswith("pooler"))
    assert read_json(again / "1_Pooling" / "config.json") == {"pooling_mode_mean_tokens": True}
    peer = llama_cpp_object(path, embedding=True, n_ctx=64)
    text = "return the length of a list"
    vector = torch.tensor(peer.embed(text))
    expected = load_model(again)(torch.tensor([after.encode(text)]))[0].mean(dim=0)
    assert torch.cosine_similarity(vector, expected, dim=0) > 0.9999


# What is refused --------------------------------------------------------------------------------------------


def test_tokenizers_that_cannot_be_written(encoder, tmp_path):
    lines = Path(random.__file__).read_text().split("\n")
    for name, options, message in [
        ("unigram", {"model_type": "unigram"}, "chooses pieces by probability"),
        ("nfkc", {"model_type": "bpe"}, "normalises texts, drops spaces"),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        options |= {"vocab_size": 200, "hard_vocab_limit": False, "minloglevel": 2}
        prefix = str(folder / "tokenizer")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=prefix, **options
        )
        with pytest.raises(UserError, match=message):
            vocabulary_fields(folder, {"vocab_size": 300})
    tokens, merges = small_bpe()
    write_tokenizer(tmp_path / "x.gguf", model="gpt2", pre="gpt-2", tokens=tokens, merges=merges)
    read_tokenizer(tmp_path / "x.gguf", tmp_path / "bpe")
    with pytest.raises(UserError, match="more than the 9 tokens of the model"):
        vocabulary_fields(tmp_path / "bpe", {"vocab_size": 9})
    spec = read_json(tmp_path / "bpe" / "tokenizer.json")
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "WhitespaceSplit"}, spec["pre_tokenizer"]],
    }
    (tmp_path / "bpe" / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="in a way that llama.cpp has no name for"):
        vocabulary_fields(tmp_path / "bpe", {"vocab_size": 900})
    folder, model = encoder
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(UserError, match="keeps capitals or accents"):
        vocabulary_fields(folder, {"vocab_size": model.config.vocab_size})


def test_checkpoints_that_cannot_be_written(tmp_path):
    folder = convert(
        CHECKPOINTS / "tiny-llama-python-draft", out=tmp_path / "int8", quantization=Quantization("int8")
    )
    for call, message in [
        (lambda: export(folder, "F16"), "is int8, and what rounding took is gone"),
        (
            lambda: export(CHECKPOINTS / "tiny-vit-digits", "F16"),
            "llama.cpp has no model like vision_transformer",
        ),
        (lambda: export(CHECKPOINTS / "tiny-bert-python", "F16"), "no BERT with the head masked_lm"),
        (lambda: export("tiny-llama-python", "F16", out=tmp_path / "x.bin"), "is no name of a .gguf file"),
        (lambda: export("no-such-checkpoint", "F16"), "no such checkpoint"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


# A file that is run -----------------------------------------------------------------------------------------


def test_a_file_is_converted_when_it_is_run(tmp_path, monkeypatch):
    """Once; again when another file has its name, and not when it was converted by hand."""
    monkeypatch.setattr(find, "CHECKPOINTS", tmp_path / "checkpoints")
    path, other = tmp_path / "Tiny.gguf", tmp_path / "other" / "Tiny.gguf"
    other.parent.mkdir()
    write_gguf(path, "llama", redrawn(create_model("tiny-llama-python", **LLAMA)), "F32")
    write_gguf(other, "llama", redrawn(create_model("tiny-llama-python", **LLAMA), seed=1), "F32")
    folder, fields = read_or_convert(path)
    assert folder == tmp_path / "checkpoints" / "Tiny" / "converted" and fields["model"] == "llama"
    first, when = load_model(folder).lm_head.weight, (folder / "config.json").stat().st_mtime_ns
    read_or_convert(path)
    assert (folder / "config.json").stat().st_mtime_ns == when
    assert not torch.equal(load_model(read_or_convert(other)[0]).lm_head.weight, first)
    convert(path, quantization=Quantization("int8"), progress=False)
    assert read_or_convert(path)[1]["quantization"]["kind"] == "int8"
