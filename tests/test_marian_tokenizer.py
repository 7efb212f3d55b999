"""Proof of models/utils/tokenizers/marian.py, against `transformers`' MarianTokenizer.

Small tokenizers of the published layout are trained here on the spot: one as opus-mt has it (unigram, no byte
fallback, language codes), and some that cut with BPE and fall back to bytes.
"""

import shutil
import sys
import types

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.utils.errors import UserError
from models.utils.tokenizer import load_tokenizer
from tests.tiny_marian import CODES, KINDS, SOURCE_TEXT, TARGET_TEXT, write_tokenizer

SAMPLES = [
    "", " ", "   ", "a", "Hello world", "The garden needs water.", *SOURCE_TEXT.splitlines(), SOURCE_TEXT,
    "Привет, как дела? 你好,世界。吾輩は猫である。 مرحبا بالعالم नमस्ते ภาษาไทย",
    "👍🏽 👨‍👩‍👧‍👦 e\u0301 \u200b\ufeff ﬁne ½ Ａｂｃ ①",
    "  leading", "trailing  ", "a  b   c", "\n\n", "\ttabs\tinside", "a\r\nb\rc", "\u00a0\u2003\u3000x",
    "\x00\x7f", "0\x850", "><<", "<<", ">><<",
    ">>fra<< Hello world", ">>fra<<Hello", ">>zho_Hans<<   the garden", ">>rus<<", ">>xyz<< no such code",
    " >>fra<< not in front", "the >>fra<< house", ">>fra<<>>rus<< twice", ">>fra<< >>rus<< twice", ">> x",
    "</s>", "<pad> <unk> </s>x<s>", "the </s> house <pad>", ">>fra<< </s>", "▁", "▁▁the ▁house", "<0x41>",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("marian")
    return {name: write_tokenizer(base / name, name) for name in KINDS}


@pytest.fixture(scope="module")
def pairs(folders):
    """name -> (the oracle, ours)"""
    return {
        name: (transformers.MarianTokenizer.from_pretrained(folder), load_tokenizer(folder))
        for name, folder in folders.items()
    }


def oracle_ids(oracle, text):
    """`transformers` with the option that keeps what looks like a special token plain text."""
    return oracle(text, split_special_tokens=True).input_ids


def oracle_text(oracle, ids):
    return oracle.decode(ids, skip_special_tokens=True, use_source_tokenizer=False)


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return "".join([stream.push(id) for id in ids] + [stream.finish()])


# Ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opus", "bytes"])
def test_ids_equal_the_oracle(pairs, name):
    oracle, ours = pairs[name]
    for text in SAMPLES:
        assert ours.encode(text) == oracle_ids(oracle, text), text


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60) | st.text("<>/spadfrazho_ \n▁éпa你ou'", max_size=40))
@pytest.mark.parametrize("name", ["opus", "bytes"])
def test_ids_of_any_text_equal_the_oracle(pairs, name, text):
    oracle, ours = pairs[name]
    if text.startswith(">>") and any(character.isspace() for character in text.partition("<<")[0]):
        return  # the one difference, see below
    ids = ours.encode(text)
    assert ids == oracle_ids(oracle, text)
    assert ours.decode(ids) == oracle_text(oracle, ids)
    assert streamed(ours, ids) == ours.decode(ids)


def test_target_ids_equal_the_oracle(pairs):
    for oracle, ours in (pairs["opus"], pairs["bytes"]):
        for text in [*TARGET_TEXT.splitlines(), *SAMPLES]:
            # With text_target the oracle looks for a code as well, which a target has not.
            if not text.startswith(">>"):
                expected = oracle(text_target=text, split_special_tokens=True).input_ids
                assert ours.encode_target(text) == expected, text
    ours = pairs["opus"][1]
    assert ours.encode("Le renard brun") != ours.encode_target("Le renard brun")


def test_each_text_ends_with_eos_and_nothing_stands_in_front(pairs):
    _, ours = pairs["opus"]
    assert ours.encode("") == [ours.eos_id] == [0]
    assert ours.encode("a")[-1] == ours.eos_id and ours.eos_id not in ours.encode("a", bos=False)
    # generation_config.json names a BOS id, which nothing uses.
    assert ours.bos_id is None
    with pytest.raises(UserError, match="no BOS"):
        ours.encode("a", bos=True)
    assert ours.pad_id == ours.vocab_size - 1 and ours.unk_id == 1
    assert ours.special_tokens == {"</s>": 0, "<pad>": ours.pad_id}


# Special tokens ---------------------------------------------------------------------------------------------


def test_a_language_code_counts_in_front_only(pairs):
    _, ours = pairs["opus"]
    code = ours.id_of(">>fra<<")
    assert ours.language_codes == CODES
    assert ours.encode(">>fra<< the house") == [code, *ours.encode("the house")]
    for text in ("the >>fra<< house", " >>fra<< the house", ">>rus<< >>fra<< the house"):
        assert code not in ours.encode(text)
    assert ours.encode(">>xyz<< the house") == [ours.unk_id, *ours.encode("the house")]


def test_a_quotation_is_no_language_code(pairs):
    """`transformers` makes one <unk> of all that stands before "<<"; no text is lost here."""
    oracle, ours = pairs["opus"]
    text = ">> the garden needs water << she said"
    assert oracle_ids(oracle, text)[0] == oracle.unk_token_id
    assert "garden needs water" in ours.decode(ours.encode(text))


