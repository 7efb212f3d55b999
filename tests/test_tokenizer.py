"""Proof of models/utils/tokenizer.py and of tokenizers/: settings.py, chat_template.py and the kinds.

Small tokenizers of every kind are trained here on the spot, written as a checkpoint would hold them, and
compared with the libraries themselves and with `transformers`.
"""

import base64
import io
import json
import os
import re
import sys
import threading
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter

from models.utils.errors import UserError
from models.utils.tokenizer import load_tokenizer
from models.utils.tokenizers import chat_template, tiktoken_ranks
from models.utils.tokenizers.tiktoken_ranks import TiktokenTokenizer, read_ranks

MULTILINGUAL = """The quick brown fox isn't lazy; it's 12345 years old, they'll say.
Größe, façade, naïve, œuvre. Привет, как дела? Γειά σου Κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया
你好,世界。吾輩は猫である。한국어도 됩니다. Tiếng Việt có dấu. ภาษาไทย
"""
CORPUS = [path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py"))] + [MULTILINGUAL] * 5

SAMPLES = [
    "",
    " ",
    "a",
    "Hello world",
    *MULTILINGUAL.splitlines(),
    MULTILINGUAL,
    "👍🏽 👨‍👩‍👧‍👦 🇨🇭 e\u0301 \u200b\ufeff \U0001f600",
    "  leading", "trailing  ",
    "a  b   c    d", "\n\n\n", "\t\ttabs\tinside", "a\r\nb\rc", "\u00a0\u2003\u3000x",
    "def f(x):\n    if x:\n        return {'a': [1, 2.5e-3]}  # comment\n\n\nclass A: pass\n",
    "1234567890 0.000001 1,000,000",
    "it's IT'S we'Ll",
    "\x00\x01\x7f",
    "ﬁne ½ Ａｂｃ ①",
    "<s> </s> <unk> <|endoftext|> <|eot_id|> <|im_end|>user <0x41> ▁",
    "<|begin_of_text|><|end_of_text|>[CLS] [SEP]",
    "word " * 500 + "x" * 500 + " " * 500,
]  # fmt: skip

CHAT = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": 'What is 2 + 2?\n\nShow <b>it</b>: "quoted"'},
    {"role": "assistant", "content": "4 👍"},
    {"role": "user", "content": "  And 你好?  "},
]

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}
    {% if 'tool_calls' in message %}
