"""Generation: predict the next token, append it, and begin again. For one prompt, a list of token ids:

    tokens = list(prompt)
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([tokens]))[0, -1]   # the whole text again, for the sake of its last token
        tokens.append(logits.argmax().item())           # the most probable token, or one drawn by chance
        if tokens[-1] in eos_ids:
            break

That is all. Below is the same with a cache, a batch and ends:

    prompts --1 prefill--> cache, logits --2 pick--> a token per row --3 end?--> --4 feed--> logits --2--> ...

The prompt goes through the model once, all its tokens together; lm_head, the largest matrix of a small
model, is applied only to the last of them. After that each step feeds one token per row: the cache holds
the keys and values of everything before it.

A model that keeps states instead (Mamba, say) is told which places hold no token of a text: their position is
-1, and they move nothing.

`generate` knows token ids and no text; `TextStream` makes its tokens into text that can be shown at once.
Any decoder of the zoo runs on this page.

Shapes: B rows, T positions in a call, D features, V vocabulary.
Proof: tests/test_generate.py.
"""

import inspect

import torch

from models.utils.errors import UserError
from models.utils.files import read_json
from models.utils.sampling import GREEDY, Sampling, pick

# A long prompt goes through the model in chunks of so many tokens, so that no tensor grows with the square of
# its length. The first chunk, which is all there is to most prompts, is causal in itself and needs no mask of
# the cache's slots; a later one has a mask of PREFILL_CHUNK x num_slots.
PREFILL_CHUNK = 512
NOT_FINITE = "the model computes NaN or infinity; try --dtype float32, or convert it again"


@torch.inference_mode()
def generate(
    model,
    prompts,  # a list of token ids for each row
    max_new_tokens,
    sampling=GREEDY,
    generators=None,  # one per row; greedy needs none
    eos_ids=(),
    finished=None,  # a list of bools, one per row; a caller that sets an entry ends that row
    cache=None,  # one with room for prompts and answers; None makes one
    num_cached=0,  # how many leading tokens that cache holds already, fewer than any prompt has
):
    """Continue every prompt; yield, step by step, the list of the rows' new tokens.

    A row ends with a token of `eos_ids` (which is yielded), with max_new_tokens, or with the model's context;
    from then on its entry is None. Every row is what it would be alone, up to rounding.
    """
    check_prompts(model.config, prompts)
    room = [min(max_new_tokens, model.config.max_seq_len - len(prompt)) for prompt in prompts]
    num_slots = max(len(prompt) + new for prompt, new in zip(prompts, room))
    cache = model.new_cache(len(prompts), num_slots) if cache is None else cache
    finished = [False] * len(prompts) if finished is None else finished

    # 1. Prefill: the prompts fill the cache, and their last tokens give the first logits.
    logits = model.lm_head(prefill(model, prompts, cache, num_cached))  # (B, V)
    positions = torch.tensor([[len(prompt)] for prompt in prompts], device=logits.device)
    for step in range(1, max(room) + 1):
        # 2. Pick the next token of each row.
        tokens = pick(logits, sampling, generators)  # (B,)
        new = [None if finished[row] else token for row, token in enumerate(tokens.tolist())]
        # 3. End the rows that are done.
        for row, token in enumerate(new):
            finished[row] = finished[row] or token in eos_ids or step == room[row]
        yield new
        if all(finished):
            return
        # 4. Feed the new tokens, and these alone. A row that ended goes on unseen as long as others do.
        logits = model(tokens[:, None], positions, cache)[:, -1]  # (B, V)
        positions = next_positions(positions, finished, num_slots, keeps_states(model))


def keeps_states(model):
    """Whether what a model has read is a state, which cannot be written over, only gone back from.

    Such a model's new_cache takes num_undo: how many tokens earlier than the last one a call may begin.
    """
    while hasattr(model, "model"):  # one that is compiled, or timed
        model = model.model
    return "num_undo" in inspect.signature(model.new_cache).parameters


def next_positions(positions, finished, num_slots, has_states):
    """One further. A row that ended goes on unseen as long as others do, and must do no harm."""
    if has_states:
        is_over = torch.tensor(finished, device=positions.device)[:, None]
        return (positions + 1).masked_fill(is_over, -1)
    return (positions + 1).clamp(max=num_slots - 1)


