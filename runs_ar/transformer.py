"""Translation: the encoder reads the source once, then the decoder writes the target token by token.

    source --encode--> memory --new_cache--> cache
    first token --decode--> logits --pick--> token --decode--> logits --pick--> ... --> end token

The cache holds the keys and values of the memory, which every token of the target attends to, and of the
target so far. `generate` picks one token per row and step, greedily or by sampling, and yields it at once;
runs_ar/beam_search.py follows several targets of each source and returns the best at the end.

Shapes: B rows, V vocabulary.
Proof: tests/test_run_transformer.py, against `transformers`.
"""

import math
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.utils.errors import UserError
from models.utils.files import read_json
from models.utils.sampling import GREEDY, pick
from runs_ar.beam_search import Beams
from runs_ar.generate import check_vocabulary

# The cache has room for so many tokens at first and doubles when it is full, since most targets are short.
FIRST_SLOTS = 32


@dataclass(frozen=True)
class Rules:
    """Where a target begins and ends, and which tokens may stand in it."""

    start_id: int  # the token in front of every target; <pad> in Marian
    eos_ids: frozenset  # each ends a target
    max_new_tokens: int  # the first token not counted, the end token counted
    banned_ids: tuple = ()  # never chosen; <pad> in Marian
    forced_eos_id: int | None = None  # the last token of a target that has become too long

    def apply(self, scores, step):
        """Set the scores (B, V) of forbidden tokens to -inf, in place."""
        if self.forced_eos_id is not None and step == self.max_new_tokens - 1:
            scores[:] = -math.inf
            scores[:, self.forced_eos_id] = 0
        else:
            scores[:, self.banned_ids] = -math.inf
        return scores

    def ends(self, tokens, step):
        """Which of the tokens picked in this step are the last ones."""
        eos_ids = torch.tensor(sorted(self.eos_ids), device=tokens.device)
        return torch.isin(tokens, eos_ids) | (step == self.max_new_tokens - 1)


class Decoder:
    """The model at work on some sources; what it has read and written is in the cache.

    num_copies: of each source, so many targets are written side by side. The encoder reads it once.
    """

    @torch.inference_mode()
    def __init__(self, model, sources, num_copies=1):
        self.model, self.device = model, model.lm_head.weight.device
        cache = read_sources(model, sources, FIRST_SLOTS)
        self.cache = each_tensor(lambda tensor: tensor.repeat_interleave(num_copies, dim=0), cache)
        self.num_rows = num_copies * len(sources)
        self.num_fed = 0

    @torch.inference_mode()
    def step(self, tokens):
        """Feed the newest token of each row, (B,); logits for the one after it, (B, V)."""
        if self.num_fed == self.cache.past[0].k.shape[2]:
            # Twice as many slots: those that are there, and as many after them.
            self.reshape_past(lambda tensor: F.pad(tensor, (0, 0, 0, self.num_fed)))
        positions = torch.full_like(tokens, self.num_fed)
        self.num_fed += 1
        return self.model.decode(tokens[:, None], positions[:, None], self.cache)[:, -1]

    def reorder(self, rows):
        """Let row n go on from what row rows[n] has written. All of these must be targets of one source."""
        self.reshape_past(lambda tensor: tensor.index_select(0, rows))

    def reshape_past(self, function):
        self.cache = self.cache._replace(past=each_tensor(function, self.cache.past))


