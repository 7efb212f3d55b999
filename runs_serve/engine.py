"""The engine: many requests share one model, one step at a time.

    engine = Engine(model, tokenizer)
    completions = engine.generate(requests)            many requests, to their end
    for event in engine.stream(request): ...           one request, token by token
    number = engine.add(request); engine.step()        or step by step: what app.py does

A step makes one token for every text that runs, in one pass of the model, and then reads a chunk of prompts:

    who? --scheduler--> rows --memory.lend--> cache --model--> logits --pick--> tokens --end?--> events

The weights are read from memory once for all of the rows, and that is most of what a token costs alone.
scheduler.py decides which texts a step works on, paged_cache.py keeps their past. A model of compile_decoding
makes its tokens in a compiled step, one for a single text and one for any number of them up to 32; prompts
and drafts are read as the model is written.

Every text gets the tokens that it gets alone, up to rounding (a product of more rows may be summed in another
order): greedily, and sampled with the same seed, since each has a generator of its own.

Drafts come from the text itself (runs_ss/lookup.py) and are read together with its last token. A draft is
taken if it is the token that is picked in its place. Where tokens are drawn that is the rule of speculate.py,
for a draft x without alternatives: it passes with probability p(x), and what is drawn otherwise follows p
without x. So drafts change no text, not even a sampled one.

Shapes: B rows, T tokens of each in this call, D features, V vocabulary.
Proof: tests/test_serve.py, tests/test_serve_compiled.py.
"""

from collections import defaultdict

import torch

from models.utils.errors import UserError
from models.utils.kernels.row_attention import load_row_attention
from models.utils.sampling import pick, seeded_generators
from runs_ar.generate import TextStream, check_prompts
from runs_serve.blocks import NOBODY, Blocks
from runs_serve.paged_cache import Memory, Plan
from runs_serve.request import ERROR, LENGTH, STOP, Completion, Event, check_request
from runs_serve.scheduler import Scheduler, Sequence


