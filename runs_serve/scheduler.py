"""Which texts the next step works on: first come, first served, and no step waits for anybody.

    add --> waiting --admit--> running --remove--> done
                ^                 |
                +---- preempt ----+       blocks ran out: the youngest waits again, in front

A batch that is put together once is as long as its longest text, and whoever comes meanwhile waits for its
end. Here the batch is put together for each step anew: who ends leaves, who waits takes the free place. A
step is one token for each text whose prompt was read, and then a chunk of the prompts that were not.

    step        1         2         3         4
    text A    prompt    token     token     token
    text B              prompt    token     end
    text C                        prompt    prompt         a long one, in two chunks

The step in which a prompt ends makes the first token too.

A text is admitted if there are blocks for all that it has to read, and one more for each that runs. Later it
takes a block when its last one is full. If none is left then, the youngest text gives all of its blocks back
and waits; when its turn comes it reads its prompt and what it had written, and goes on as if nothing had
been. So whoever runs is older than whoever waits, and the oldest is never sent away: all come to an end.

This page knows blocks and no tensors. Proof: tests/test_serve.py.
"""

from collections import deque
from dataclasses import dataclass, field

from runs_serve.request import Request
from runs_ss.lookup import Index


@dataclass(eq=False)
class Sequence:
    """One text that is being written: a request has one for each of its choices."""

    number: int  # of the request
    choice: int
    request: Request
    end: int  # it has at most so many tokens
    first: "Sequence | None" = None  # the first choice, whose blocks the others begin with
    tokens: list = field(default_factory=list)  # the prompt and what was written
    stream: object = None  # a TextStream, where there is a tokenizer
    generator: object = None  # of the numbers that its tokens are drawn by
    index: Index = field(default_factory=Index)  # what followed which tokens: to draft by
    drafts: list = field(default_factory=list)  # what may follow, read in this step to be checked
    num_cached: int = 0  # so many of its tokens the model has read
    table: list = field(default_factory=list)  # its blocks
    names: list = field(default_factory=list)  # of its full blocks
    place: int | None = None  # in the memory that has no blocks
    num_found: int | None = None  # tokens that others had read, when this text was first admitted

    @property
    def num_unread(self):
        return len(self.tokens) - self.num_cached


class Scheduler:
    """Two lists of sequences, and who of them has which blocks."""

    def __init__(self, blocks, memory, max_running, shares=True):
        """shares: whether texts with the same beginning share blocks."""
        self.blocks, self.memory, self.shares = blocks, memory, shares
        self.waiting, self.running = deque(), []
        self.free_places = deque(range(max_running))
        self.num_preempted = self.num_read = self.num_found = self.num_sought = 0

    def add(self, sequence):
        self.waiting.append(sequence)

    def remove(self, sequence):
        """It ended, or nobody wants it any more."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.give_back(sequence)
        else:
            self.waiting.remove(sequence)

    def to_decode(self):
        """The running sequences with one token to read, and room for it: the batch of this step."""
        rows = []
        for sequence in list(self.running):  # from the oldest; those behind it may be sent away meanwhile
            is_there = sequence in self.running and sequence.num_unread == 1
            if is_there and self.make_room(sequence, len(sequence.tokens)):
                rows.append(sequence)
        return rows

    def to_read(self):
        """The next sequence with more than one token to read, admitted if need be; None: there is none."""
        for sequence in self.running:
            if sequence.num_unread > 1:
                return sequence
        while (sequence := self.admit()) is not None:
            if sequence.num_unread > 1:
                return sequence
        return None

    def admit(self):
        """The next that waits, now running; None if there is none, or no room for it."""
        if not (self.waiting and self.free_places):
            return None
        sequence = self.waiting[0]
        table, num_cached = self.known_beginning(sequence)
        for block in table:
            self.blocks.share(block)
        # A block that is shared in part is copied before it is written on.
        num_needed = self.blocks.num_for(len(sequence.tokens)) - num_cached // self.blocks.block_size
        if self.running and num_needed + len(self.running) > self.blocks.num_available:
            for block in table:
                self.blocks.release(block)
            return None
        self.running.append(self.waiting.popleft())
        sequence.table, sequence.num_cached = table, num_cached
        sequence.names = self.blocks.names_of(sequence.tokens[:num_cached])
        sequence.place = self.free_places.popleft()
        self.memory.begin(sequence.place)
        self.make_room(sequence, len(sequence.tokens))
        self.num_found += num_cached
        sequence.num_found = num_cached if sequence.num_found is None else sequence.num_found
        self.num_sought += len(sequence.tokens)
        return sequence

    def known_beginning(self, sequence):
        """(blocks that hold the beginning of a text, how many of its tokens that is: not all of them)."""
        most, first = len(sequence.tokens) - 1, sequence.first
        if not self.shares:
            return [], 0
        # Another choice of a prompt begins with the prompt's blocks, the last one too, though it is not full.
        if first in self.running and first.num_cached >= len(sequence.request.prompt):
            num_cached = min(most, len(sequence.request.prompt))
            return first.table[: self.blocks.num_for(num_cached)], num_cached
        table = self.blocks.find(self.blocks.names_of(sequence.tokens[:most]))
        return table, len(table) * self.blocks.block_size

    def make_room(self, sequence, end):
        """Blocks for the tokens from the next one up to `end`; False if the sequence itself had to go."""
        while not self.take_blocks(sequence, end):
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def take_blocks(self, sequence, end):
        """Blocks to write the tokens into from the next one up to `end`; False if there are too few."""
        blocks, table, start = self.blocks, sequence.table, sequence.num_cached // self.blocks.block_size
        shared = [n for n in range(start, len(table)) if not blocks.is_private(table[n])]
        num_missing = max(0, blocks.num_for(end) - len(table))
        if num_missing + len(shared) > blocks.num_available:
            return False
        for n in shared:
            copy = blocks.take()
            self.memory.copy_block(table[n], copy)
            blocks.release(table[n])
            table[n] = copy
        table += [blocks.take() for _ in range(num_missing)]
        return True

    def preempt(self, sequence):
        self.num_preempted += 1
        self.running.remove(sequence)
        self.give_back(sequence)
        self.waiting.appendleft(sequence)

    def give_back(self, sequence):
        """Its blocks and its place; what it has read is forgotten."""
        for block in sequence.table:
            self.blocks.release(block)
        self.free_places.append(sequence.place)
        sequence.table, sequence.names, sequence.drafts = [], [], []
        sequence.num_cached, sequence.place = 0, None

    def note_read(self, sequence, num_tokens):
        """The model has read its next tokens: blocks that are full now get their names."""
        sequence.num_cached += num_tokens
        self.num_read += num_tokens
        known, full = len(sequence.names), sequence.num_cached // self.blocks.block_size
        if self.shares and full > known:
            sequence.names = self.blocks.names_of(sequence.tokens[: sequence.num_cached], sequence.names)
            for block, name in zip(sequence.table[known:], sequence.names[known:]):
                self.blocks.give_name(block, name)