[calls]
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{% endif %}"""

LLAMA_3 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%Y') + '\n' }}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}{% continue %}{% endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content | tojson }}{{- '<|eot_id|>' }}{% endgeneration %}
    {%- else %}
        {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' ~ message.content ~ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

LLAMA_2 = """{% if messages[0]['role'] == 'system' %}
{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}
{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{% for turn in turns %}
{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant') }}
{% endif %}
{% if turn['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system if loop.first else '') + turn['content'].strip() + ' [/INST]' }}
{% else %}
{{ ' ' + turn['content'].strip() + ' ' + eos_token }}
{% endif %}
{% endfor %}"""


# ---- the folders ---------------------------------------------------------------------------------


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def train_sentencepiece(**options):
    model = io.BytesIO()
    lines = [line for text in CORPUS for line in text.splitlines() if line.strip()]
    options = {"model_type": "bpe", "vocab_size": 800, "byte_fallback": True, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, character_coverage=0.98, minloglevel=2, **options
    )
    return model.getvalue()


# As this project's own checkpoints have it: what goes in comes out, byte for byte.
VERBATIM = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "user_defined_symbols": ["\n"],
}
SENTENCEPIECE_KINDS = {
    "sp-code": VERBATIM,
    "sp-llama-2": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "sp-nfkc-unigram": {"model_type": "unigram"},
    "sp-no-bytes": {"byte_fallback": False, "bos_id": -1},
}


def make_sentencepiece(folder, name):
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(**SENTENCEPIECE_KINDS[name]))
    write_json(folder / "tokenizer_config.json", {"chat_template": LLAMA_2})


def byte_level_bpe(split=None, vocab_size=700, special_tokens=()):
    core = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    core.pre_tokenizer = byte_level
    if split is not None:
        cut = pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special_tokens),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def alphabet():
    """The byte alphabet, from the library: each byte's character is what the pre-tokenizer makes of it."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def make_rank_file(folder):
    core, byte_of = byte_level_bpe(TiktokenTokenizer.pattern), alphabet()
    lines = []
    for token, rank in sorted(core.get_vocab().items(), key=lambda item: item[1]):
        content = bytes(byte_of[character] for character in token)
        lines.append(b"%s %d\n" % (base64.b64encode(content), rank))
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    write_json(folder / "tokenizer_config.json", {"chat_template": LLAMA_3})


def make_gpt2_files(folder):
    core = byte_level_bpe()
    core.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    write_json(folder / "vocab.json", vocab | {"<|endoftext|>": len(vocab)})
    write_json(folder / "tokenizer_config.json", {"model_max_length": 1024})


def make_gpt2_json(folder):
    core = byte_level_bpe(
        special_tokens=[AddedToken("<|endoftext|>", normalized=True), "<|im_start|>", "<|im_end|>"]
    )
    core.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": [{"name": "default", "template": CHATML}]}
    write_json(folder / "tokenizer_config.json", config)


def make_neox_json(folder):
    core = byte_level_bpe(special_tokens=["<|endoftext|>", "<|padding|>"])
    core.normalizer = normalizers.NFC()
    core.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    core.save(str(folder / "tokenizer.json"))
    extra = AddedToken("<|im_end|>", rstrip=True, lstrip=True, special=True, normalized=False)
    flags = {
        name: getattr(extra, name)
        for name in ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    }
    id = core.get_vocab_size()
    config = {"eos_token": "<|endoftext|>", "pad_token": "<|new|>", "added_tokens_decoder": {str(id): flags}}
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(CHATML)
    # Not meant to be read: added_tokens_decoder says that tokenizer_config.json is complete.
    write_json(folder / "special_tokens_map.json", {"eos_token": "<|padding|>"})


def make_llama3_json(folder):
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    core = byte_level_bpe(TiktokenTokenizer.pattern, special_tokens=names)
    core.model.ignore_merges = True
    begin = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", core.token_to_id("<|begin_of_text|>"))],
    )
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    core.enable_truncation(5)
    core.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": True,
    }
    write_json(folder / "tokenizer_config.json", config | {"chat_template": LLAMA_3})


def make_llama2_json(folder, metaspace=False):
    core = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if metaspace:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        limit_alphabet=150,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    core.train_from_iterator([line for text in CORPUS for line in text.splitlines()], trainer)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    content = json.loads(core.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # the bytes are ordinary tokens
    write_json(folder / "tokenizer.json", content)
    # Not meant to be read: tokenizer.json goes first.
    (folder / "tokenizer.model").write_bytes(b"broken")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    tokens = {"bos_token": {"content": "<s>", "lstrip": False, "rstrip": False, "normalized": False}}
    write_json(folder / "special_tokens_map.json", tokens | {"eos_token": "</s>", "unk_token": "<unk>"})
    (folder / "chat_template.jinja").write_text(LLAMA_2)


def make_bert_json(folder):
    core = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    core.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    )
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    core.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json", {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    )


JSON_KINDS = {
    "json-gpt-2": make_gpt2_json,
    "json-neox": make_neox_json,
    "json-llama-3": make_llama3_json,
    "json-llama-2": make_llama2_json,
    "json-llama-2-metaspace": lambda folder: make_llama2_json(folder, metaspace=True),
    "json-bert": make_bert_json,
}
MAKERS = {
    **{name: lambda folder, name=name: make_sentencepiece(folder, name) for name in SENTENCEPIECE_KINDS},
    **JSON_KINDS,
    "ranks": make_rank_file,
    "gpt-2-files": make_gpt2_files,
}
BYTE_LEVEL = ["json-gpt-2", "json-llama-3", "ranks", "gpt-2-files", "sp-code"]
folders = {}


@pytest.fixture(scope="module", autouse=True)
def small_rank_files():
    """Llama 3's own file has 128,000 ranks, and one with another number is refused."""
    number = byte_level_bpe(TiktokenTokenizer.pattern).get_vocab_size()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken_ranks, "NUM_RANKS", number)
        yield


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """The folder of a kind, made when first asked for."""

    def folder_of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            MAKERS[name](folders[name])
        return folders[name]

    return folder_of


@pytest.fixture(scope="session")
def loaded(folder_of):
    """The tokenizer of a kind, loaded once."""
    tokenizer_of = {}

    def loaded(name):
        if name not in tokenizer_of:
            tokenizer_of[name] = load_tokenizer(folder_of(name))
        return tokenizer_of[name]

    return loaded


def reference(folder, name):
    cls = transformers.GPT2Tokenizer if name == "gpt-2-files" else transformers.PreTrainedTokenizerFast
    return cls.from_pretrained(folder)


def sp_of(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def copy_of(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
any_text = st.text(max_size=40) | st.lists(st.sampled_from(SAMPLES[1:-1]), max_size=3).map("".join)


# ---- the same ids as the reference ---------------------------------------------------------------


@pytest.mark.parametrize("name", [*JSON_KINDS, "gpt-2-files"])
def test_ids_equal_transformers(folder_of, loaded, name):
    oracle, ours = reference(folder_of(name), name), loaded(name)

    @relaxed
    @given(any_text)
    def check(text):
        assert ours.encode(text) == oracle.encode(text, split_special_tokens=True)
        bare = oracle.encode(text, split_special_tokens=True, add_special_tokens=False)
        assert ours.encode(text, bos=False) == bare
        assert ours.decode(bare) == oracle.decode(
            bare, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    for text in SAMPLES:
        check.hypothesis.inner_test(text)
    check()
    assert ours.bos_id == oracle.bos_token_id and ours.eos_id == oracle.eos_token_id
    assert ours.vocab_size == len(oracle)


@pytest.mark.parametrize("name", SENTENCEPIECE_KINDS)
def test_ids_equal_sentencepiece(folder_of, loaded, name):
    oracle, ours = sp_of(folder_of(name)), loaded(name)

    @relaxed
    @given(any_text)
    def check(text):
        assert ours.encode(text, bos=False) == oracle.encode(text)
        assert ours.decode(ours.encode(text)) == oracle.decode(oracle.encode(text))

    for text in SAMPLES:
        check.hypothesis.inner_test(text)
    check()
    begin = [] if name == "sp-no-bytes" else [oracle.bos_id()]
    assert ours.encode("Hello") == begin + oracle.encode("Hello")
    assert ours.vocab_size == oracle.vocab_size() and ours.eos_id == oracle.eos_id()


def test_ids_equal_tiktoken(folder_of, loaded):
    path = folder_of("ranks") / "tokenizer.model"
    ranks, ours = read_ranks(path.read_bytes(), path), loaded("ranks")
    oracle = tiktoken.Encoding(
        "oracle", pat_str=TikTokenConverter(None).pattern, mergeable_ranks=ranks, special_tokens={}
    )
    converted = TikTokenConverter(str(path)).converted()

    @relaxed
    @given(any_text)
    def check(text):
        ids = ours.encode(text, bos=False)
        assert ids == oracle.encode_ordinary(text) == converted.encode(text).ids
        assert ours.encode(text) == [ours.bos_id, *ids]
        assert ours.decode(ids) == text

    for text in SAMPLES:
        check.hypothesis.inner_test(text)
    check()
    # Llama 3's own numbers, counted from the end of its 128,000 ranks.
    special = {name: id - len(ranks) for name, id in ours.special_tokens.items()}
    assert special["<|begin_of_text|>"] == 0 and special["<|end_of_text|>"] == 1
    assert special["<|start_header_id|>"] == 6 and special["<|end_header_id|>"] == 7
    assert special["<|eom_id|>"] == 8 and special["<|eot_id|>"] == 9 and special["<|python_tag|>"] == 10
    assert special["<|reserved_special_token_247|>"] == 255 and len(special) == 256
    assert ours.vocab_size == len(ranks) + 256


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_round_trip_is_exact(loaded, name):
    ours = loaded(name)

    @relaxed
    @given(any_text)
    def check(text):
        text = text.replace("▁", "_")  # sentencepiece's own sign for a space
        assert ours.decode(ours.encode(text)) == text
        assert b"".join(map(ours.token_bytes, ours.encode(text, bos=False))) == text.encode()

    for text in [*SAMPLES, *CORPUS]:
        check.hypothesis.inner_test(text)
    check()


@pytest.mark.parametrize("name", ["ranks", "sp-code", "json-gpt-2"])
def test_long_texts(loaded, name):
    """A million spaces overflow the stack of tiktoken's regular expressions."""
    for text in (" " * 1_000_000 + "x", "ab" * 300_000, "\n" * 500_000):
        assert loaded(name).decode(loaded(name).encode(text)) == text


# ---- special tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_text_never_becomes_a_special_token(loaded, name):
    ours = loaded(name)
    for token in ours.special_tokens:
        ids = ours.encode(f"a{token}b {token} {token}", bos=False)
        assert ours.special_ids.isdisjoint(set(ids) - {ours.id_of("<unk>"), ours.id_of("[UNK]")}), token


def test_user_defined_special_tokens_of_sentencepiece(tmp_path):
    """sentencepiece finds a user-defined symbol in any text; a special token among them is spelled out."""
    options = {**VERBATIM, "user_defined_symbols": ["\n", "<|im_start|>", "<|im_end|>"]}
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(**options))
    sp = sp_of(tmp_path)
    text = "a<|im_end|>b\n"
    assert sp.piece_to_id("<|im_end|>") in load_tokenizer(tmp_path).encode(text)

    token = {"content": "<|im_end|>", "special": True, "normalized": False}
    added = {
        str(sp.piece_to_id("<|im_end|>")): token,
        "805": {**token, "content": "<|think|>", "special": False},
    }
    config = {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "chat_template": CHATML}
    write_json(tmp_path / "tokenizer_config.json", config)
    ours = load_tokenizer(tmp_path)
    ids = ours.encode(text)
    assert ours.eos_id == sp.piece_to_id("<|im_end|>") and ours.eos_id not in ids
    assert ours.decode(ids) == text and ours.decode([ours.eos_id]) == ""
    assert (
        ours.vocab_size == 806
        and ours.decode([*ids, 805, *ids[1:]]) == "a<|im_end|>b\n<|think|>a<|im_end|>b\n"
    )
    chat = [{"role": "user", "content": "<|im_end|>"}]
    assert ours.encode_chat(chat).count(ours.eos_id) == 1


def test_added_tokens_that_are_not_special_match_in_text(loaded):
    ours = loaded("json-neox")
    assert ours.id_of(" " * 8) in ours.encode("x" + " " * 8 + "y")


def test_bos_and_eos_follow_the_configuration(folder_of, tmp_path):
    def load(name, **config):
        folder = copy_of(folder_of(name), tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}")
        write_json(folder / "tokenizer_config.json", config)
        return load_tokenizer(folder)

    plain = load("sp-code").encode("a", bos=False)
    assert load("sp-code").encode("a") == [1, *plain]
    assert load("sp-code", add_bos_token=False).encode("a") == plain
    assert load("sp-code", add_bos_token=False).encode("a", bos=True) == [1, *plain]
    assert load("sp-code", add_eos_token=True).encode("a") == [1, *plain, 2]
    assert load("sp-code", add_eos_token=True).encode("a", bos=False) == plain
    assert load("sp-code", bos_token=None).bos_id is None
    assert load("sp-code", bos_token="<nowhere>").bos_id is None
    assert load("ranks", add_bos_token=False).encode("a") == load("ranks").encode("a", bos=False)

    gpt2 = load("gpt-2-files")
    assert gpt2.encode("a") == gpt2.encode("a", bos=False)
    with_bos = load("gpt-2-files", add_bos_token=True)
    assert with_bos.encode("a") == gpt2.encode("a", bos=True) == [gpt2.bos_id, *gpt2.encode("a")]
    with pytest.raises(UserError, match="no BOS"):
        load("json-bert").encode("a", bos=True)


def test_a_null_bos_is_no_bos_whatever_the_model_s_files_say(folder_of, tmp_path):
    folder = copy_of(folder_of("json-gpt-2"), tmp_path / "copy")
    write_json(folder / "tokenizer_config.json", {"bos_token": None})
    write_json(folder / "config.json", {"bos_token_id": 3, "eos_token_id": 4})
    ours = load_tokenizer(folder)
    assert (ours.bos_id, ours.eos_id) == (None, 4)


@pytest.mark.parametrize("name", ["sp-code", "json-llama-2", "json-llama-3", "ranks"])
def test_a_bos_that_is_there_is_not_put_twice(loaded, name):
    ours = loaded(name)
    assert ours.encode("a", bos=True) == ours.encode("a") and ours.encode("a").count(ours.bos_id) == 1


@pytest.mark.parametrize("name", ["ranks", "sp-code"])
def test_of_two_special_tokens_the_longer_is_meant(folder_of, tmp_path, name):
    """One begins like the other: "<|im|>" and "<|im|>s"."""
    folder = copy_of(folder_of(name), tmp_path / "copy")
    start = load_tokenizer(folder).vocab_size
    tokens = {str(start): {"content": "<|im|>", "special": True}}
    tokens[str(start + 1)] = {"content": "<|im|>s", "special": True}
    template = "{{ messages[0].content }}<|im|>s<|im|>"
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": tokens, "chat_template": template})
    ids = load_tokenizer(folder).encode_chat([{"role": "user", "content": "x"}])
    assert [id - start for id in ids if id >= start] == [1, 0]


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_special_tokens_may_take_the_space_beside_them(folder_of, tmp_path, flags):
    folder = copy_of(folder_of("json-gpt-2"), tmp_path / "copy")
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.add_special_tokens([AddedToken("<mask>", special=True, normalized=True, **flags)])
    core.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"chat_template": "{{ messages[0].content }} <mask> b"})
    ours, chat = load_tokenizer(folder), [{"role": "user", "content": "a"}]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert ours.encode_chat(chat) == theirs.encode("a <mask> b", add_special_tokens=False)


def test_model_files_name_bos_and_eos_where_the_tokenizer_does_not(folder_of, tmp_path):
    folder = copy_of(folder_of("json-gpt-2"), tmp_path / "copy")
    (folder / "tokenizer_config.json").unlink()
    write_json(folder / "config.json", {"bos_token_id": 7, "eos_token_id": 8})
    assert (load_tokenizer(folder).bos_id, load_tokenizer(folder).eos_id) == (7, 8)
    write_json(folder / "generation_config.json", {"eos_token_id": [9, 8]})
    assert (load_tokenizer(folder).bos_id, load_tokenizer(folder).eos_id) == (7, 9)


def test_added_tokens_json(folder_of, tmp_path):
    """The oldest way to add tokens: a list of names and ids beside the vocabulary."""
    folder = copy_of(folder_of("sp-code"), tmp_path / "copy")
    write_json(folder / "added_tokens.json", {"<pad>": 800, "<note>": 801})
    write_json(folder / "special_tokens_map.json", {"pad_token": "<pad>"})
    ours = load_tokenizer(folder)
    assert ours.special_tokens["<pad>"] == 800 and ours.vocab_size == 802
    assert ours.decode([800, 801]) == "<note>"


# ---- streaming -----------------------------------------------------------------------------------


def stream(tokenizer, ids):
    streaming = tokenizer.stream()
    return [*map(streaming.push, ids), streaming.finish()]


@pytest.mark.parametrize("name", MAKERS)
def test_streamed_pieces_join_to_the_decoded_text(folder_of, loaded, name):
    ours = loaded(name)
    # Half of the ids are drawn from the bytes, where characters break.
    ids = st.integers(0, ours.vocab_size - 1) | st.integers(0, min(300, ours.vocab_size - 1))

    @settings(parent=relaxed, max_examples=150)
    @given(st.lists(ids, max_size=30))
    def check_any_ids(ids):
        assert "".join(stream(ours, ids)) == ours.decode(ids)

    @relaxed
    @given(any_text)
    def check_texts(text):
        ids = ours.encode(text)
        pieces = stream(ours, ids)
        assert "".join(pieces) == ours.decode(ids)
        assert "\ufffd" in ours.decode(ids) or not any("\ufffd" in piece for piece in pieces)

    check_any_ids()
    check_texts()


@pytest.mark.parametrize("name", [*JSON_KINDS, "gpt-2-files"])
def test_decode_of_any_ids_equals_transformers(folder_of, loaded, name):
    oracle, ours = reference(folder_of(name), name), loaded(name)

    @settings(parent=relaxed, max_examples=150)
    @given(st.lists(st.integers(0, ours.vocab_size - 1) | st.integers(0, 300), max_size=30))
    def check(ids):
        assert ours.decode(ids) == oracle.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    check()


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "sp-llama-2"])
def test_a_character_appears_with_its_last_byte(loaded, name):
    ours = loaded(name)
    streaming = ours.stream()
    ids = ours.encode("x👍", bos=False)
    pieces = [streaming.push(id) for id in ids]
    assert len(ids) >= 5 and pieces[-1] == "👍" and pieces[-4:-1] == ["", "", ""]


