"""A BERT at the terminal: what run.py does with a model that reads a whole text in one pass.

What it says depends on the checkpoint's head:

    masked_lm, pretraining   "Return the [MASK] of the list."  the five most probable tokens for each [MASK]
    sequence                 a text                            its labels, the most probable first
    tokens                   a text                            the label of each token
    next_sentence            two texts                         whether the second follows the first
    none                     sentences                         a vector for each, and how similar they are

Several texts (--prompt more than once, or the lines of a pipe) go through the model together, padded to the
longest of their batch.

Shapes: B texts, T tokens, D features.
Proof: tests/test_run_bert.py, against the pipelines of `transformers`.
"""

import json
import sys
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from conversion.config_fields import stored_labels
from models.utils.errors import UserError
from models.utils.files import check_output, decode_utf8, one_line, read_json
from models.utils.tokenizers.wordpiece import WordPieceTokenizer
from runs_ar.attention_picture import save, self_attention
from runs_ar.generate import NOT_FINITE, check_vocabulary
from runs_ar.terminal import is_piped

OPTIONS = {"--checkpoint", "--device", "--dtype", "--prompt", "--json", "--attention", "--top"}
BATCH_SIZE = 16
NUM_GUESSES = 5
LARGEST_MATRIX = 12  # sentences whose similarities a terminal shows side by side
SENTENCES = ["Return the length of the list.", "How many items are there?", "The sea was calm that evening."]
DEFAULT_TEXTS = {
    "masked_lm": ["Return the [MASK] of the list."],
    "pretraining": ["The capital of France is [MASK]."],
    "sequence": ["This is the best film of the year."],
    "tokens": ["Angela Merkel was born in Hamburg."],
    "next_sentence": ["She opened the door.", "Nobody was there."],
    None: SENTENCES,
}


def run_bert(args, checkpoint):
    """checkpoint.load() is slow: what can be wrong with the input is found out before."""
    check_options(args.given)
    folder, config, tokenizer = checkpoint.folder, checkpoint.config, checkpoint.tokenizer
    texts = texts_of(args, config.head)
    if args.attention and len(texts) > 1:
        raise UserError(f"--attention draws the picture of one text; {len(texts)} were given")
    if args.attention:
        check_output(args.attention, "--attention")
    if not isinstance(tokenizer, WordPieceTokenizer):
        raise UserError(f"{folder}: this tokenizer does not cut words as BERT does (WordPiece); use its own")
    answer = {
        "masked_lm": FillMask,
        "pretraining": FillMask,
        "sequence": Classify,
        "tokens": LabelTokens,
        "next_sentence": FollowOn,
        None: Embed,
    }[config.head](folder, tokenizer)
    inputs = answer.encode(texts)
    for text, (ids, _) in zip(texts, inputs):
        check_length(config, text, ids)

    answer.num_guesses = args.top or NUM_GUESSES
    model = checkpoint.load()
    results = answer.results(texts, inputs, outputs(model, inputs))
    if args.json:
        print(json.dumps(results))
    else:
        print("\n".join(answer.lines(results)).strip("\n"))
    if args.attention:
        tokens, segments, _ = padded(inputs, next(model.parameters()).device)
        names = [tokenizer.token_text(id) for id in inputs[0][0]]
        save(args.attention, self_attention(model, tokens, segments=segments), names, names)


def outputs(model, inputs):
    """What the model says to each input, its padding cut off where there is a row per token."""
    for start in range(0, len(inputs), BATCH_SIZE):
        batch = inputs[start : start + BATCH_SIZE]
        tokens, segments, attention_mask = padded(batch, next(model.parameters()).device)
        with torch.no_grad():
            out = model(tokens, segments, attention_mask).float().cpu()
        if not out.isfinite().all():
            raise UserError(NOT_FINITE)
        yield from (row[: len(ids)] if out.dim() == 3 else row for row, (ids, _) in zip(out, batch))


def padded(batch, device):
    """(tokens, segments, attention mask), each (B, T): shorter rows are filled up, which the mask says."""
    columns = [[torch.tensor(column) for column in columns] for columns in zip(*batch)]
    ones = [torch.ones(len(tokens), dtype=torch.bool) for tokens in columns[0]]
    return [pad_sequence(rows, batch_first=True).to(device) for rows in (*columns, ones)]


# Input ------------------------------------------------------------------------------------------------------


def check_options(given):
    strange = sorted(given - OPTIONS)
    if strange:
        raise UserError(
            f"{', '.join(strange)}: a BERT neither writes nor chats; it takes {', '.join(sorted(OPTIONS))}"
        )


