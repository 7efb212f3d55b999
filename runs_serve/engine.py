"""The engine: many requests share one model, one step at a time.

    engine = Engine(model, tokenizer)
    completions = engine.generate(requests)            many requests, to their end
    for event in engine.stream(request): ...           one request, token by token
    number = engine.add(request); engine.step()        or step by step: what app.py does

A step makes one token for every text that runs, in one pass of the model, and then reads a chunk of prompts.
The weights are read from memory once for all, and that is most of what a token costs: 32 texts take little
longer than one. Which texts a step works on, scheduler.py decides; where their past is kept, paged_cache.py.

    step --> events        scheduler: who?   memory.lend: a cache   model: logits   pick: tokens   end?

Every text gets the tokens that it gets alone: greedily the same up to rounding (a product of more rows may
be summed in another order), sampled the same for the same seed, since each has a generator of its own.

Proof: tests/test_serve.py.
"""

from collections import defaultdict

import torch

from models.utils.errors import UserError
from models.utils.sampling import pick, seeded_generators
from runs_ar.generate import TextStream, check_prompts
from runs_serve.blocks import NOBODY, Blocks
from runs_serve.paged_cache import Memory
from runs_serve.request import ERROR, LENGTH, STOP, Completion, Event
from runs_serve.scheduler import Scheduler, Sequence