@pytest.mark.parametrize("name", ["json-llama-2", "json-bert", "sp-llama-2", "sp-nfkc-unigram"])
def test_streaming_costs_the_same_at_any_length(loaded, name, monkeypatch):
    """Counted in ids that are decoded; a stopwatch would measure the machine."""
    ours, decoded = loaded(name), []
    ours.stream().push(ours.anchor)
    decode = ours.decode
    monkeypatch.setattr(ours, "decode", lambda ids: decoded.extend(ids) or decode(ids))
    for text in ("word 👍 " * 100, "👍" * 200, "x" + "\n " * 300):
        ids = ours.encode(text)
        decoded.clear()
        stream(ours, ids)
        assert len(decoded) <= 4 * len(ids) + 4


# ---- chat ----------------------------------------------------------------------------------------


CHAT_KINDS = ["json-gpt-2", "json-neox", "json-llama-3", "json-llama-2", "json-llama-2-metaspace"]


@pytest.mark.parametrize("name", CHAT_KINDS)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_equals_transformers(folder_of, loaded, name, prompt):
    oracle, ours = reference(folder_of(name), name), loaded(name)
    for chat in (CHAT, CHAT[1:], [CHAT[1] | {"tool_calls": None}]):
        assert ours.render_chat(chat, prompt) == oracle.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=prompt
        )
        assert ours.encode_chat(chat, prompt) == oracle.apply_chat_template(
            chat, add_generation_prompt=prompt, return_dict=False
        )


