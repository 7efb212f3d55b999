"""OpenAI's protocol: what a client may ask, checked field by field, and the form of what it is told.

    POST /v1/completions        a text goes on                  CompletionRequest -> completion(...)
    POST /v1/chat/completions   a conversation is answered      ChatRequest       -> completion(...)
    POST /v1/embeddings         texts become vectors            EmbeddingRequest  -> embeddings(...)

A field of theirs is one of four things here:

    used      it does what OpenAI's reference says (platform.openai.com/docs/api-reference)
    inert     IGNORED below: it is about bills, users and data centres, and changes no text
    refused   NOT_HERE below: it would change the text, and this server cannot do it; its default is allowed
    unknown   most likely a typo, which is named, since a field that is silently dropped costs somebody a day

Of their fields this server adds two, top_k and min_p, by `extra_body` of the Python client. Where a request
says nothing of sampling, the checkpoint's generation_config.json decides, as in run.py.

Proof: tests/test_app.py, with the `openai` package as the client.
"""

import base64
import time
import uuid
from typing import Any, Literal

import numpy
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Limits on what one request may ask; the server's own --max-tokens and --max-body come on top.
MAX_CHOICES = 16  # texts in one answer: prompts times n
MAX_STOPS, MAX_STOP_LENGTH = 4, 256  # of stop strings, and of characters in one
MAX_LOGPROBS = 20  # alternatives shown at each token
MAX_INPUTS = 256  # texts of one request for embeddings
DEFAULT_MAX_TOKENS = 16  # of a completion, as the protocol has it; a chat's answer ends where it ends

IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "moderation", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "verbosity"),
}
# What may be said of a field that is not done here: null, or one of these.
NOT_HERE = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "dimensions": (),
}


class Refused(Exception):
    """What a client is told instead of an answer. status: of HTTP. param: the field that is to blame."""

    def __init__(self, message, status=400, param=None, code=None, kind="invalid_request_error"):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# What is asked ----------------------------------------------------------------------------------------------


