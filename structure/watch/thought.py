"""One text through one model: everything that the page shows of it, found in the calls that were recorded.

    thought = think(model, text)

The whole text, with what the model wrote, goes through at once; since no token sees ahead, each place gives
what it gave when it was the last (of encoders there is one pass anyway). No line here knows a model: what
attends, what is added and what is chosen is found in what ran, and the head is asked through the page's own
forward, with another `hidden` in its place.

Shapes: T tokens, D features, V what the head answers with, A experts of a token.
Proof: tests/test_watch.py.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from models.utils.recording import Recording, tensors_in
from runs_ar.attention import heard
from structure.watch.reach import reaches
from structure.watch.stream import contributions, layers_of, stream_of, tail_of

GUESSES = 5  # of a layer of the logit lens
NAMED = 2  # answers whose logits are taken apart: the winner and the next


@dataclass
class Text:
    """What goes in. tokens: what the model reads or writes; of an encoder-decoder the target."""

    tokens: list
    source: list | None = None  # of an encoder-decoder
    image: torch.Tensor | None = None  # (1, C, h, w)
    note: str = ""  # what of it was left out


@dataclass
class Thought:
    recording: Recording
    out: torch.Tensor  # what the model returned
    logits: torch.Tensor | None  # (T, V) in fp32; None where there is no head
    steps: list  # of the residual stream
    lens: list  # [(layer, ids (T, n), their probabilities (T, n), that of the final answer (T,))]
    attention: list  # of runs_ar.attention.Heads
    parts: list  # of each named answer: (ids (T,), {part: (T,)}); [] where the head is no linear map
    experts: list = field(default_factory=list)  # of Choice
    caches: list = field(default_factory=list)  # of Slots
    reach: list = field(default_factory=list)  # [(path, (T, T))] of what mixes tokens without attention
    encoding: set = field(default_factory=set)  # the modules that ran before the target: an encoder's


@dataclass
class Choice:
    path: str
    num_experts: int
    chosen: torch.Tensor  # (T, A)
    weights: torch.Tensor  # (T, A)


@dataclass
class Slots:
    path: str  # of the module that writes
    places: list  # of each token, the slot where it is kept
    num_slots: int
    numbers: int  # that a slot keeps


def passes(model, text):
    """(a function that runs the model, the cache that it fills or None, a function that makes another)."""
    if text.image is not None:
        return lambda: model(text.image), None, None
    tokens = torch.tensor([text.tokens])
    if text.source is not None:
        memory = model.encode(torch.tensor([text.source]))
        cache = model.new_cache(memory, len(text.tokens))
        return lambda: model.decode(tokens, None, cache), cache, None
    if hasattr(model, "new_cache"):
        another = partial(model.new_cache, 1, len(text.tokens))
        cache = another()
        return lambda: model(tokens, None, cache), cache, another
    return lambda: model(tokens), None, None


def think(model, text):
    """The Thought of a model over a Text."""
    with torch.no_grad(), Recording(model) as recording:
        run, cache, another = passes(model, text)
        encoding = {call.path for call in recording.calls}
        with overheard(model) as hidden:
            out = run()
    (hidden,) = hidden
    steps = stream_of(recording, hidden)
    T = hidden.shape[1]
    thought = Thought(recording, out, None, steps, [], heard(recording, T), [])
    thought.experts = choices(recording, model, T)
    thought.caches = slots(recording, cache, T)
    thought.encoding = encoding
    if isinstance(cache, tuple) or cache is None:
        attending = [each.path for each in thought.attention]
        thought.reach = reaches(recording, steps, attending, cache if another else None, another)
    if out is hidden or out.dim() == 2 and out.shape[-1] == hidden.shape[-1]:
        return thought  # hidden states, or one vector: there is no head

    def answer(x):
        """What the page's own head says to each of (T, D) by itself: (T, V)."""
        with replaced(model, lambda *args, **kwargs: x[:, None]):
            return run().reshape(len(x), -1).float()

    tail = [model.get_submodule(path) for path in tail_of(steps)]
    with torch.no_grad():
        thought.logits = answer(hidden[0])
        for layer, x in layers_of(steps):
            for norm in tail:
                x = norm(x.to(hidden))
            probs = answer(x.to(hidden)).softmax(dim=-1)
            best = probs.topk(min(GUESSES, probs.shape[-1]))
            final = probs.gather(1, thought.logits.argmax(dim=-1, keepdim=True))[:, 0]
            thought.lens.append((layer, best.indices, best.values, final))
    thought.parts = taken_apart(answer, hidden[0], steps, thought.logits)
    return thought


