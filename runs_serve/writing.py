"""From what a client asks to requests of the engine, and from the engine's events to what the client reads.

    messages --template--> token ids --> requests --> engine --> events --> chunks of a stream, or one answer

Proof: tests/test_app.py.
"""

import dataclasses
import random
from pathlib import Path

from runs_ar.chat import end_of_turn_ids
from runs_ar.generate import check_prompts, generation_defaults
from runs_serve.protocol import Answer, ChatRequest, Refused, usage
from runs_serve.request import ERROR, STOP, Request

SAMPLING = ("temperature", "top_p", "top_k", "min_p")
LEAST_LOGPROB = -9999.0  # of what is impossible; JSON has no infinity
BROKEN = "the model failed at this text; others go on"


class Writer:
    """What a checkpoint brings along to write: its tokenizer, its defaults, how its turns end."""

    def __init__(self, checkpoint, context, max_tokens, num_draft_tokens=0):
        """context: tokens of a text with its prompt; max_tokens: new ones; num_draft_tokens: by lookup."""
        self.config, self.tokenizer = checkpoint.config, checkpoint.tokenizer
        self.context, self.max_tokens, self.num_draft_tokens = context, max_tokens, num_draft_tokens
        self.sampling, self.eos_ids = generation_defaults(checkpoint.folder, self.tokenizer)
        self.chats = self.tokenizer.chat_template is not None
        self.turn_ids = self.eos_ids | (end_of_turn_ids(self.tokenizer) if self.chats else frozenset())

    def requests(self, asked):
        """One request of the engine for each prompt; Refused or UserError where that cannot be done.

        It takes a while: the text is cut into tokens, and a chat goes through its template.
        """
        is_chat = isinstance(asked, ChatRequest)
        if is_chat:
            prompts = [self.tokenizer.encode_chat(asked.messages)]
        else:
            encode = self.tokenizer.encode
            prompts = [encode(each) if isinstance(each, str) else each for each in asked.prompt]
        seed = random.randrange(2**62) if asked.seed is None else asked.seed % 2**62
        return [
            Request(
                prompt=prompt,
                max_new_tokens=self.num_new_tokens(prompt, asked),
                sampling=self.sampling_of(asked),
                seed=seed,
                eos_ids=self.turn_ids if is_chat else self.eos_ids,
                stop_strings=tuple(asked.stop),
                num_choices=asked.n,
                num_logprobs=asked.num_logprobs,
                num_draft_tokens=self.num_draft_tokens,
            )
            for prompt in prompts
        ]

    def num_new_tokens(self, prompt, asked):
        if len(prompt) >= self.context:
            message = f"the prompt has {len(prompt)} tokens, the context only {self.context}; shorten it"
            raise Refused(message, code="context_length_exceeded")
        check_prompts(self.config, [prompt])
        if (asked.most_tokens or 0) > self.max_tokens:
            message = f"max_tokens is {asked.most_tokens}; this server writes at most {self.max_tokens}"
            raise Refused(message, param="max_tokens")
        return min(asked.most_tokens or self.max_tokens, self.context - len(prompt))

    def sampling_of(self, asked):
        """The checkpoint's own values where the request says nothing, as in run.py."""
        given = {name: getattr(asked, name) for name in SAMPLING if getattr(asked, name) is not None}
        if given and self.sampling.greedy:
            given.setdefault("temperature", 1.0)  # who asks for top_p wants to sample
        return dataclasses.replace(self.sampling, **given)

    def chars_per_token(self):
        """Of Python code, for which this page stands."""
        text = Path(__file__).read_text(encoding="utf-8")
        return len(text) / len(self.tokenizer.encode(text))

    # Words --------------------------------------------------------------------------------------------------

    def spelt(self, token):
        """A token as (text, bytes or None): a special one by its name, half a character as "�"."""
        content = self.tokenizer.token_bytes(token) if token < self.tokenizer.vocab_size else b""
        if content is not None:
            return content.decode(errors="replace"), list(content)
        names = (name for name, id in self.tokenizer.special_tokens.items() if id == token)
        return next(names, ""), None

    def logprobs(self, event):
        """[(text, bytes, logprob, alternatives)] of an event; [] for the end of a text, which is no word."""
        if event.token is None or event.finish_reason == STOP and event.token in self.turn_ids:
            return []
        others = [(*self.spelt(token), rounded(p)) for token, p in event.top_logprobs or ()]
        return [(*self.spelt(event.token), rounded(event.logprob), others)]


def rounded(logprob):
    return max(round(logprob, 6), LEAST_LOGPROB)


class Reply:
    """One answer on its way: `whole()`, or `chunks()` as they come."""

    def __init__(self, asked, writer, stream, model):
        self.asked, self.writer, self.stream = asked, writer, stream
        self.answer = Answer(model, isinstance(asked, ChatRequest))
        self.num_prompt = sum(len(request.prompt) for request in stream.requests)
        self.num_found = self.num_made = 0
        self.lengths = [0] * len(self.beginnings())  # of each text so far, in characters

    def beginnings(self):
        """What each text begins with: nothing, or its prompt, where that is to be echoed."""
        if not getattr(self.asked, "echo", False):
            return [""] * len(self.stream.requests) * self.asked.n
        decode = self.writer.tokenizer.decode
        texts = [each if isinstance(each, str) else decode(each) for each in self.asked.prompt]
        return [text for text in texts for _ in range(self.asked.n)]

    async def events(self):
        """(which text, event) until all have ended; Refused where the model failed."""
        async for request, event in self.stream:
            if event.finish_reason == ERROR:
                self.stream.cancel()
                raise Refused(BROKEN, 500, kind="server_error")
            self.num_made += event.token is not None
            # The other choices of a prompt always find it.
            self.num_found += event.num_found if event.choice == 0 else 0
            yield request * self.asked.n + event.choice, event

    def logprobs(self, index, tokens):
        if self.asked.num_logprobs is None:
            return None
        return self.answer.logprobs(tokens, offset=self.lengths[index])

    async def whole(self):
        texts, reasons = self.beginnings(), [None] * len(self.lengths)
        tokens = [[] for _ in texts]
        self.lengths = [len(text) for text in texts]
        async for index, event in self.events():
            texts[index] += event.text
            reasons[index] = event.finish_reason
            if self.asked.num_logprobs is not None:
                tokens[index] += self.writer.logprobs(event)
        choices = [
            self.answer.choice(index, text, self.logprobs(index, tokens[index]), reasons[index])
            for index, text in enumerate(texts)
        ]
        return self.answer.whole(choices, usage(self.num_prompt, self.num_found, self.num_made))

    async def chunks(self):
        """The objects of a stream, in order."""
        more = {"usage": None} if self.asked.stream_options.include_usage else {}
        role = "assistant" if self.answer.is_chat else None
        for index, text in enumerate(self.beginnings()):
            if text or role:
                self.lengths[index] += len(text)
                yield self.answer.chunk([self.answer.piece(index, text, role=role)], **more)
        async for index, event in self.events():
            tokens = self.writer.logprobs(event) if self.asked.num_logprobs is not None else []
            said = self.logprobs(index, tokens) if tokens else None
            self.lengths[index] += sum(len(token[0]) for token in tokens)
            if event.text or said or event.finish_reason:
                piece = self.answer.piece(index, event.text, said, event.finish_reason)
                yield self.answer.chunk([piece], **more)
        if more:
            yield self.answer.chunk([], usage=usage(self.num_prompt, self.num_found, self.num_made))