class Engine:
    """num_blocks: of memory; None: as many as a share of the free memory has room for."""

    def __init__(
        self,
        model,
        tokenizer=None,  # without one, events have no text, and requests no stop strings
        num_blocks=None,
        memory_share=0.5,
        block_size=16,  # tokens
        max_running=32,  # texts at once
        max_tokens=None,  # of a text with its prompt; None: the model's context
        chunk=256,  # tokens of prompts that a step reads
        max_draft_tokens=4,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.chunk, self.max_draft_tokens = chunk, max_draft_tokens
        context = model.config.max_seq_len
        self.max_tokens = min(context, max_tokens or context)
        as_written = getattr(model, "model", model)  # of one that is compiled
        plan = Plan(as_written, self.max_tokens, block_size, max_draft_tokens)
        num_blocks = num_blocks or plan.num_blocks(memory_share, max_running)
        self.max_slots = min(self.max_tokens, num_blocks * block_size)  # tokens of a text that can be read
        self.memory = Memory(plan, num_blocks, max_running)
        self.make_ready(model, max_running)
        self.blocks = Blocks(num_blocks, block_size)
        self.scheduler = Scheduler(self.blocks, self.memory, max_running, shares=self.memory.is_all_paged)
        self.num_requests = self.num_steps = self.num_tokens_made = 0
        self.num_drafts = self.num_drafts_accepted = self.last_batch_size = 0

    def make_ready(self, model, max_running):
        """What is compiled when it is first needed, before the first request needs it."""
        if self.memory.device.type == "cpu":
            load_row_attention()
        for num_rows in {1, min(2, max_running)} if hasattr(model, "prepare") else ():
            with self.memory.lend([[NOBODY] * 3] * num_rows, list(range(num_rows))) as cache:
                model.prepare(cache)

    # Requests -----------------------------------------------------------------------------------------------

    def add(self, request):
        """Its number; UserError for one that can never be answered. Its tokens come with the next steps."""
        check_request(request, self.tokenizer)
        check_prompts(self.model.config, [request.prompt])
        end = min(len(request.prompt) + request.max_new_tokens, self.max_tokens)
        # The last token of a text is never read.
        if len(request.prompt) >= end or self.blocks.num_for(end - 1) > self.blocks.num_blocks:
            most = min(self.max_tokens, self.blocks.num_blocks * self.blocks.block_size + 1)
            raise UserError(
                f"a prompt of {len(request.prompt)} tokens and up to {request.max_new_tokens} new ones are "
                f"more than the {most} tokens that a text may have here; shorten it, or ask for fewer"
            )
        number, first = self.num_requests, None
        self.num_requests += 1
        for choice, generator in enumerate(seeded_generators(request.seed, request.num_choices)):
            sequence = Sequence(number, choice, request, end, first, list(request.prompt))
            sequence.generator = generator
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
        events, groups = [], defaultdict(list)
        rows = self.scheduler.to_decode()
        for sequence in rows:
            sequence.drafts = self.drafts(sequence)
            groups[len(sequence.drafts)].append(sequence)
        for group in groups.values():
            events += self.read(group, [1] * len(group))
        budget = self.chunk
        while budget > 0 and (sequence := self.scheduler.to_read()) is not None:
            count = min(budget, sequence.num_unread)
            events += self.read([sequence], [count])
            budget -= count
        self.num_steps, self.last_batch_size = self.num_steps + 1, len(rows)
        return events

    def read(self, rows, counts):
        """One pass of the model: each sequence's next `count` tokens and its drafts, as many for all rows.

        Where a sequence has read all its tokens, a new one is picked. If that is what was drafted, the draft
        is read already, and another is picked.
        """
        logits = self.logits(rows, counts)  # (B, 1 + drafts, V)
        # What is not finite before the head is so in each of its sums.
        is_finite = logits[:, -1, 0].isfinite().tolist()
        events = [self.end_with_error(sequence) for sequence, fine in zip(rows, is_finite) if not fine]
        rows_left = [row for row, fine in enumerate(is_finite) if fine]
        for row in rows_left:
            self.scheduler.note_read(rows[row], counts[row])
        rows_left = [row for row in rows_left if rows[row].num_unread == 0]
        if not rows_left:
            return events
        for place in range(logits.shape[1]):
            tokens = self.pick([rows[row] for row in rows_left], logits[rows_left, place])
            for row, token in zip(rows_left, tokens):
                events.append(self.advance(rows[row], token, logits[row, place]))
            rows_left = [row for row in rows_left if self.accepts(rows[row], place)]
            if not rows_left:
                break
        return events

    def drafts(self, sequence):
        """What may follow, by prompt lookup, if there is room: no text is sent away for a draft."""
        num = min(sequence.request.num_draft_tokens, self.max_draft_tokens)
        num = min(num, sequence.end - len(sequence.tokens) - 1)
        drafts = sequence.index.continuation(sequence.tokens, num) if num > 0 else []
        if not self.scheduler.take_blocks(sequence, len(sequence.tokens) + len(drafts)):
            return []
        self.num_drafts += len(drafts)
        return drafts

    def accepts(self, sequence, place):
        """Whether the token just picked is the draft that was read in its place."""
        if sequence.place is None or sequence.tokens[-1:] != sequence.drafts[place : place + 1]:
            return False
        self.num_drafts_accepted += 1
        self.scheduler.note_read(sequence, 1)
        return True

    def logits(self, rows, counts):
        """(B, 1 + drafts, V), behind each sequence's next `count` tokens and behind each of its drafts."""
        tokens = [row.tokens[row.num_cached :][:count] + row.drafts for row, count in zip(rows, counts)]
        tokens = torch.tensor(tokens, device=self.memory.device)  # (B, T)
        starts = torch.tensor([[sequence.num_cached] for sequence in rows], device=tokens.device)
        positions = starts + torch.arange(tokens.shape[1], device=tokens.device)
        is_beginning = len(rows) == 1 and rows[0].num_cached == 0
        tables, places = [sequence.table for sequence in rows], [sequence.place for sequence in rows]
        with self.memory.lend(tables, places) as cache:
            if counts[0] == 1 and not is_beginning:
                return self.model(tokens, positions, cache)
            hidden = self.model.hidden(tokens, None if is_beginning else positions, cache)  # (B, T, D)
        return self.model.lm_head(hidden[:, counts[0] - 1 :])

    def pick(self, rows, logits):
        """The next token of each row. Rows with the same options are picked together."""
        groups = defaultdict(list)
        for row, sequence in enumerate(rows):
            groups[sequence.request.sampling].append(row)
        tokens = [None] * len(rows)
        for sampling, members in groups.items():
            those = logits if len(groups) == 1 else logits[members]
            picked = pick(those, sampling, [rows[row].generator for row in members])
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
        num_found = sequence.num_found if len(sequence.tokens) == len(request.prompt) + 1 else 0
        return Event(sequence.number, sequence.choice, token, text, reason, *logprobs, num_found)

    def end_with_error(self, sequence):
        """The model computed NaN or infinity for this text. What it left in memory must not reach others."""
        table = sequence.table
        self.scheduler.remove(sequence)
        self.memory.wipe([NOBODY, *self.blocks.forget(table)])
        text = sequence.stream.finish() if sequence.stream else ""
        return Event(sequence.number, sequence.choice, None, text, ERROR)

    # What is going on ---------------------------------------------------------------------------------------

    def statistics(self):
        """Numbers for /metrics: how things stand, then what has been counted since the start."""
        scheduler, blocks = self.scheduler, self.blocks
        return {
            "num_waiting": len(scheduler.waiting),
            "num_running": len(scheduler.running),
            "batch_size": self.last_batch_size,  # of the last step: texts that it decoded
            "num_blocks": blocks.num_blocks,
            "num_blocks_in_use": blocks.num_in_use,
            "num_blocks_known": len(blocks.unused),  # in no use, and found by who has the same prompt
            "num_requests": self.num_requests,
            "num_steps": self.num_steps,
            "num_tokens_read": scheduler.num_read,
            "num_tokens_made": self.num_tokens_made,
            "num_tokens_sought": scheduler.num_sought,  # of texts when they were admitted
            "num_tokens_found": scheduler.num_found,  # those of them that were not computed again
            "num_preempted": scheduler.num_preempted,
            "num_drafts": self.num_drafts,
            "num_drafts_accepted": self.num_drafts_accepted,
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
    """(logprob of the token, the `num` most probable ones as (token, logprob)); None if nobody asked."""
    if num is None:
        return None, None
    logprobs = logits.float().log_softmax(dim=-1)
    best = logprobs.topk(min(num, len(logprobs)))
    return logprobs[token].item(), list(zip(best.indices.tolist(), best.values.tolist()))
