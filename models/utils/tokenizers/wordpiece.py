"""WordPiece, BERT's tokenizer: a word is cut into the longest pieces that the vocabulary has.

    "Unaffable, déjà vu" -> clean, split Chinese characters off, lowercase, drop accents      (normaliser)
                         -> unaffable | , | deja | vu                       (at spaces, around punctuation)
                         -> un ##aff ##able , de ##ja vu           (longest match first, from the left)

A piece that continues a word begins with ##; a word that cannot be cut becomes [UNK]. With a cased vocabulary
capitals and accents stay. The library `tokenizers` does all this; this page says with which settings, and
what stands around a text:

    encode("a")            [CLS] a [SEP]
    encode_pair("a", "b")  [CLS] a [SEP] b [SEP], and the segments 0 0 0 1 1

Text that looks like a special token stays text, as with every tokenizer here. Who wants masks asks for them:

    encode("Paris is [MASK].", masks=True)      each [MASK] is the mask token; [SEP] would still be text

The file tokenizer.json holds all settings, and yet the class BertTokenizer of `transformers` heeds only its
vocabulary and what it puts around a text: the normaliser is made from do_lower_case, strip_accents and
tokenize_chinese_chars in tokenizer_config.json, and where these are silent from the defaults below. So it is
here, since the ids must be the same; of other classes the file is taken at its word.

Proof: tests/test_wordpiece.py, against `transformers`.
"""

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from models.utils.errors import UserError
from models.utils.files import plain_file, reading
from models.utils.tokenizers.base import check_text
from models.utils.tokenizers.pipeline import TokenizersTokenizer

NAMES = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
NORMALIZER = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
BERT_CLASSES = (None, "BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast")


class WordPieceTokenizer(TokenizersTokenizer):
    """Like every Tokenizer, and beyond that: encode_pair, masks, token_text, and pad_id, mask_id, ...

    pad_id, unk_id, cls_id, sep_id, mask_id    None where the vocabulary has no such token
    mask_token                                 how a mask is written in a text, "[MASK]"
    """

    def __init__(self, settings, core=None):
        """core: what tokenizer.json holds; None: there is vocab.txt alone."""
        names = NAMES | {name: settings.names.get(name) or NAMES[name] for name in NAMES}
        core = core or pipeline(settings, names)
        if settings.tokenizer_class in BERT_CLASSES:
            core.normalizer = normalizer(settings)
        if core.token_to_id(core.model.unk_token) is None:
            raise UserError(
                f"{settings.folder}: the vocabulary has no {core.model.unk_token}, for words it does not know"
            )
        super().__init__(core, settings, names)
        self.mask_token = names["mask_token"]
        for name in NAMES:
            setattr(self, name.replace("_token", "_id"), self.id_of(names[name]))

        # What stands around two texts: encode a pair and see which ids do not come from it.
        with self.guarded():
            probe = core.encode("a", "a")
        self.around_pair = list(zip(probe.ids, probe.sequence_ids, probe.type_ids))

    def encode(self, text, bos=None, masks=False):
        """Text to ids, [CLS] and [SEP] around them unless bos is False. masks: a [MASK] in it is one."""
        return self.surround(self.encode_text(check_text(text), masks), bos)

    def encode_pair(self, first, second, masks=False):
        """(ids, segments) of two texts, for models that compare them; the segments are 0 and 1."""
        texts = [self.encode_text(check_text(text), masks) for text in (first, second)]
        ids, segments = [], []
        for id, sequence, segment in self.around_pair:
            new = [id] if sequence is None else texts[sequence]
            ids += new
            segments += [segment] * len(new)
        return ids, segments

    def encode_text(self, text, masks=False):
        if not masks:
            return super().encode_text(text)
        if self.mask_id is None:
            raise UserError(f"{self.folder}: has no {self.mask_token} token, so that nothing can be masked")
        ids = []
        for index, piece in enumerate(text.split(self.mask_token)):
            ids += [self.mask_id] if index else []
            ids += super().encode_text(piece)
        return ids

    def token_text(self, id):
        """How the vocabulary spells a token: "##able"."""
        return self.core.id_to_token(int(id))


def normalizer(settings):
    """What BertTokenizer does to a text before it is cut: control characters and odd spaces go, always."""
    options = NORMALIZER | settings.wordpiece
    for name, value in settings.wordpiece.items():
        if not isinstance(value, bool):
            where = settings.folder / "tokenizer_config.json"
            raise UserError(f"{where}: {name} is {value!r}, where true or false was expected")
    return normalizers.BertNormalizer(
        clean_text=True,
        lowercase=options["do_lower_case"],
        strip_accents=options["strip_accents"],  # None: where it lowercases
        handle_chinese_chars=options["tokenize_chinese_chars"],
    )


def pipeline(settings, names):
    """BERT's pipeline around vocab.txt, which has a token per line; the line's number is its id."""
    vocabulary = read_vocabulary(settings.folder / "vocab.txt")
    needed = [names[name] for name in ("unk_token", "cls_token", "sep_token")]
    missing = [token for token in needed if token not in vocabulary]
    if missing:
        raise UserError(f"{settings.folder / 'vocab.txt'}: has no line {' and no '.join(missing)}")
    core = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=names["unk_token"]))
    core.add_special_tokens([name for name in names.values() if name in vocabulary])
    core.normalizer = normalizer(settings)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    cls, sep = names["cls_token"], names["sep_token"]
    core.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(name, vocabulary[name]) for name in (cls, sep)],
    )
    return core


def read_vocabulary(path):
    with reading(plain_file(path)):
        return models.WordPiece.read_file(str(path))
