"""What is asked of the engine, and what comes back: a Request goes in, Events come out, one for each token.

    number = engine.add(Request(prompt=[1, 40, 50], max_new_tokens=20, seed=7))
    for event in engine.step():
        event.request == number, event.token, event.text, event.finish_reason

Proof: tests/test_serve.py.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from models.utils.errors import UserError
from models.utils.sampling import GREEDY, Sampling

STOP, LENGTH, ERROR = "stop", "length", "error"  # why a text ended


@dataclass(frozen=True)
class Request:
    prompt: list  # token ids
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    seed: int = 0  # of the first choice; the second draws as seed + 1 would, and so on
    eos_ids: frozenset = frozenset()
    stop_strings: tuple = ()
    num_choices: int = 1  # how many texts continue this prompt
    num_logprobs: int | None = None  # 0: of the token itself; n: of the n most probable too
    num_draft_tokens: int = 0  # drafts by prompt lookup (runs_ss/lookup.py), at most so many a step; 0: none


class Event(NamedTuple):
    """A new token of a text, or its end without one (token None: the model computed NaN)."""

    request: int  # the number that Engine.add gave
    choice: int  # which of its texts: 0 to num_choices - 1
    token: int | None
    text: str  # what can be shown now; "" where the engine has no tokenizer, or text is held back
    finish_reason: str | None = None  # at the end: STOP (EOS or a stop string), LENGTH, ERROR
    logprob: float | None = None  # natural logarithm of the token's probability, before sampling options
    top_logprobs: list | None = None  # (token, logprob), the most probable first
    num_found: int = 0  # with a text's first token: tokens of its prompt that were known, and not read again


@dataclass
class Completion:
    """A whole text, as Engine.generate returns it."""

    tokens: list = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list = field(default_factory=list)  # of each token, where the request asked for them
    top_logprobs: list = field(default_factory=list)  # of each token a list of (token, logprob)

    def add(self, event):
        """Take in the text's next event."""
        self.text += event.text
        self.finish_reason = event.finish_reason
        if event.token is not None:
            self.tokens.append(event.token)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
            self.top_logprobs.append(event.top_logprobs)


def check_request(request, tokenizer):
    """UserError for what no engine can do; the prompt's length is the engine's business."""
    for name, smallest in (("max_new_tokens", 1), ("num_choices", 1), ("num_draft_tokens", 0)):
        if getattr(request, name) < smallest:
            raise UserError(f"{name} is {getattr(request, name)}; give {smallest} or more")
    if request.num_logprobs is not None and request.num_logprobs < 0:
        raise UserError(f"num_logprobs is {request.num_logprobs}; give 0 or more")
    if min(request.prompt, default=0) < 0:
        raise UserError(f"token {min(request.prompt)} is negative; ids of tokens begin at 0")
    if request.stop_strings and tokenizer is None:
        raise UserError("stop strings need a tokenizer, and this engine has none")