def texts_of(args, head):
    """Each --prompt, or else each line that is piped in, or else an example."""
    texts = args.prompts
    if not all(text.strip() for text in texts):
        raise UserError("--prompt is empty; give a text")
    if not texts and is_piped(sys.stdin):
        print("reading texts from standard input, one a line", file=sys.stderr)
        texts = [line.strip() for line in decode_utf8(sys.stdin.buffer.read(), "standard input").splitlines()]
    # An empty line is a text without words, so that there is a result for each line.
    return texts if any(text.strip() for text in texts) else DEFAULT_TEXTS[head]


def check_length(config, text, ids):
    check_vocabulary(config, ids)
    if len(ids) > config.max_seq_len:
        raise UserError(
            f"the text {shortened(text)!r} has {len(ids)} tokens, the model only {config.max_seq_len} "
            "positions; give a shorter one, or several"
        )


def shortened(text):
    return text if len(text) <= 40 else f"{text[:37]}..."


# Answers ----------------------------------------------------------------------------------------------------


class Answer:
    """What a head's output means. Each kind has
    encode(texts)                    [(token ids, segments), ...]
    results(texts, inputs, outputs)  what --json prints
    lines(results)                   the same for people
    """

    num_guesses = NUM_GUESSES

    def __init__(self, folder, tokenizer):
        self.tokenizer = tokenizer

    def encode(self, texts):
        return [one_segment(self.tokenizer.encode(text)) for text in texts]


def one_segment(ids):
    return ids, [0] * len(ids)


class FillMask(Answer):
    """The most probable tokens for each [MASK]; of several each by itself, the others still hidden."""

    def encode(self, texts):
        mask = self.tokenizer.mask_token
        for text in texts:
            if text and mask not in text:
                raise UserError(
                    f"{shortened(text)!r} has no {mask}; write {mask} where a word is to be guessed"
                )
        return [one_segment(self.tokenizer.encode(text, masks=True)) for text in texts]

    def results(self, texts, inputs, logits):
        return [
            {"text": text, "masks": [self.guesses(row[n]) for n in self.places(ids)]}
            for text, (ids, _), row in zip(texts, inputs, logits)
        ]

    def places(self, ids):
        return [n for n, id in enumerate(ids) if id == self.tokenizer.mask_id]

    def guesses(self, logits):
        probabilities, ids = logits.softmax(dim=-1).topk(min(self.num_guesses, len(logits)))
        return [
            {"token": self.tokenizer.token_text(id), "id": id, "probability": probability}
            for id, probability in zip(ids.tolist(), probabilities.tolist())
        ]

    def lines(self, results):
        for result in results:
            yield from ("", result["text"])
            for n, guesses in enumerate(result["masks"], start=1):
                if len(result["masks"]) > 1:
                    yield f"  {self.tokenizer.mask_token} {n}"
                yield from (f"  {g['probability']:>7.2%}  {g['token']}" for g in guesses)


class Classify(Answer):
    """A score for each label: probabilities that sum to 1, or one for each label, or plain numbers."""

    def __init__(self, folder, tokenizer):
        super().__init__(folder, tokenizer)
        labels = stored_labels(folder)
        self.labels, problem = labels["labels"], labels["problem_type"]
        if problem == "regression":
            self.kind, self.score = "value", torch.Tensor.float
        elif problem == "multi_label_classification" or len(self.labels) == 1:
            self.kind, self.score = "probability", torch.sigmoid
        else:
            self.kind, self.score = "probability", lambda logits: logits.softmax(dim=-1)

    def results(self, texts, inputs, logits):
        return [{"text": text, "labels": self.scored(row)} for text, row in zip(texts, logits)]

    def scored(self, logits):
        scores = self.score(logits).tolist()
        labels = [{"label": label, self.kind: score} for score, label in zip(scores, self.labels)]
        return labels if self.kind == "value" else sorted(labels, key=itemgetter(self.kind), reverse=True)

    def lines(self, results):
        for result in results:
            yield from ("", result["text"])
            for label in result["labels"]:
                score = label[self.kind]
                shown = f"{score:>7.2%}" if self.kind == "probability" else f"{score:>8.4f}"
                yield f"  {shown}  {label['label']}"


class LabelTokens(Answer):
    """The most probable label of each token of the text."""

    def __init__(self, folder, tokenizer):
        super().__init__(folder, tokenizer)
        self.labels = stored_labels(folder)["labels"]

    def results(self, texts, inputs, logits):
        return [
            {"text": text, "tokens": self.labelled(ids, row.softmax(dim=-1))}
            for text, (ids, _), row in zip(texts, inputs, logits)
        ]

    def labelled(self, ids, probs):
        inside = range(len(self.tokenizer.ids_before), len(ids) - len(self.tokenizer.ids_after))
        best = [(self.tokenizer.token_text(ids[n]), *probs[n].max(dim=-1)) for n in inside]
        return [
            {"token": token, "label": self.labels[label], "probability": probability.item()}
            for token, probability, label in best
        ]

    def lines(self, results):
        for result in results:
            yield from ("", result["text"])
            width = max([len(token["token"]) for token in result["tokens"]], default=0)
            for token in result["tokens"]:
                yield f"  {token['probability']:>7.2%}  {token['token']:<{width}}  {token['label']}"