@pytest.mark.parametrize("name", [*CHAT_KINDS, "ranks", "sp-llama-2"])
def test_messages_never_become_special_tokens(loaded, name):
    ours = loaded(name)
    special = [token for token in ours.special_tokens if token != "<unk>"]
    clean = [{"role": "user", "content": "x"}]
    count = [ours.encode_chat(clean).count(ours.special_tokens[token]) for token in special]
    for token in special:
        text = f"Say {token}{token} and <{token}> {special[0]}\U000f0000"
        ids = ours.encode_chat([{"role": "user", "content": text}])
        assert [ids.count(ours.special_tokens[token]) for token in special] == count
        assert text in ours.decode(ids)


@pytest.mark.parametrize("name", ["ranks", "sp-llama-2"])
def test_chat_without_tokenizer_json(folder_of, loaded, name):
    """The text between the template's special tokens is encoded by the library itself."""
    ours = loaded(name)
    template = {"ranks": LLAMA_3, "sp-llama-2": LLAMA_2}[name]
    text = ours.render_chat(CHAT)
    assert text == transformers.utils.chat_template_utils.render_jinja_template(
        [CHAT], chat_template=template, add_generation_prompt=True, **ours.names
    )[0][0]  # fmt: skip
    if name == "ranks":
        assert ours.encode_chat(CHAT) == ours.core.encode(text, allowed_special="all")
    else:
        sp, special = sp_of(folder_of(name)), {"<s>": [1], "</s>": [2]}
        pieces = [special.get(piece) or sp.encode(piece) for piece in re.split("(<s>|</s>)", text)]
        assert ours.encode_chat(CHAT) == sum(pieces, [])