class Engine:
    def __init__(
        self,
        model,
        tokenizer=None,  # without one, events have no text, and no request stop strings
        num_blocks=256,
        block_size=16,  # tokens
        max_running=32,  # texts at once
        chunk=256,  # tokens of prompts that a step reads
    ):
        self.model, self.tokenizer, self.chunk = model, tokenizer, chunk
        context = model.config.max_seq_len
        self.max_slots = min(context, num_blocks * block_size)
        self.memory = Memory(model, num_blocks, block_size, max_running, self.max_slots)
        self.blocks = Blocks(num_blocks, block_size)
        self.scheduler = Scheduler(self.blocks, self.memory, max_running, shares=self.memory.is_all_paged)
        self.num_requests = self.num_steps = self.num_tokens_read = self.num_tokens_made = 0
        self.last_batch_size = 0

    # Requests -----------------------------------------------------------------------------------------------

    def add(self, request):
        """Its number; UserError for one that can never be answered. Its tokens come with the next steps."""
        check_prompts(self.model.config, [request.prompt])
        end = min(len(request.prompt) + request.max_new_tokens, self.model.config.max_seq_len)
        # The last token of a text is never read.
        if end - 1 > self.max_slots:
            raise UserError(
                f"{len(request.prompt)} tokens and {request.max_new_tokens} new ones do not fit into "
                f"{self.blocks.num_blocks} blocks of {self.blocks.block_size}; ask for less, or give more blocks"
            )
        if request.stop_strings and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and this engine has none")
        number, first = self.num_requests, None
        self.num_requests += 1
        generators = seeded_generators(request.seed, request.num_choices)
        for choice, generator in enumerate(generators):
            sequence = Sequence(
                number, choice, request, end, first, list(request.prompt), generator=generator
            )
            if self.tokenizer:
                sequence.stream = TextStream(self.tokenizer, request.prompt, request.stop_strings)
            self.scheduler.add(sequence)
            first = first or sequence
        return number

    def cancel(self, number):
        """Nobody waits for this request any more; no event tells of it."""
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            if sequence.number == number:
                self.scheduler.remove(sequence)

    @property
    def has_work(self):
        return bool(self.scheduler.running or self.scheduler.waiting)

    def stream(self, request):
        """The events of one request. Who stops listening cancels it."""
        number = self.add(request)
        num_open = request.num_choices
        try:
            while num_open:
                for event in self.step():
                    if event.request == number:
                        num_open -= event.finish_reason is not None
                        yield event
        finally:
            self.cancel(number)

    def generate(self, requests):
        """For each request the list of its Completions, one for each choice."""
        numbers = [self.add(request) for request in requests]
        made = {
            (number, choice): Completion()
            for number, request in zip(numbers, requests)
            for choice in range(request.num_choices)
        }
        while any(completion.finish_reason is None for completion in made.values()):
            for event in self.step():
                if (event.request, event.choice) in made:
                    made[event.request, event.choice].add(event)
        return [[made[n, c] for c in range(r.num_choices)] for n, r in zip(numbers, requests)]

    # A step -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self):
        """A token for each text that runs, then a chunk of the prompts; the events of both."""
        events = []
        rows = self.scheduler.to_decode()
        self.last_batch_size = len(rows)
        if rows:
            events += self.read(rows, [1] * len(rows))
        budget = self.chunk
        while budget > 0 and (sequence := self.scheduler.to_read()) is not None:
            count = min(budget, sequence.num_unread)
            events += self.read([sequence], [count])
            budget -= count
        self.num_steps += 1
        return events

    def read(self, rows, counts):
        """One pass of the model: each sequence's next tokens; a new token for those that have read all."""
        hidden = self.hidden(rows, counts)
        last = torch.stack([hidden[row, count - 1] for row, count in enumerate(counts)])
        is_finite = last.isfinite().all(dim=1).tolist()
        events, done = [], []
        for row, (sequence, count) in enumerate(zip(rows, counts)):
            if not is_finite[row]:
                events.append(self.end_with_error(sequence))
                continue
            self.scheduler.note_read(sequence, count)
            self.num_tokens_read += count
            if sequence.num_unread == 0:
                done.append(row)
        if done:
            logits = self.model.lm_head(last[done])
            tokens = self.pick([rows[row] for row in done], logits)
            for row, token, logit in zip(done, tokens, logits):
                events.append(self.advance(rows[row], token, logit))
        return events

    def hidden(self, rows, counts):
        """(B, T, D), of each sequence's next `count` tokens."""
        unread = [sequence.tokens[sequence.num_cached :][:count] for sequence, count in zip(rows, counts)]
        tokens = torch.tensor(unread, device=self.memory.device)  # (B, T)
        starts = torch.tensor([[sequence.num_cached] for sequence in rows], device=tokens.device)
        positions = starts + torch.arange(tokens.shape[1], device=tokens.device)
        is_beginning = len(rows) == 1 and rows[0].num_cached == 0
        tables, places = [sequence.table for sequence in rows], [sequence.place for sequence in rows]
        with self.memory.lend(tables, places) as cache:
            return self.model.hidden(tokens, None if is_beginning else positions, cache)

    def pick(self, rows, logits):
        """The next token of each row. Rows with the same options are picked together."""
        groups = defaultdict(list)
        for row, sequence in enumerate(rows):
            groups[sequence.request.sampling].append(row)
        tokens = [None] * len(rows)
        for sampling, members in groups.items():
            picked = pick(logits[members], sampling, [rows[row].generator for row in members])
            for row, token in zip(members, picked.tolist()):
                tokens[row] = token
        return tokens

    def advance(self, sequence, token, logits):
        """The text is one token longer, and perhaps at its end."""
        request, stream = sequence.request, sequence.stream
        sequence.tokens.append(token)
        self.num_tokens_made += 1
        text, reason = stream.push(token) if stream else "", None
        if token in request.eos_ids or (stream and stream.stopped):
            reason = STOP
        elif len(sequence.tokens) == sequence.end:
            reason = LENGTH
        if reason:
            text += stream.finish() if stream else ""
            self.scheduler.remove(sequence)
        logprobs = logprobs_of(logits, token, request.num_logprobs)
        return Event(sequence.number, sequence.choice, token, text, reason, *logprobs)

    def end_with_error(self, sequence):
        """The model computed NaN or infinity for this text. What it left in memory must not reach others."""
        table = sequence.table
        self.scheduler.remove(sequence)
        self.memory.wipe([NOBODY, *self.blocks.forget(table)])
        text = sequence.stream.finish() if sequence.stream else ""
        return Event(sequence.number, sequence.choice, None, text, ERROR)

    # What is going on ---------------------------------------------------------------------------------------

    def statistics(self):
        """Numbers for /metrics; those that begin with num_ but blocks and queue only ever grow."""
        scheduler = self.scheduler
        return {
            "num_waiting": len(scheduler.waiting),
            "num_running": len(scheduler.running),
            "batch_size": self.last_batch_size,
            "num_blocks": self.blocks.num_blocks,
            "num_blocks_in_use": self.blocks.num_in_use,
            "num_blocks_known": len(self.blocks.unused),
            "num_requests": self.num_requests,
            "num_steps": self.num_steps,
            "num_tokens_read": self.num_tokens_read,
            "num_tokens_made": self.num_tokens_made,
            "num_tokens_sought": scheduler.num_tokens_sought,
            "num_tokens_found": scheduler.num_tokens_found,
            "num_preempted": scheduler.num_preempted,
        }

    def picture(self):
        """The sequences as they stand, running ones first: for who wants to draw them."""
        return [
            {
                "request": sequence.number,
                "choice": sequence.choice,
                "is_running": sequence.place is not None,
                "num_prompt": len(sequence.request.prompt),
                "num_tokens": len(sequence.tokens),
                "num_cached": sequence.num_cached,
                "blocks": list(sequence.table),
            }
            for sequence in [*self.scheduler.running, *self.scheduler.waiting]
        ]


def logprobs_of(logits, token, num):
    """(logprob of the token, the `num` most probable ones as (token, logprob)); None for what nobody asked."""
    if num is None:
        return None, None
    logprobs = logits.float().log_softmax(dim=-1)
    best = logprobs.topk(min(num, len(logprobs)))
    return logprobs[token].item(), list(zip(best.indices.tolist(), best.values.tolist()))
