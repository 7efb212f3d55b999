"""GGUF files: numbers against the gguf package's reader, the rest against what they were made from."""

import json
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import conversion.gguf_write as gguf_write
from benchmarks import gguf_file
from conversion import find
from conversion.convert import convert
from conversion.find import find_folder
from conversion.gguf import IN_BLOCKS, GGUFFile
from conversion.hub import fetch
from conversion.source import open_source
from conversion.weight_files import open_weights
from models import create_model, load_model
from models.utils.command_line import CHECKPOINTS
from models.utils.errors import UserError
from models.utils.quantize import Quantization, dequantize_int4, unpack
from models.utils.tokenizer import load_tokenizer
from tests.test_gguf_write import CONFIGS, SMALL

TEXTS = [
    "def f(x):\n    return 12345 + x  # 99 %\n", "", " ", "  two  spaces ", "it's 'quoted', they'LL see",
    "Ünïcödé 漢字 \t tab\r\n\r\n end", "a" * 50, "3.14159e-10", "<s> </s> <|im_start|>", "🙂🙃 x",
]  # fmt: skip


PRES = ("llama-bpe", "qwen2", "gpt-2", "smollm", "gpt-4o", "deepseek-v3")


def tensors_of(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


# Numbers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A file with a matrix (6, 512) of random blocks in each type, fp16 scales among them finite."""
    path = tmp_path_factory.mktemp("gguf") / "blocks.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    generator = np.random.default_rng(0)
    for name in IN_BLOCKS:
        kind = gguf.GGMLQuantizationType[name]
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        data = generator.integers(0, 256, (6, 512 // per_block * block_bytes), dtype=np.uint8)
        data &= 0b10111111 if name != "MXFP4" else 255  # no fp16 with all bits of its exponent set
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.add_tensor("F32", generator.standard_normal((3, 5), dtype=np.float32))
    writer.add_tensor("F16", generator.standard_normal((3, 5), dtype=np.float32).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", [*IN_BLOCKS, "F32", "F16"])
def test_every_type_is_what_the_package_says(blocks, name):
    file, theirs = GGUFFile(blocks), tensors_of(blocks)[name]
    with np.errstate(over="ignore"):  # scales of MXFP4 go up to 2^128
        ours, expected = (
            file.read(name),
            torch.tensor(gguf.quants.dequantize(theirs.data, theirs.tensor_type)),
        )
    assert ours.shape == expected.shape == file.entries[name].shape
    assert torch.equal(ours.float(), expected.float())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1"])
def test_int4_codes_are_the_file_s(blocks, name):
    codes, scale, zero = GGUFFile(blocks).read_int4(name)
    weights = scale[:, :, None] * (codes.view(6, 16, 32).float() - 8) + zero[:, :, None]
    expected = GGUFFile(blocks).read(name)
    torch.testing.assert_close(weights.view(6, 512), expected, rtol=1e-6, atol=1e-6 * expected.abs().max())
    assert GGUFFile(blocks).read_int4("Q8_0") is None


def test_the_worked_block_of_q4_k():
    """The example of conversion/gguf.py: D = 0.01, M = 0.02, s = 20, t = 30, code 9."""
    block = bytearray(144)
    block[0:4] = struct.pack("<ee", 0.01, 0.02)
    block[4], block[8] = 20, 30  # the first group's scale and minimum, whose upper bits stand elsewhere
    block[16] = 9
    weights = gguf.quants.dequantize(
        np.frombuffer(bytes(block), np.uint8)[None], gguf.GGMLQuantizationType.Q4_K
    )
    assert weights[0, 0] == pytest.approx(1.2, abs=2e-3) and weights[0, 1] == pytest.approx(-0.6, abs=2e-3)


# Models -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=SMALL)
def small(request):
    """(what reads it, model), every parameter redrawn, in a file as llama.cpp reads it."""
    model_name, fields = SMALL[request.param]
    model = create_model(CONFIGS[model_name], **fields)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model_name, model


def test_what_llama_cpp_reads_is_read_back_to_the_bit(small, tmp_path):
    model_name, model = small
    gguf_file.write_gguf(tmp_path / "x.gguf", model_name, model, "F32")
    convert(tmp_path / "x.gguf", out=tmp_path / "out")
    again = load_model(tmp_path / "out")
    tokens = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(1))
    if model_name == "transformer_lm":  # which is a Llama there
        difference = (again(tokens) - model(tokens)).abs().max()
        assert difference < 1e-5 * model(tokens).abs().max()
        return
    for field, value in vars(model.config).items():
        if field not in ("dropout", "tied_head", "rope_scaling"):
            assert getattr(again.config, field) == value, field
    if getattr(model.config, "rope_scaling", None):
        assert vars(again.config.rope_scaling) == pytest.approx(vars(model.config.rope_scaling), rel=1e-4)
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_qwen3(tmp_path):
    sizes = {"vocab_size": 96, "max_seq_len": 64, "d_model": 64, "num_layers": 2, "num_heads": 4}
    model = create_model("qwen3-0.6b", **sizes, num_kv_heads=2, head_dim=32, d_ff=96)
    gguf_file.write_gguf(tmp_path / "x.gguf", "qwen3", model, "F32")
    convert(tmp_path / "x.gguf", out=tmp_path / "out")
    again = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_codes_stay_as_they_are(tmp_path, monkeypatch, name, kind):
    """--quantize int4 of a file that is int4: the weights are those of the file, not rounded again."""
    model = create_model(CONFIGS[name], **SMALL[name][1])
    monkeypatch.setitem(gguf_write.TYPES, "Q4_0", gguf.GGMLQuantizationType[kind])
    gguf_file.write_gguf(tmp_path / "x.gguf", name, model, "Q4_0")
    convert(tmp_path / "x.gguf", out=tmp_path / "plain")
    convert(tmp_path / "x.gguf", out=tmp_path / "int4", quantization=Quantization("int4", 32))
    plain, codes = open_weights(tmp_path / "plain"), open_weights(tmp_path / "int4")
    layers = [name.removesuffix(".scale_zero") for name in codes.entries if name.endswith("scale_zero")]
    assert len(layers) >= 12
    for layer in layers:
        weight, packed = plain.read(f"{layer}.weight"), codes.read(f"{layer}.weight")
        scale_zero = codes.read(f"{layer}.scale_zero")
        torch.testing.assert_close(dequantize_int4(packed, scale_zero), weight, rtol=1e-6, atol=1e-7)
        # A group of Q4_0 has no zero of its own, which a search would have given it.
        assert kind == "Q4_1" or not scale_zero[..., 1].any()
        assert unpack(packed).max() == 15 and unpack(packed).min() == 0
    tokens = torch.randint(0, 96, (1, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        load_model(tmp_path / "int4")(tokens), load_model(tmp_path / "plain")(tokens), rtol=1e-3, atol=1e-4
    )


def test_without_out_it_goes_to_checkpoints_under_the_file_s_name(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "CHECKPOINTS", tmp_path / "checkpoints")
    gguf_file.write_gguf(
        tmp_path / "Tiny.Q8_0.gguf", "gpt2", create_model(CONFIGS["gpt2"], **SMALL["gpt2"][1]), "Q8_0"
    )
    assert convert(tmp_path / "Tiny.Q8_0.gguf") == tmp_path / "checkpoints" / "Tiny.Q8_0" / "converted"
    folder = tmp_path / "checkpoints" / "Tiny.Q8_0"
    assert load_model(folder).config.d_model == 64
    assert load_tokenizer(folder).encode("ab") == [2]
    assert json.loads((folder / "converted" / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def test_a_file_of_the_hub(tmp_path, monkeypatch):
    import conversion.hub as hub

    asked = []
    monkeypatch.setattr(hub, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(hub, "download", lambda *args: asked.append(args))
    place = fetch("owner/repository/some/Model.Q4_0.gguf")
    assert place == tmp_path / "Model.Q4_0" / "some/Model.Q4_0.gguf"
    assert asked == [("owner/repository", tmp_path / "Model.Q4_0", "some/Model.Q4_0.gguf")]


# Tokenizers -------------------------------------------------------------------------------------------------


def write_tokenizer(path, architecture="llama", **fields):
    """A GGUF file without tensors, with a tokenizer's fields."""
    writer = gguf.GGUFWriter(path, architecture)
    adders = {str: "string", bool: "bool", int: "uint32", list: "array"}
    for name, value in fields.items():
        name = "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}"
        getattr(writer, f"add_{adders[type(value)]}")(name, value)
    for name, value in {
        "block_count": 1,
        "context_length": 8,
        "embedding_length": 8,
        "feed_forward_length": 8,
    }.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_uint32(f"{architecture}.attention.head_count", 1)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_tokenizer(path, folder):
    folder.mkdir()
    for name, content in open_source(path).files.items():
        (folder / name).write_bytes(content)
    return load_tokenizer(folder)


def test_sentencepiece(tmp_path):
    """The tokenizer of tiny-llama-python by way of a GGUF file gives the same ids and texts."""
    theirs = load_tokenizer(CHECKPOINTS / "tiny-llama-python")
    core, size = theirs.core, theirs.core.vocab_size()
    kinds = [
        2 if core.is_unknown(id) else 3 if core.is_control(id) else 6 if core.is_byte(id) else 1
        for id in range(size)
    ]
    write_tokenizer(
        tmp_path / "x.gguf",
        model="llama",
        tokens=[core.id_to_piece(id) for id in range(size)],
        scores=[core.get_score(id) for id in range(size)],
        token_type=kinds,
        bos_token_id=1,
        eos_token_id=2,
        add_space_prefix=len(core.encode("a")) > 0 and core.id_to_piece(core.encode("a")[0]).startswith("▁"),
    )
    ours = read_tokenizer(tmp_path / "x.gguf", tmp_path / "out")
    samples = [
        *TEXTS,
        *Path(json.__file__).read_text().split("\n\n"),
        *Path(random.__file__).read_text().split("\n"),
    ]
    for text in samples[:300]:
        assert ours.encode(text)[1:] == theirs.core.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.core.encode(text))
    assert ours.encode("x")[0] == 1 and ours.special_tokens["</s>"] == 2


@pytest.mark.parametrize("pre, architecture", [("llama-bpe", "llama"), ("qwen2", "qwen2"), ("gpt-2", "gpt2")])
def test_byte_level_bpe(tmp_path, pre, architecture):
    """Ids as transformers gives them for the same file, with merges across digits and spaces."""
    tokens, merges = small_bpe()
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, "<|im_start|>", "<|im_end|>"],
        "merges": merges,
    }
    fields |= {
        "token_type": [1] * len(tokens) + [3, 3],
        "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 1,
    }
    fields |= {"add_bos_token": False, "chat_template": "{{ messages[0].content }}"}
    write_tokenizer(tmp_path / "x.gguf", architecture, **fields)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    ours = read_tokenizer(tmp_path / "x.gguf", tmp_path / "out")
    for text in TEXTS[:-2] + TEXTS[-1:]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.decode(ours.encode(text)) == text
    assert ours.chat_template == "{{ messages[0].content }}"
    assert ours.special_tokens["<|im_end|>"] == len(tokens) + 1


def test_digits_stand_alone(tmp_path):
    """As SmolLM cuts a text: no token of two digits, though the merges have some; words as GPT-2's."""
    tokens, merges = small_bpe()
    ids = {}
    for pre in ("smollm", "gpt-2"):
        write_tokenizer(tmp_path / f"{pre}.gguf", model="gpt2", pre=pre, tokens=tokens, merges=merges)
        ours = read_tokenizer(tmp_path / f"{pre}.gguf", tmp_path / pre)
        ids[pre] = [ours.decode([id]) for id in ours.encode("in 12345, self.x")]
    assert [piece for piece in ids["smollm"] if any(map(str.isdigit, piece))] == ["1", "2", "3", "4", "5"]
    assert "12345" in "".join(ids["gpt-2"]) and len(ids["gpt-2"]) < len(ids["smollm"])
    assert [piece for piece in ids["smollm"] if piece.isalpha()] == [p for p in ids["gpt-2"] if p.isalpha()]


def small_bpe():
    """(tokens, merges) of a byte-level BPE trained on a module of Python's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [Path(random.__file__).read_text()[:9000], "12345 678 99 3.14159 " * 9],
        trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False),
    )
    spec = json.loads(core.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    return tokens, [" ".join(pair) for pair in spec["merges"]]


def test_what_stands_around_a_text(tmp_path):
    tokens, merges = small_bpe()
    fields = {"model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "merges": merges}
    fields |= {"token_type": [3] + [1] * (len(tokens) - 1), "bos_token_id": 0, "eos_token_id": 1}
    write_tokenizer(tmp_path / "said.gguf", **fields, add_bos_token=False, add_eos_token=True)
    write_tokenizer(tmp_path / "silent.gguf", **fields)
    plain = read_tokenizer(tmp_path / "said.gguf", tmp_path / "said").encode("ab")
    assert plain[-1] == 1
    assert read_tokenizer(tmp_path / "silent.gguf", tmp_path / "silent").encode("ab") == [0, *plain[:-1]]


# Damaged and strange files ----------------------------------------------------------------------------------


def text(content):
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(content)) + content


def header(
    fields=(), tensors=(), magic=b"GGUF", version=3, num_fields=None, num_tensors=None, data=b"\0" * 64
):
    counts = struct.pack(
        "<IQQ", version, len(tensors) if num_tensors is None else num_tensors,
        len(fields) if num_fields is None else num_fields,
    )  # fmt: skip
    content = magic + counts + b"".join(fields) + b"".join(tensors)
    return content + b"\0" * (-len(content) % 32) + data


def tensor(name="x", dims=(4,), kind=0, at=0):
    return text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + struct.pack("<IQ", kind, at)


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")
FAULTS = {
    "empty": (b"", "empty|mmap"),
    "no magic": (header(magic=b"GGML"), "does not begin with GGUF"),
    "version": (header(version=1), "version 1"),
    "big-endian": (b"GGUF\0\0\0\3" + b"\0" * 60, "version"),
    "2^60 fields": (header(num_fields=2**60), "too short"),
    "2^60 tensors": (header(num_tensors=2**60), "too short"),
    "many fields": (header(num_fields=3), "too short|ends in the middle|does not exist|twice"),
    "2^60 in a list": (header([text("a") + struct.pack("<IIQ", 9, 5, 2**60)]), "too short"),
    "2^60 letters": (header([struct.pack("<Q", 2**60)], num_fields=1), "too short"),
    "lists in lists": (header([text("a") + struct.pack("<IIQ", 9, 9, 1)]), "list of type 9"),
    "type of a field": (header([text("a") + struct.pack("<I", 77)]), "type 77"),
    "no utf-8": (header([text("a") + struct.pack("<I", 8) + text(b"\xff\xfe")]), "no UTF-8"),
    "a field twice": (header([ARCHITECTURE, ARCHITECTURE]), "twice"),
    "a tensor twice": (header([ARCHITECTURE], [tensor(), tensor()]), "twice"),
    "alignment 0": (header([text("general.alignment") + struct.pack("<II", 4, 0)]), "alignment is 0"),
    "alignment 12": (header([text("general.alignment") + struct.pack("<II", 4, 12)]), "alignment is 12"),
    "outside": (header([ARCHITECTURE], [tensor(at=2**40)]), "does not lie in the file"),
    "beyond the end": (header([ARCHITECTURE], [tensor(dims=(2**30, 2**30))]), "does not lie in the file"),
    "between": (header([ARCHITECTURE], [tensor(at=4)]), "does not lie in the file"),
    "dimensions": (header([ARCHITECTURE], [tensor(dims=(1,) * 5)]), "5 dimensions"),
    "half a block": (header([ARCHITECTURE], [tensor(dims=(33,), kind=2)]), "whole number of blocks"),
    "type of a tensor": (header([ARCHITECTURE], [tensor(kind=99)]), "type 99"),
    "a type that is not read": (header([ARCHITECTURE], [tensor(dims=(256,), kind=16)]), "IQ2_XXS"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_one_line(tmp_path, fault):
    content, message = FAULTS[fault]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        convert(tmp_path / "x.gguf", out=tmp_path / "out")
    assert "\n" not in str(error.value) and str(tmp_path / "x.gguf") in str(error.value)
    assert not (tmp_path / "out").exists()


def test_random_damage_is_never_a_traceback(tmp_path):
    """400 files with bytes changed, or cut: a UserError, unless nothing that counts is hit."""
    gguf_file.write_gguf(
        tmp_path / "good.gguf", "llama", create_model(CONFIGS["llama"], **SMALL["llama"][1]), "Q8_0"
    )
    good, generator, refused = (tmp_path / "good.gguf").read_bytes(), random.Random(0), 0
    for n in range(400):
        damaged = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(6000)] = generator.choice(
                [0, 1, 127, 128, 255, generator.randrange(256)]
            )
        if n % 4 == 0:
            del damaged[generator.randrange(len(damaged)) :]
        (tmp_path / "x.gguf").write_bytes(damaged)
        try:
            open_source(tmp_path / "x.gguf")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).isprintable()
    assert refused > 150


def changed(tmp_path, **fields):
    """A whole small Llama whose file has other fields."""
    model = create_model(CONFIGS["llama"], **SMALL["llama"][1])
    given = gguf_write.model_fields
    with pytest.MonkeyPatch.context() as patch:
        more = {name.replace("__", "."): value for name, value in fields.items()}
        patch.setattr(gguf_write, "model_fields", lambda their: given(their) | more)
        gguf_file.write_gguf(tmp_path / "x.gguf", "llama", model, "F32")
    return tmp_path / "x.gguf"


def test_what_no_page_implements_is_named(tmp_path):
    for fields, message in [
        ({"llama__expert_count": 8}, "expert_count is 8"),
        ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"llama__flavour": 3.0}, "flavour is not known; .*: --allow flavour"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(changed(tmp_path, **fields))
    assert open_source(changed(tmp_path, llama__flavour=3.0), allow=["flavour"])


def test_wrong_calls(tmp_path):
    path = changed(tmp_path)
    (tmp_path / "other.gguf").write_bytes(
        header([text("general.architecture") + struct.pack("<I", 8) + text("rwkv7")])
    )
    (tmp_path / "notes.txt").write_text("notes")
    for call, message in [
        (lambda: convert(tmp_path / "missing.gguf"), "no such file"),
        (lambda: convert(tmp_path), "holds GGUF files; convert one of them: .*x.gguf"),
        (lambda: convert(tmp_path / "other.gguf"), "general.architecture is 'rwkv7'; read are .*gptneox"),
        (lambda: open_source(path, model="gpt2"), "is for models/llama.py; leave out --model gpt2"),
        (lambda: convert(path, calibration=tmp_path / "notes.txt"), "--calibrate"),
        (lambda: find_folder(str(tmp_path / "missing.gguf")), "no such file; one of the hub is fetched by"),
    ]:
        with pytest.raises(UserError, match=message):
            call()


def test_a_tokenizer_that_nobody_knows(tmp_path):
    tokens, merges = small_bpe()
    for fields, message in [
        ({"model": "rwkv"}, "tokenizer.ggml.model is 'rwkv'"),
        ({"model": "gpt2", "pre": "klingon"}, "cuts texts as 'klingon' does"),
        ({"model": "gpt2", "token_type": [1, 1]}, "differ in number"),
        ({"model": "gpt2", "merges": ["ab"]}, "broken merges"),
        ({"model": "gpt2", "tokens": [1, 2]}, "tokenizer.ggml.tokens is no list of str"),
    ]:
        write_tokenizer(tmp_path / "x.gguf", **{"tokens": tokens, "merges": merges, **fields})
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / "x.gguf")