class FollowOn(Answer):
    """Whether the second of two texts was written after the first, or comes from elsewhere."""

    LABELS = ("follows", "does not follow")

    def encode(self, texts):
        if len(texts) != 2:
            raise UserError(f"{len(texts)} texts; this model compares two: give --prompt twice, or two lines")
        return [self.tokenizer.encode_pair(*texts)]

    def results(self, texts, inputs, logits):
        (row,) = logits
        probabilities = row.softmax(dim=-1).tolist()
        return {
            "texts": texts,
            "labels": [{"label": x, "probability": p} for x, p in zip(self.LABELS, probabilities)],
        }

    def lines(self, results):
        yield from ("", *results["texts"])
        yield from (f"  {label['probability']:>7.2%}  {label['label']}" for label in results["labels"])


class Embed(Answer):
    """A vector for each sentence, of length 1, so that two vectors' product is the cosine of their angle."""

    def __init__(self, folder, tokenizer):
        super().__init__(folder, tokenizer)
        self.pooling = read_pooling(folder)

    def results(self, texts, inputs, hidden):
        vectors = torch.stack([F.normalize(pool(row, self.pooling), dim=-1) for row in hidden])
        similarities = vectors @ vectors.T
        return {"texts": texts, "embeddings": vectors.tolist(), "similarities": similarities.tolist()}

    def lines(self, results):
        width = len(str(len(results["texts"])))
        for n, (text, vector) in enumerate(zip(results["texts"], results["embeddings"]), start=1):
            start = " ".join(f"{value:+.3f}" for value in vector[:4])
            yield f"{n:>{width}}  {text}\n{'':{width}}    {len(vector)} numbers: {start} ..."
        show = matrix_lines if len(results["texts"]) <= LARGEST_MATRIX else nearest_lines
        yield from show(results["similarities"]) if len(results["texts"]) > 1 else ()


# Sentence vectors -------------------------------------------------------------------------------------------

# In the order in which sentence-transformers puts them, should there be several.
POOLING_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
}


def pool(hidden, modes):
    """(T, D) -> (D,), or several of these one after the other. There is no padding among the T."""
    vectors = {"cls": hidden[0], "mean": hidden.mean(dim=0), "max": hidden.amax(dim=0)}
    return torch.cat([vectors[mode] for mode in modes])


def read_pooling(folder):
    """How the files of sentence-transformers make one vector of many; the mean where there are none."""
    if not (folder / "modules.json").is_file():
        return ["mean"]
    modules = {module["type"].rpartition(".")[2]: module["path"] for module in read_modules(folder)}
    strange = set(modules) - {"Transformer", "Pooling", "Normalize"}
    if strange or "Pooling" not in modules:
        raise UserError(
            f"{folder / 'modules.json'}: lists {', '.join(modules)}; supported are Transformer, Pooling "
            "and Normalize"
        )
    path = folder / modules["Pooling"] / "config.json"
    wanted = [name for name, value in read_json(path).items() if name.startswith("pooling_mode_") and value]
    if not wanted or not set(wanted) <= set(POOLING_MODES):
        raise UserError(f"{path}: asks for {', '.join(wanted)}; supported are {', '.join(POOLING_MODES)}")
    return [mode for name, mode in POOLING_MODES.items() if name in wanted]


def read_modules(folder):
    """modules.json is a list: what a sentence goes through, in order."""
    try:
        return json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / 'modules.json'}: cannot be read ({one_line(error)}); fetch it again"
        ) from None


def matrix_lines(similarities):
    """Every sentence with every other."""
    numbers = range(1, len(similarities) + 1)
    yield from ("", "similarity", "   " + "".join(f"{n:>7}" for n in numbers))
    for n, row in zip(numbers, similarities):
        yield f"{n:>3}" + "".join(f"{value:>7.3f}" for value in row)


def nearest_lines(similarities):
    """Each sentence with the one that is most similar to it."""
    yield from ("", "the most similar sentence")
    for n, row in enumerate(similarities):
        value, nearest = max((value, m) for m, value in enumerate(row) if m != n)
        yield f"{n + 1:>5} -> {nearest + 1:<5} {value:.3f}"