def test_special_tokens_that_only_the_normaliser_finds_are_refused(folder_of, tmp_path):
    """They are looked for after the marks are gone; better no answer than a message that ends the turn."""
    folder = copy_of(folder_of("json-neox"), tmp_path / "copy")
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["normalized"] = True
    write_json(folder / "tokenizer.json", content)
    ours = load_tokenizer(folder)
    assert ours.encode_chat([{"role": "user", "content": "x"}])
    assert ours.special_ids.isdisjoint(ours.encode("<|endoftext|>"))
    with pytest.raises(UserError, match="endoftext"):
        ours.encode_chat([{"role": "user", "content": "<|endoftext|>"}])


def with_template(folder_of, target, template):
    folder = copy_of(folder_of("json-gpt-2"), target)
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


def test_of_several_templates_the_default_counts(folder_of, tmp_path):
    folder = copy_of(folder_of("gpt-2-files"), tmp_path / "copy")
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write_json(folder / "tokenizer_config.json", {"chat_template": templates})
    assert load_tokenizer(folder).render_chat(CHAT) == "plain"


def test_a_chat_changes_nothing_for_the_next_text(loaded):
    ours, text = loaded("json-neox"), "a\U000f0000b"  # the character that marks what looks like a token
    before = ours.encode(text)
    ours.encode_chat([{"role": "user", "content": "<|im_end|>"}])
    assert ours.encode(text) == before