@pytest.mark.parametrize("name", KINDS)
def test_typed_special_tokens_stay_text(pairs, name):
    oracle, ours = pairs[name]
    for text in (
        "</s>",
        "<pad>",
        "a </s> b <pad>",
        "12 >>fra<< 3",
        ">>rus<< </s>",
        "12 </s>",
        "12</s><pad>34",
    ):
        ids = ours.encode(text)
        assert ids[-1] == ours.eos_id and not {ours.eos_id, ours.pad_id} & set(ids[:-1]), text
        assert ours.id_of(">>fra<<") not in ids or not ours.language_codes
    if name == "digits":
        # Here sentencepiece itself spells a piece "</s>"; without care it is the end of the text.
        assert oracle_ids(oracle, "</s>").count(ours.eos_id) == 2
        assert oracle_ids(oracle, "12 >>fra<<")[-2] == ours.id_of(">>fra<<")


# Text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=st.lists(st.integers(0, 10**6), max_size=25))
def test_text_of_any_ids_equals_the_oracle(pairs, name, numbers):
    oracle, ours = pairs[name]
    ids = [number % ours.vocab_size for number in numbers]
    assert ours.decode(ids) == oracle_text(oracle, ids)
    assert streamed(ours, ids) == ours.decode(ids)


def test_text_of_target_pieces_that_the_source_model_lacks(pairs):
    for name in ("opus", "bytes"):
        _, ours = pairs[name]
        text = "Où est la gare ? Привет, как дела?"
        assert ours.decode(ours.encode_target(text)) == text


def test_spaces_and_bytes_wait_for_what_follows(pairs):
    _, ours = pairs["opus"]
    stream = ours.stream()
    assert [stream.push(ours.id_of(piece)) for piece in ("▁", "a", "▁", "s")] == ["", "a", "", " s"]
    assert stream.push(ours.id_of("▁")) == stream.finish() == ""
    _, ours = pairs["bytes"]
    stream = ours.stream()
    ids = [ours.id_of(f"<0x{byte:02X}>") for byte in "猫".encode()]
    assert [stream.push(id) for id in ids] == ["", "", "猫"]
    assert [ours.token_bytes(id) for id in ids] == [bytes([byte]) for byte in "猫".encode()]
    assert ours.token_bytes(ours.eos_id) is None and ours.token_bytes(ours.id_of("▁the")) == b" the"


# Punctuation ------------------------------------------------------------------------------------------------


def test_the_oracle_never_normalises_punctuation(folders, pairs, monkeypatch):
    """What the docstring says of sacremoses: a normaliser that would ruin every text is never called."""

    class MosesPunctNormalizer:
        def __init__(self, language):
            self.normalize = lambda text: "ruined"

    monkeypatch.setitem(
        sys.modules, "sacremoses", types.SimpleNamespace(MosesPunctNormalizer=MosesPunctNormalizer)
    )
    oracle = transformers.MarianTokenizer.from_pretrained(folders["opus"])
    assert oracle.normalize("“a”") == "ruined"
    for text in ("“Hello” – it’s 10 €…", "«a» , b ;"):
        assert oracle_ids(oracle, text) == pairs["opus"][1].encode(text)


# Bad input --------------------------------------------------------------------------------------------------


def broken(folder, target, file, content):
    shutil.copytree(folder, target)
    if content is None:
        (target / file).unlink()
    else:
        (target / file).write_bytes(content)
    return target


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("target.spm", None, "target.spm: no such file"),
        ("source.spm", b"", "no sentencepiece model"),
        ("target.spm", b"version https://git-lfs.github.com/spec/v1\n", "no sentencepiece model"),
        ("vocab.json", b'{"a": 0', "JSON"),
        ("vocab.json", b'{"</s>": 0, "<unk>": 1, "<pad>": 3}', "0, 1, 2"),
        ("vocab.json", b'{"</s>": 0, "<unk>": 0, "<pad>": 1}', "0, 1, 2"),
        ("vocab.json", b'{"</s>": 0, "<unk>": "1", "<pad>": 2}', "0, 1, 2"),
        ("vocab.json", b'{"</s>": 0, "<unk>": 1}', "pad_token '<pad>' is missing"),
        ("target_vocab.json", b"{}", "target_vocab.json"),
        ("tokenizer_config.json", b'{"separate_vocabs": true}', "target_vocab.json"),
        ("tokenizer_config.json", b'{"eos_token": "<end>"}', "eos_token '<end>' is missing"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"999": {"content": "<new>"}}}', "<new>"),
    ],
)
def test_broken_files(folders, tmp_path, file, content, message):
    folder = broken(folders["opus"], tmp_path / "copy", file, content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_bad_ids_and_texts(pairs):
    _, ours = pairs["opus"]
    for id in (-1, ours.vocab_size):
        with pytest.raises(UserError, match=f"token id {id} "):
            ours.decode([id])
    for encode in (ours.encode, ours.encode_target):
        with pytest.raises(UserError, match="surrogate"):
            encode("half \ud83d")


def test_no_tokenizer_without_the_vocabulary(folders, tmp_path):
    folder = broken(folders["opus"], tmp_path / "copy", "vocab.json", None)
    with pytest.raises(UserError, match="vocab.json with merges.txt or source.spm"):
        load_tokenizer(folder)


def test_added_tokens_as_transformers_saves_them(folders, pairs, tmp_path):
    """tokenizer_config.json after save_pretrained lists the special tokens again."""
    oracle, ours = pairs["opus"]
    oracle.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in SAMPLES:
        assert again.encode(text) == ours.encode(text)