def prefill(model, prompts, cache, num_cached=0):
    """Write the prompts into the cache; the hidden state of the last token of each: (B, D).

    Shorter prompts are padded on the right. No token of a prompt looks ahead to a pad, and what a pad writes
    into the cache is overwritten by the row's new tokens before they attend to it. A state would not forget a
    pad, so the model is told of it: its position is -1.
    """
    longest = max(len(prompt) for prompt in prompts)
    padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
    tokens = torch.tensor(padded, device=model.lm_head.weight.device)

    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=tokens.device)
    has_pads = keeps_states(model) and bool((lengths < longest).any())

    last = [None] * len(prompts)
    for start in range(num_cached, longest, PREFILL_CHUNK):
        chunk = tokens[:, start : start + PREFILL_CHUNK]
        positions = torch.arange(start, start + chunk.shape[1], device=tokens.device).expand_as(chunk)
        if has_pads:
            positions = positions.where(positions < lengths, -1)
        hidden = model.hidden(chunk, positions if start > 0 or has_pads else None, cache)
        for row, prompt in enumerate(prompts):
            if start < len(prompt) <= start + PREFILL_CHUNK:
                last[row] = hidden[row, len(prompt) - 1 - start]

    last = torch.stack(last)
    if not last.isfinite().all():
        raise UserError(NOT_FINITE)
    return last


def check_prompts(config, prompts):
    """UserError for a prompt that the model cannot continue."""
    for prompt in prompts:
        size, context = len(prompt), config.max_seq_len
        if size == 0:
            raise UserError("the prompt is empty; give at least one token to continue")
        if size >= context:
            raise UserError(f"the prompt has {size} tokens, the model's context only {context}; shorten it")
        check_vocabulary(config, prompt)


def check_vocabulary(config, token_ids):
    if max(token_ids) >= config.vocab_size:
        raise UserError(
            f"token {max(token_ids)} is not among the {config.vocab_size} that the model knows; "
            f"this tokenizer belongs to another model"
        )


# Text -------------------------------------------------------------------------------------------------------


def generate_text(model, prompt, stream, **options):
    """Continue one prompt; yield (token, text to show) step by step. `options` are those of `generate`.

    Call stream.finish() at the end, also after Ctrl-C: it returns what was held back.
    """
    for (token,) in generate(model, [prompt], **options):
        yield token, stream.push(token)
        if stream.stopped:
            return


class TextStream:
    """The text of one row as its tokens come in, up to the first stop string.

    `push` returns what can be shown already. It holds back half a character, and an end that may turn out to
    be the beginning of a stop string; `finish` returns what is still held back.
    """

    def __init__(self, tokenizer, prompt=(), stop_strings=()):
        if "" in stop_strings:
            raise UserError("a stop string is empty; it would stop before the first token")
        self.stop_strings = stop_strings
        self.stopped = False
        self.held = ""
        self.num_known = tokenizer.vocab_size
        self.decoder = tokenizer.stream()
        # A token's text can depend on those before it (the first of a text loses its space), and the
        # prompt's last tokens say enough about that.
        for token in prompt[-16:]:
            self.decoder.push(token)

    def push(self, token):
        # A matrix padded to a multiple of 64, say, has rows for tokens that the tokenizer does not have.
        text = self.decoder.push(token) if token < self.num_known else ""
        return self.release(text, hold_back=True)

    def finish(self):
        return self.release(self.decoder.finish(), hold_back=False)

    def release(self, text, hold_back):
        """What is held and `text`, up to a stop string or (hold_back) what may be the beginning of one."""
        if self.stopped:
            return ""
        self.held += text
        found = [(self.held.find(stop) + len(stop), stop) for stop in self.stop_strings if stop in self.held]
        if found:
            # Of several, the one that is complete first, as if the characters came in one by one; then the
            # longest.
            end, stop = min(found, key=lambda place: (place[0], -len(place[1])))
            cut, self.stopped = end - len(stop), True
        else:
            cut = len(self.held) - (self.partial_stop() if hold_back else 0)
        text, self.held = self.held[:cut], self.held[cut:]
        return text

    def partial_stop(self):
        """How many characters at the end of what is held may be the beginning of a stop string."""
        parts = {stop[:length] for stop in self.stop_strings for length in range(1, len(stop))}
        return max((len(part) for part in parts if self.held.endswith(part)), default=0)


# What the checkpoint says -----------------------------------------------------------------------------------


def generation_defaults(folder, tokenizer):
    """(Sampling, EOS ids) as the checkpoint's generation_config.json gives them.

    As in `transformers`, "do_sample" decides: without it generation is greedy, whatever else the file says.
    An option that the file leaves out is off (`transformers` takes 50 for a missing top_k). A file without
    EOS ids leaves it to the tokenizer's own.
    """
    path = folder / "generation_config.json"
    fields = read_json(path) if path.exists() else {}
    fields = {name: value for name, value in fields.items() if value is not None}
    names = [name for name in ("temperature", "top_k", "top_p", "min_p") if name in fields]

    eos_ids = fields.get("eos_token_id", [] if tokenizer.eos_id is None else [tokenizer.eos_id])
    eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
    for name, value in [("eos_token_id", eos_id) for eos_id in eos_ids] + [(n, fields[n]) for n in names]:
        if type(value) not in (int, float):
            raise UserError(f"{path}: {name} is {value!r} where a number is expected; correct the file")

    sampling = Sampling(**{name: fields[name] for name in names}) if fields.get("do_sample") else GREEDY
    return sampling, frozenset(eos_ids)