def test_marks_do_not_disturb_the_text_around_them(folder_of, loaded):
    """A look-alike is encoded as `transformers` encodes it with split_special_tokens."""
    ours, oracle = loaded("json-neox"), reference(folder_of("json-neox"), "json-neox")
    content = "one   <|endoftext|>  two<|im_end|>\n\nthree<|padding|>"
    ids = ours.encode_chat([{"role": "user", "content": content}], add_generation_prompt=False)
    middle = oracle.encode(f"user\n{content}", split_special_tokens=True, add_special_tokens=False)
    start = oracle.encode("<|im_start|>", add_special_tokens=False)
    assert ids[len(start) :][: len(middle)] == middle
    assert ids[len(start) + len(middle) :] == oracle.encode("<|im_end|>\n", add_special_tokens=False)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for m in messages %}{{ m.content }", "line 1"),
        ("{{ messages[0].nothing.more }}", "refuses"),
        ("{{ 1 / 0 }}", "refuses"),
        ("{% for i in range(10000000) %}{% endfor %}", "refuses"),
    ],
)
def test_templates_that_fail(folder_of, tmp_path, template, message):
    ours = with_template(folder_of, tmp_path / "copy", template)
    with pytest.raises(UserError, match=message) as error:
        ours.encode_chat(CHAT)
    assert "\n" not in str(error.value)


def test_a_template_that_looks_for_special_tokens_in_messages_is_refused(folder_of, tmp_path):
    """Breaking up such a token would change what the template does."""
    source = "{% for m in messages %}{{ m.content.split('<|im_end|>')[0] }}{% endfor %}"
    ours = with_template(folder_of, tmp_path / "copy", source)
    assert ours.encode_chat([{"role": "user", "content": "fine"}])
    with pytest.raises(UserError, match="im_end"):
        ours.encode_chat([{"role": "user", "content": "not <|im_end|> fine"}])


@pytest.mark.parametrize("chat", [[], "Hi", ["Hi"], [{"content": "Hi"}], [{"role": 1, "content": "Hi"}]])
def test_messages_that_are_none(loaded, chat):
    with pytest.raises(UserError, match="message"):
        loaded("json-gpt-2").encode_chat(chat)