@contextmanager
def replaced(model, hidden):
    model.hidden = hidden
    try:
        yield
    finally:
        del model.hidden


@contextmanager
def overheard(model):
    """Collects what `hidden` returns."""
    heard_, original = [], model.hidden

    def hidden(*args, **kwargs):
        heard_.append(original(*args, **kwargs))
        return heard_[-1]

    with replaced(model, hidden):
        yield heard_


def taken_apart(answer, hidden, steps, logits):
    """[(ids (T,), {part: (T,)})] of the most probable answers; [] if the head is no linear map of hidden."""
    if not logits.isfinite().all():
        return []
    best, found = logits.topk(NAMED, dim=-1).indices, []
    with torch.no_grad():
        nothing = answer(torch.zeros_like(hidden))
    for ids in best.T:
        x = hidden.detach().clone().requires_grad_()
        with torch.enable_grad():
            (direction,) = torch.autograd.grad(answer(x).gather(1, ids[:, None]).sum(), x)
        parts = contributions(steps, direction.float())
        bias = nothing.gather(1, ids[:, None])[:, 0]
        if bias.abs().max() > 0:
            parts["the head's bias"] = bias
        logit = logits.gather(1, ids[:, None])[:, 0]
        if (sum(parts.values()) - logit).abs().max() > 1e-2 * max(1.0, logit.abs().max().item()):
            return []
        found.append((ids, parts))
    return found


# Experts ----------------------------------------------------------------------------------------------------


def choices(recording, model, num_tokens):
    """The Choice of each module that has several modules alike and lets topk choose among them."""
    found = []
    for path, module in model.named_modules():
        lists = [len(each) for each in module.children() if isinstance(each, nn.ModuleList)]
        for call in recording.calls:
            if not path or call.path != path or call.name != "topk" or call.args[0].shape[-1] not in lists:
                continue
            values, chosen = call.out
            if chosen.shape[0] == num_tokens:
                weights = weights_of(recording, path, chosen.shape)
                weights = values if weights is None else weights
                found.append(Choice(path, call.args[0].shape[-1], chosen, weights.float()))
    return list({choice.path: choice for choice in found}.values())


def weights_of(recording, path, shape):
    """What the chosen experts' results are multiplied by."""
    for call in reversed(recording.calls):
        if call.path == path and call.name == "mul":
            for tensor in call.tensors:
                if tensor.shape == (*shape, 1):
                    return tensor[..., 0]
    return None


# The cache --------------------------------------------------------------------------------------------------


def slots(recording, cache, num_tokens):
    """The Slots of each module's part of the cache, as it was written."""
    kept = {id(tensor) for tensor in tensors_in([cache])} if cache is not None else set()
    written = {}  # (path, id of a tensor): (the tensor, which of its axes has the slots, the slots)
    for call in recording.calls:
        if call.name != "index_put" or id(call.out) not in kept or call.out.dim() < 3:
            continue
        index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
        for axis, each in enumerate(index):
            if isinstance(each, torch.Tensor) and each.dim() == 2 and (axis or len(index) == 1):
                # A long text is written in pieces where a ring has no room for it.
                key = call.path, id(call.out)
                written.setdefault(key, (call.out, axis, []))[2].extend(each[0].tolist())
    found = {}
    for (path, _), (tensor, axis, places) in written.items():
        if len(places) == num_tokens:
            size = tensor.shape[axis]
            numbers = tensor.numel() // size + (found[path].numbers if path in found else 0)
            found[path] = Slots(path, places, size, numbers)
    return list(found.values())