class Asked(BaseModel):
    """Any request. Types are taken at their word: "5" is no number, and neither is NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model: str

    @model_validator(mode="before")
    @classmethod
    def drop_what_changes_nothing(cls, fields: Any):
        if not isinstance(fields, dict):
            return fields
        for name, allowed in NOT_HERE.items():
            if fields.get(name) is not None and fields[name] not in allowed:
                raise Refused(f"{name}: this server does not do that; leave it out", param=name)
        return {
            name: value
            for name, value in fields.items()
            if value is not None and name not in IGNORED and name not in NOT_HERE
        }


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class Writing(Asked):
    """What a completion and a chat have in common. None: as the checkpoint says."""

    max_tokens: int | None = Field(None, ge=1, le=2**31)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @field_validator("stop", mode="before")
    @classmethod
    def some_stop_strings(cls, stop: Any):
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
            raise ValueError("give a text or a list of texts")
        if len(stops) > MAX_STOPS or not all(0 < len(each) <= MAX_STOP_LENGTH for each in stops):
            raise ValueError(f"give at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters")
        return stops

    @model_validator(mode="after")
    def options_of_a_stream(self):
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ValueError("stream_options goes with stream; leave it out, or give stream: true")
        return self

    @property
    def num_logprobs(self):
        """How many alternatives to show at each token; None: no probabilities are asked for."""
        return self.logprobs


class CompletionRequest(Writing):
    prompt: Any  # a text, token ids, or a list of either
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @field_validator("prompt")
    @classmethod
    def texts_or_ids(cls, prompt: Any):
        return as_list(prompt, MAX_CHOICES)

    @model_validator(mode="after")
    def what_goes_together(self):
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise ValueError(
                f"{len(self.prompt)} prompts times n = {self.n} is more than {MAX_CHOICES} texts"
            )
        if self.echo and self.logprobs is not None:
            raise ValueError(
                "echo and logprobs: the prompt's own probabilities are not kept; give one of them"
            )
        return self

    @property
    def most_tokens(self):
        return self.max_tokens or DEFAULT_MAX_TOKENS


class ChatRequest(Writing):
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @field_validator("messages")
    @classmethod
    def of_text(cls, messages: list):
        return [spoken(message) for message in messages]

    @model_validator(mode="after")
    def what_goes_together(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs; give logprobs: true")
        return self

    @property
    def most_tokens(self):
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self):
        return (self.top_logprobs or 0) if self.logprobs else None


class EmbeddingRequest(Asked):
    input: Any  # a text, token ids, or a list of either
    encoding_format: Literal["float", "base64"] = "float"

    @field_validator("input")
    @classmethod
    def texts_or_ids(cls, given: Any):
        return as_list(given, MAX_INPUTS)


def as_list(given, most):
    """One text, one list of ids, or up to `most` of either: always as a list of these.

    >>> as_list("a", 9), as_list([1, 2], 9), as_list(["a", [1, 2]], 9)
    (['a'], [[1, 2]], ['a', [1, 2]])
    """
    several = [given] if isinstance(given, str) or is_ids(given) else given
    if not isinstance(several, list) or not all(isinstance(each, str) or is_ids(each) for each in several):
        raise ValueError("give a text, a list of texts, token ids, or a list of lists of token ids")
    if not 1 <= len(several) <= most:
        raise ValueError(f"give 1 to {most} texts")
    return several


def is_ids(value):
    return isinstance(value, list) and bool(value) and all(type(id) is int and id >= 0 for id in value)


def spoken(message):
    """A message as {role, content, perhaps name}, its content one text; the protocol also has it in parts.

    An answer that comes back has fields of its own, such as tool_calls; nothing may be in them.
    """
    message = {name: value for name, value in message.items() if value not in (None, [])}
    if not isinstance(message.get("role"), str):
        raise ValueError('a message is an object like {"role": "user", "content": "Hi"}')
    if strange := sorted(set(message) - {"role", "content", "name"}):
        raise ValueError(f"{strange[0]} of a message: this server does not do that; leave it out")
    content = message.get("content", "")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError("this model reads text; a content is a text, or parts of type text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not isinstance(message.get("name", ""), str):
        raise ValueError("a content is a text, or parts of type text; a name is a text")
    return message | {"content": content}


# What is answered -------------------------------------------------------------------------------------------


class Answer:
    """The objects of one answer, all with the same id: whole, or in the chunks of a stream."""

    def __init__(self, model, is_chat):
        self.is_chat = is_chat
        self.head = {"id": ("chatcmpl-" if is_chat else "cmpl-") + uuid.uuid4().hex}
        self.head |= {"created": int(time.time()), "model": model}

    def whole(self, choices, usage):
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self.head | {"object": kind, "choices": choices, "usage": usage}

    def choice(self, index, text, logprobs, finish_reason):
        said = {"text": text}
        if self.is_chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}

    def chunk(self, choices, **more):
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self.head | {"object": kind, "choices": choices} | more

    def piece(self, index, text, logprobs=None, finish_reason=None, role=None):
        said = {"text": text}
        if self.is_chat:
            role = {"role": role} if role else {}
            said = {"delta": role | ({"content": text} if text or role else {})}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs(self, tokens, offset=0):
        """Tokens as (text, bytes, logprob, [(text, bytes, logprob), ...]) in the form of this endpoint.

        offset: where, in the text of the answer, the first of them begins.
        """
        if self.is_chat:
            content = [
                chat_token(*own) | {"top_logprobs": [chat_token(*other) for other in others]}
                for *own, others in tokens
            ]
            return {"content": content, "refusal": None}
        texts = [text for text, *_ in tokens]
        # By text, the most probable last: it stays where two tokens read the same.
        tops = [{t: p for t, _, p in [*reversed(others), (text, _, p)]} for text, _, p, others in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [logprob for _, _, logprob, _ in tokens],
            "top_logprobs": tops,
            "text_offset": [offset + sum(map(len, texts[:n])) for n in range(len(texts))],
        }


def chat_token(text, content, logprob):
    return {"token": text, "bytes": content, "logprob": logprob}


def usage(num_prompt, num_found, num_made):
    """num_found: tokens of the prompts that were known from others, and cost nothing."""
    return {
        "prompt_tokens": num_prompt,
        "prompt_tokens_details": {"cached_tokens": num_found},
        "completion_tokens": num_made,
        "total_tokens": num_prompt + num_made,
    }


def embeddings(model, vectors, num_tokens, encoding_format):
    """Vectors as lists, or in base64, which the Python client asks for: fp32, the low byte first."""
    data = []
    for index, vector in enumerate(vectors):
        if encoding_format == "base64":
            vector = base64.b64encode(numpy.asarray(vector, dtype="<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    used = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": used}


def refusal_of(errors):
    """The first of pydantic's errors in the protocol's form."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "str", "list[str]")]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        said = "no field of this request is called so; see runs_serve/README.md"
    elif first["type"] == "missing":
        said = "is missing"
    else:
        said = first["msg"].removeprefix("Value error, ")
    return Refused(f"{param}: {said}" if param else said, param=param)