def each_tensor(function, tree):
    """`function` of every tensor in nested tuples, named ones among them."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    branches = [each_tensor(function, branch) for branch in tree]
    return tree._make(branches) if hasattr(tree, "_make") else tuple(branches)


def check_source(config, source):
    """UserError for a source that the model cannot read."""
    if len(source) > config.max_seq_len:
        raise UserError(
            f"the text has {len(source)} tokens, the model's context only {config.max_seq_len}; "
            "translate it in pieces, sentence by sentence"
        )
    check_vocabulary(config, source)


def read_sources(model, sources, num_slots):
    """A cache that holds what the encoder made of the sources, and has room for `num_slots` target tokens."""
    memory = model.encode(pad_sources(sources, model.config.pad_id, model.lm_head.weight.device))
    if memory.states.isnan().any():
        raise UserError("the model computes NaN; try --dtype float32, or convert it again")
    return model.new_cache(memory, num_slots)


def pad_sources(sources, pad_id, device):
    longest = max(map(len, sources))
    return torch.tensor([source + [pad_id] * (longest - len(source)) for source in sources], device=device)


@torch.inference_mode()
def generate(model, sources, rules, sampling=GREEDY, generators=None):
    """Write a target for each source; yield, step by step, the list of the rows' new tokens.

    A row ends with an end token (which is yielded) or with rules.max_new_tokens; from then on its entry is
    None. Every row is what it would be alone, up to rounding. Sampling takes a generator per row.
    """
    decoder = Decoder(model, sources)
    tokens = torch.full((len(sources),), rules.start_id, device=decoder.device)
    finished = torch.zeros_like(tokens, dtype=torch.bool)
    for step in range(rules.max_new_tokens):
        logits = rules.apply(decoder.step(tokens), step)
        tokens = pick(logits, sampling, generators)
        yield [None if done else token for done, token in zip(finished.tolist(), tokens.tolist())]
        finished = finished | rules.ends(tokens, step)
        if finished.all():
            return


# What the checkpoint says -----------------------------------------------------------------------------------

# What generation_config.json may ask for and this page does not do, with the values that ask for nothing.
NOT_IMPLEMENTED = {
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "forced_bos_token_id": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "exponential_decay_length_penalty": (),
}


def generation_rules(folder, config, eos_ids, max_new_tokens=None):
    """(Rules, Beams) as generation_config.json gives them; what it leaves out is as in `transformers`.

    Only the greatest length differs: `transformers` stops at 20 tokens where nothing is said, and here the
    model's context is the limit.
    """
    path = folder / "generation_config.json"
    fields = read_json(path) if path.is_file() else {}
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, neutral in NOT_IMPLEMENTED.items():
        if name in fields and fields[name] not in neutral:
            print(f"{path}: {name} is not implemented here and left out", file=sys.stderr)

    # max_length counts the start token.
    longest = whole_number(path, fields, "max_length", config.max_seq_len + 1) - 1
    longest = whole_number(path, fields, "max_new_tokens", longest)
    rules = Rules(
        start_id=whole_number(path, fields, "decoder_start_token_id", config.pad_id),
        eos_ids=eos_ids,
        max_new_tokens=min(max_new_tokens or max(1, longest), config.max_seq_len),
        banned_ids=banned_tokens(path, fields, eos_ids),
        forced_eos_id=whole_number(path, fields, "forced_eos_token_id", None),
    )
    if max(rules.start_id, rules.forced_eos_id or 0, *rules.banned_ids, *eos_ids) >= config.vocab_size:
        raise UserError(f"{path}: names a token beyond the {config.vocab_size} of the model; fetch it again")
    names = ("length_penalty", "early_stopping")
    return rules, Beams(
        num_beams=fields.get("num_beams", 1),
        renormalize=bool(fields.get("renormalize_logits")),
        **{name: fields[name] for name in names if name in fields},
    )


def whole_number(path, fields, name, default):
    value = fields.get(name, default)
    if value is not None and (type(value) is not int or value < 0):
        raise UserError(f"{path}: {name} is {value!r} where a number is expected; correct the file")
    return value


def banned_tokens(path, fields, eos_ids):
    """bad_words_ids, where each word is one token, as in every opus-mt checkpoint: <pad>."""
    words = fields.get("bad_words_ids", [])
    if not all(isinstance(word, list) and len(word) == 1 and type(word[0]) is int for word in words):
        raise UserError(f"{path}: bad_words_ids is {words!r}; only words of one token are implemented")
    return [token for (token,) in words if token not in eos_ids]
