"""The proof of models/utils/tokenizers/wordpiece.py: the ids of `transformers`, from every kind of file."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from models.utils.errors import UserError
from models.utils.tokenizer import load_tokenizer
from models.utils.tokenizers.wordpiece import WordPieceTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnoprstuvwyzABCDEHIJKLMNPRSTUäöüßéèçñÄÉİıåøœ"
OTHERS = "0123456789.,!?'\"()[]{}-+/\\$%&*:;<=>@^_`|~#…–—«»。，、ﬁ中国北京東日本かなカナ한국ᄒ"
WORDS = (
    "the The paris Paris café cafe Café is of capital déjà deja vu play ##ing ##ed ##s un ##aff ##able mask "
    "MASK CLS cls sep pad unk hello Hello straße strasse naive naïve ##ïve ##ive ##中 ##國"
)
VOCABULARY = [
    *SPECIAL,
    "[unused0]",
    "[unused1]",
    *LETTERS,
    *OTHERS,
    *("##" + letter for letter in LETTERS + "0123"),
    *WORDS.split(),
]
VOCABULARY = list(dict.fromkeys(VOCABULARY))

TEXTS = [
    "",
    "  \t\n ",
    "Hello, Paris is the capital of France!",
    "unaffable playing plays un-played",
    "naïve café DÉJÀ VU Straße İstanbul ıslak Ärger",
    "cafe\u0301 De\u0301ja\u0300 N\u0303",
    "北京is中国's 首都。東京、日本かなカナ 한국 \U00020000\u3400",
    "ﬁnd ﬃ ① ½ Ⅷ ｆｕｌｌ　ｗｉｄｔｈ",
    "a\x00b\ufffdc\u200bd\u00ade\x7ff\u2028g\u2029h\u3000i\xa0j\ufeffk",
    "👍🏽 emoji 👨‍👩‍👧 flags 🇫🇷",
    "שלום עולם שָׁלוֹם مرحبا नमस्ते สวัสดี",
    "x" * 100 + " " + "a" * 100 + " " + "a" * 101,
    "don't e-mail: a_b@c.d/e\\f (g) {h} [i] <j> ~k `l` ^m $5.00 100%",
    "##ing # # # ##",
    "zzzqqq Q q xX",
    "tabs\tand\r\nlines\rhere\x0b\x0cend",
]
LOOKALIKES = [
    "[CLS] a [SEP] b",
    "[MASK]",
    "[mask] [Mask]",
    "[UNK] [PAD][PAD]",
    "a[MASK]b",
    "[ MASK ]",
    "[unused0]",
]


def write(folder, config=None, vocabulary=VOCABULARY, model_type="bert"):
    """vocab.txt alone, or with a tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("".join(token + "\n" for token in vocabulary), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CONFIGS = {
    "nothing is said": None,
    "uncased": {"do_lower_case": True, "tokenizer_class": "BertTokenizer"},
    "cased": {"do_lower_case": False},
    "cased, old class": {"do_lower_case": False, "tokenizer_class": "BertTokenizerFast"},
    "uncased with accents": {"do_lower_case": True, "strip_accents": False},
    "cased without accents": {"do_lower_case": False, "strip_accents": True},
    "accents as usual": {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True},
    "Chinese words": {"tokenize_chinese_chars": False},
    "other names": {"cls_token": "[unused0]", "mask_token": {"content": "[unused1]", "__type": "AddedToken"}},
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(ours, that of transformers) from vocab.txt and one of CONFIGS."""
    folder = write(tmp_path_factory.mktemp("wordpiece") / "text", CONFIGS[request.param])
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def test_ids_equal_transformers(pair):
    ours, theirs = pair
    assert isinstance(ours, WordPieceTokenizer) and isinstance(theirs, BertTokenizer)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids, text
        assert ours.encode(text, bos=False) == theirs(text, add_special_tokens=False).input_ids, text
    assert len({tuple(ours.encode(text)) for text in TEXTS[2:]}) == len(TEXTS) - 2, (
        "the vocabulary knows them"
    )


def test_pairs_equal_transformers(pair):
    ours, theirs = pair
    for first, second in zip(TEXTS, TEXTS[3:] + TEXTS[:3]):
        # As a batch of one, since a single second text that is empty is taken for none at all.
        expected = theirs([first], [second])
        (ids,), (segments,) = expected.input_ids, expected.token_type_ids
        assert ours.encode_pair(first, second) == (ids, segments)


def test_decoded_texts_equal_transformers(pair):
    ours, theirs = pair
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=30) | st.text(alphabet=LETTERS + OTHERS + " ", max_size=60))
@pytest.mark.parametrize("lower", [True, False])
def test_any_text(lower, text, tmp_path_factory):
    ours, theirs = any_text_pair(lower, tmp_path_factory)
    expected = theirs.tokenize(text, split_special_tokens=True)
    assert ours.encode(text, bos=False) == theirs.convert_tokens_to_ids(expected)


PAIRS = {}


def any_text_pair(lower, tmp_path_factory):
    if lower not in PAIRS:
        folder = write(tmp_path_factory.mktemp("any") / "text", {"do_lower_case": lower})
        PAIRS[lower] = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    return PAIRS[lower]


# Special tokens in texts ------------------------------------------------------------------------------------


def test_text_that_looks_like_a_special_token_stays_text(pair):
    ours, theirs = pair
    special = set(theirs.all_special_ids) - {ours.unk_id}
    for text in LOOKALIKES + TEXTS:
        ids = ours.encode(text, bos=False)
        assert special.isdisjoint(ids), text
        assert ids == theirs.convert_tokens_to_ids(theirs.tokenize(text, split_special_tokens=True)), text


def test_masks_are_made_where_they_are_asked_for(pair):
    """With masks=True the ids are those of transformers, as long as nothing else looks special."""
    ours, theirs = pair
    mask = ours.mask_token
    assert mask == theirs.mask_token and ours.mask_id == theirs.mask_token_id
    texts = [
        mask,
        f"{mask}{mask}",
        f"Paris is the {mask} of France.",
        f"play{mask}ing {mask}",
        f"  {mask}, déjà ",
    ]
    for text in texts:
        assert ours.encode(text, masks=True) == theirs(text).input_ids, text
        assert ours.encode(text, masks=True).count(ours.mask_id) == text.count(mask)
        assert ours.mask_id not in ours.encode(text)
        (ids,), (segments,) = [
            theirs([text], ["hello " + text])[key] for key in ("input_ids", "token_type_ids")
        ]
        assert ours.encode_pair(text, "hello " + text, masks=True) == (ids, segments)
    plain = ours.encode(f"[SEP] {mask} [CLS]", masks=True, bos=False)
    assert plain == ours.encode("[SEP]", bos=False) + [ours.mask_id] + ours.encode("[CLS]", bos=False)


def test_the_ids_by_name(pair):
    ours, theirs = pair
    names = ("pad", "unk", "cls", "sep", "mask")
    assert [getattr(ours, f"{name}_id") for name in names] == [
        getattr(theirs, f"{name}_token_id") for name in names
    ]
    assert ours.encode("") == [ours.cls_id, ours.sep_id]
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (None, None, len(VOCABULARY))
    assert [ours.token_text(id) for id in range(len(VOCABULARY))] == VOCABULARY


# tokenizer.json ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_from_tokenizer_json(name, tmp_path):
    """What transformers saves is read as what it was saved from, without vocab.txt too."""
    theirs = AutoTokenizer.from_pretrained(write(tmp_path / "text", CONFIGS[name]))
    theirs.save_pretrained(tmp_path / "json")
    assert (tmp_path / "json/tokenizer.json").is_file() and not (tmp_path / "json/vocab.txt").exists()
    ours, of_text = load_tokenizer(tmp_path / "json"), load_tokenizer(tmp_path / "text")
    for text in TEXTS + LOOKALIKES:
        assert ours.encode(text) == of_text.encode(text), text
        assert ours.encode_pair(text, "Hello é") == of_text.encode_pair(text, "Hello é"), text
    assert ours.decode(ours.encode(TEXTS[2])) == of_text.decode(of_text.encode(TEXTS[2]))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("beside", [True, False, None])
@pytest.mark.parametrize(
    "kind", ["BertTokenizer", "DistilBertTokenizerFast", "PreTrainedTokenizerFast", None]
)
def test_where_the_files_disagree(kind, beside, inside, tmp_path):
    """tokenizer.json says one thing about capitals, tokenizer_config.json another, or nothing."""
    config = {"do_lower_case": inside, "tokenizer_class": "BertTokenizer"}
    AutoTokenizer.from_pretrained(write(tmp_path / "text", config)).save_pretrained(tmp_path / "json")
    config = {"tokenizer_class": kind, "do_lower_case": beside, "model_max_length": 512}
    config |= dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL))
    config = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "json/tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "json/config.json").write_text('{"model_type": "bert"}')
    ours, theirs = load_tokenizer(tmp_path / "json"), AutoTokenizer.from_pretrained(tmp_path / "json")
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids, text


def test_a_file_that_cuts_and_pads(tmp_path):
    """Sentence encoders' files say so for their own library; a text is never cut here without a word."""
    theirs = AutoTokenizer.from_pretrained(write(tmp_path / "text"))
    theirs.backend_tokenizer.enable_truncation(8)
    theirs.backend_tokenizer.enable_padding(length=8)
    theirs.save_pretrained(tmp_path / "json")
    ours, whole = load_tokenizer(tmp_path / "json"), load_tokenizer(tmp_path / "text")
    assert ours.encode(TEXTS[4]) == whole.encode(TEXTS[4]) and len(ours.encode(TEXTS[4])) > 8
    assert ours.encode("a") == whole.encode("a")
    assert ours.encode_pair("a", TEXTS[4]) == whole.encode_pair("a", TEXTS[4])


def test_the_library_agrees_with_the_python_code_of_2018(tmp_path):
    """Google's algorithm, as transformers had it in Python, which shares no code with the library.

    It composed characters first (NFC), which Google's code does not, and the library neither.
    """
    for lower in True, False:
        folder = write(tmp_path / str(lower), {"do_lower_case": lower})
        ours, theirs = load_tokenizer(folder), BertTokenizerLegacy(folder / "vocab.txt", do_lower_case=lower)
        for text in [unicodedata.normalize("NFC", text) for text in TEXTS]:
            assert ours.encode(text) == theirs(text).input_ids, text
            assert ours.encode_pair(text, "Hello")[0] == theirs(text, "Hello").input_ids, text


# Files that are broken --------------------------------------------------------------------------------------


def test_vocab_txt_with_odd_lines(tmp_path):
    """Windows' line ends, an empty line, a space behind a token, a token twice: its last id counts."""
    lines = [*SPECIAL, "hello", "world", "", "world ", "hello"]
    folder = write(tmp_path)
    (folder / "vocab.txt").write_bytes("\r\n".join(lines).encode())
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode("Hello world x") == theirs("Hello world x").input_ids == [2, 9, 8, 1, 3]


@pytest.mark.parametrize(
    "vocabulary, config, message",
    [
        (["a", "b"], None, "vocab.txt: has no line .UNK. and no .CLS. and no .SEP."),
        ([], None, "vocab.txt: has no line .UNK."),
        (VOCABULARY, {"cls_token": "<s>"}, "vocab.txt: has no line <s>"),
        (VOCABULARY, {"do_lower_case": "yes"}, "tokenizer_config.json: do_lower_case is 'yes'"),
        (VOCABULARY, {"strip_accents": 1}, "tokenizer_config.json: strip_accents is 1"),
    ],
)
def test_what_is_no_wordpiece_vocabulary(vocabulary, config, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_tokenizer(write(tmp_path, config, vocabulary))


def test_a_vocabulary_that_is_no_text(tmp_path):
    (write(tmp_path) / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="vocab.txt: cannot be read .*fetch it again"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_without_a_mask(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, vocabulary=[t for t in VOCABULARY if t != "[MASK]"]))
    assert tokenizer.mask_id is None
    with pytest.raises(UserError, match="has no .MASK. token"):
        tokenizer.encode("a [MASK]", masks=True)


def test_a_tokenizer_json_without_the_unknown_word(tmp_path):
    AutoTokenizer.from_pretrained(write(tmp_path / "text")).save_pretrained(tmp_path / "json")
    path = tmp_path / "json/tokenizer.json"
    content = json.loads(path.read_text())
    del content["model"]["vocab"]["[UNK]"]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[UNK]"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="the vocabulary has no .UNK."):
        load_tokenizer(tmp_path / "json")


def test_bad_texts(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path))
    for call in (tokenizer.encode, lambda text: tokenizer.encode_pair("a", text)):
        with pytest.raises(UserError, match="lone surrogate"):
            call("half a pair \ud83d")