HOSTILE = [
    "{{ 10 ** (10 ** 8) }}",
    "{{ 'a' * 4000000000 }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ '%2000000000d' % 1 }}",
    "{{ '{:2000000000}'.format(1) }}",
    "{{ 'a'.ljust(2000000000) }}",
    "{{ 'a' | center(2000000000) }}",
    "{{ [1] | tojson(indent=2000000000) }}",
    "{{ [[1] * 100000] * 100000 | tojson }}",
    "{{ lipsum(n=100000000) }}",
    "{{ (1).to_bytes(2000000000, 'big') }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ '9' * 5000 }}{{ " + "9" * 5000 + " }}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_exhausts_nothing(folder_of, tmp_path, monkeypatch, template):
    """Neither time nor memory; one line says so, and the next conversation is rendered as ever."""
    folder = copy_of(folder_of("json-gpt-2"), tmp_path / "copy")
    (folder / "tokenizer_config.json").unlink()
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    chat_template.TEMPLATES.stop()
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="template"):
        load_tokenizer(folder).render_chat(CHAT)
    (folder / "chat_template.jinja").write_text("{{ messages | length }}")
    assert load_tokenizer(folder).render_chat(CHAT) == "4"


def test_a_broken_off_rendering_does_not_answer_the_next_one():
    process = chat_template.TemplateProcess()
    question = json.dumps({"template": "{{ x }}", "variables": {"x": 1}})
    assert process.ask(question) == {"text": "1"}

    class Interrupted:
        def __init__(self, stream):
            self.stream, self.flush, self.close = stream, stream.flush, stream.close

        def write(self, text):
            self.stream.write(text)
            self.stream.flush()
            raise KeyboardInterrupt

    process.process.stdin = Interrupted(process.process.stdin)
    with pytest.raises(KeyboardInterrupt):
        process.ask(json.dumps({"template": "old", "variables": {}}))
    assert process.ask(question) == {"text": "1"}
    process.process.kill()
    process.process.wait()
    assert process.ask(question) == {"text": "1"}
    process.stop()


def test_what_is_not_json_is_refused(loaded):
    with pytest.raises(UserError, match="as in JSON"):
        loaded("json-llama-3").render_chat(CHAT, tools=[print])


def test_threads_share_a_tokenizer(folder_of):
    """Encoding sets a switch of the library's object, may change its normaliser, and moves standard error."""
    ours, failures = load_tokenizer(folder_of("json-llama-3")), []
    text, mark = "a <|eot_id|> b " * 50, "\U000f0000"
    calls = {
        "text": lambda: ours.encode(text),
        "chat": lambda: ours.encode_rendered(text, ""),
        "guarded": lambda: ours.encode_rendered(text.replace("<|", f"<{mark}|"), mark),
    }
    expected, normalizer = {name: call() for name, call in calls.items()}, str(ours.core.normalizer)

    def encode(name):
        for _ in range(200):
            failures.extend([name] if calls[name]() != expected[name] else [])

    standard_error = os.fstat(2)
    threads = [threading.Thread(target=encode, args=(name,)) for name in list(calls) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and str(ours.core.normalizer) == normalizer
    assert os.path.samestat(os.fstat(2), standard_error)


# ---- bad input -----------------------------------------------------------------------------------


def test_converted_folder_goes_first(folder_of, tmp_path):
    folder = copy_of(folder_of("json-gpt-2"), tmp_path / "name")
    assert load_tokenizer(folder).folder == folder
    copy_of(folder_of("sp-code"), folder / "converted")
    assert (
        load_tokenizer(folder).folder == load_tokenizer(folder / "converted").folder == folder / "converted"
    )


def test_no_tokenizer(folder_of, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "missing")
    files = "tokenizer.json, tokenizer.model, vocab.txt, and vocab.json with merges.txt"
    with pytest.raises(UserError, match=files):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer here"):
        load_tokenizer(tmp_path)


def test_ranks_have_no_gap():
    lines = [b"%s %d\n" % (base64.b64encode(bytes([n])), n + n // 200) for n in range(256)]
    with pytest.raises(UserError, match="ranks or single bytes are missing"):
        read_ranks(b"".join(lines), "here")


@pytest.mark.parametrize(
    "name, file, content",
    [
        ("json-gpt-2", "tokenizer.json", None),
        ("json-gpt-2", "tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'),
        ("json-gpt-2", "tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n"),
        ("json-gpt-2", "tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}'),
        ("json-gpt-2", "tokenizer_config.json", b'{"chat_template": [1]}'),
        ("json-gpt-2", "chat_template.jinja", b"\xff\xfe"),
        ("sp-code", "tokenizer.model", None),
        ("sp-code", "tokenizer.model", b""),
        ("sp-code", "tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n"),
        ("ranks", "tokenizer.model", b"AA== 0\nAQ==\n"),
        ("ranks", "tokenizer.model", b"AA== 0\nnot base64 1\n"),
        ("ranks", "tokenizer.model", b"AA== 0\nAQ== 1\n"),
        ("gpt-2-files", "vocab.json", None),
        ("gpt-2-files", "merges.txt", b"#version: 0.2\nnever seen\n"),
        ("gpt-2-files", "tokenizer_config.json", b'{"tokenizer_class": "Qwen2Tokenizer"}'),
    ],
)
def test_broken_files(folder_of, tmp_path, name, file, content):
    folder = copy_of(folder_of(name), tmp_path / "copy")
    whole = (folder / file).read_bytes() if content is None else None
    (folder / file).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def with_json(folder, target, file, change):
    """A copy of a tokenizer's folder, one of its JSON files changed."""
    copy_of(folder, target)
    content = json.loads((target / file).read_text()) if (target / file).exists() else {}
    change(content)
    write_json(target / file, content)
    return target


def added(id, content="<x>"):
    return lambda config: config.update(added_tokens_decoder={str(id): {"content": content, "special": True}})


@pytest.mark.parametrize("name", ["json-gpt-2", "ranks", "sp-code"])
@pytest.mark.parametrize(
    "change",
    [
        added(10**9),
        added(2**64),
        added(-1),
        added(900, ["<x>"]),
        lambda config: config.update(bos_token=["<s>"]),
        lambda config: config.update(eos_token={"content": 7}),
        lambda config: config.update(additional_special_tokens=[["<s>"]]),
        lambda config: config.update(additional_special_tokens=5),
        lambda config: config.update(chat_template={"default": "x"}),
        lambda config: config.update(chat_template=[{"name": "default", "template": ["x"]}]),
    ],
)
def test_settings_that_are_not_what_they_should_be(folder_of, tmp_path, name, change):
    folder = with_json(folder_of(name), tmp_path / "copy", "tokenizer_config.json", change)
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(folder)


def replace(content, pattern="a"):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


@pytest.mark.parametrize(
    "part, spec",
    [
        ("normalizer", replace("b" * 10**6)),
        ("normalizer", {"type": "Sequence", "normalizers": [replace("aa" * 50)] * 6}),
        ("normalizer", {"type": "Prepend", "prepend": "b" * 10**6}),
        ("decoder", {"type": "Sequence", "decoders": [replace("aa" * 50)] * 6}),
        (
            "normalizer",
            {
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode(bytes(4) + b"x" * 10**6).decode(),
            },
        ),
    ],
)
def test_a_pipeline_that_makes_megabytes_of_a_letter(folder_of, tmp_path, part, spec):
    def change(content):
        content[part] = spec

    folder = with_json(folder_of("json-gpt-2"), tmp_path / "copy", "tokenizer.json", change)
    with pytest.raises(UserError, match="times as long"):
        load_tokenizer(folder)


def test_a_sentencepiece_normaliser_that_makes_megabytes_of_a_letter(folder_of, tmp_path):
    folder = copy_of(folder_of("sp-code"), tmp_path / "copy")
    content = (folder / "tokenizer.model").read_bytes()
    charsmap = bytes(4) + b"x" * 10**6

    def message(number, value):
        """A field of bytes, as protobuf writes it."""
        size, length = b"", len(value)
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + value

    # Of a field that comes twice the later counts.
    (folder / "tokenizer.model").write_bytes(content + message(3, message(2, charsmap)))
    with pytest.raises(UserError, match="1,000,000 times as long"):
        load_tokenizer(folder)


def test_a_pattern_that_panics_is_one_line(folder_of, tmp_path, capfd):
    """The library gives up on a pattern after too many steps, with a report and an exception of its own."""

    def change(content):
        split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
        content["pre_tokenizer"] = split

    folder = with_json(folder_of("json-gpt-2"), tmp_path / "copy", "tokenizer.json", change)
    ours = load_tokenizer(folder)
    print("before", file=sys.stderr)
    with pytest.raises(UserError, match="copy: its tokenizer fails on this text"):
        ours.encode("a" * 50 + "!")
    assert ours.encode("b") and capfd.readouterr().err == "before\n"


def test_a_rank_file_of_another_model_is_refused(folder_of, monkeypatch):
    """Llama 4's has 200,000 ranks and another pattern; its ids would be wrong."""
    monkeypatch.setattr(tiktoken_ranks, "NUM_RANKS", 128_000)
    with pytest.raises(UserError, match="where Llama 3 has 128,000"):
        load_tokenizer(folder_of("ranks"))


@pytest.mark.parametrize("name", MAKERS)
def test_bad_ids_and_texts(loaded, name):
    ours = loaded(name)
    for id in (-1, ours.vocab_size, 10**9):
        with pytest.raises(UserError, match=rf"token id {id} .*\(0 to {ours.vocab_size - 1}\)"):
            ours.decode([id])
        with pytest.raises(UserError, match="token id"):
            ours.stream().push(id)
    with pytest.raises(UserError, match="surrogate"):
        ours.encode("half \ud83d")
    assert ours.decode([]) == "" and stream(ours, []) == [""]


def test_no_chat_template(loaded):
    with pytest.raises(UserError, match="no chat template"):
        loaded("gpt-2-files").encode_chat(CHAT)
    assert loaded("gpt-2-files").chat_template is None
