"""Who has which block: memory in blocks of a few tokens, so that nobody must know how long a text will be.

    tokens   a b c d e f g h i j        blocks of 4 tokens
    blocks   [7: a b c d] [2: e f g h] [9: i j . .]         the table of this text: 7, 2, 9

A text takes a block when it needs one, wherever that lies, and gives its blocks back at its end. What is
wasted is the rest of its last block, where a cache made for the longest text would waste most of itself.

Texts with the same beginning share its blocks. A block that is full has a name: a hash of its tokens and of
the name of the block before, so that equal names mean equal texts from the very start. Who comes with a
prompt looks up the names of its blocks, and computes only what nobody computed before. A block that nobody
uses any more keeps its name and its content until the memory is needed; what was not used for the longest
time goes first. Nobody writes into a block that others use, or that has a name: they take a copy
(`is_private`).

No tensor is in here: block 3 is the number 3. Block 0 is nobody's: what must be written somewhere and is
never read goes there.
Paper: Kwon et al. 2023, Efficient Memory Management for Large Language Model Serving with PagedAttention
(arXiv:2309.06180).
Proof: tests/test_serve.py.
"""

import hashlib
from collections import OrderedDict, deque

NOBODY = 0


class Blocks:
    """Each block is free, or in use, or unused: it has a name and is kept as long as there is room.

    >>> blocks = Blocks(num_blocks=3, block_size=2)
    >>> table = [blocks.take(), blocks.take()]
    >>> names = blocks.names_of([10, 11, 12, 13, 14])
    >>> for block, name in zip(table, names):
    ...     blocks.give_name(block, name)
    >>> for block in table:
    ...     blocks.release(block)
    >>> blocks.find(blocks.names_of([10, 11, 99, 13])) == table[:1]
    True
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.free = deque(range(1, num_blocks + 1))
        self.num_users = [0] * (num_blocks + 1)
        self.name_of = {}  # block -> name
        self.block_of = {}  # name -> block
        self.unused = OrderedDict()  # blocks with a name and no user; the longest unused first

    @property
    def num_available(self):
        return len(self.free) + len(self.unused)

    @property
    def num_in_use(self):
        return self.num_blocks - self.num_available

    def num_for(self, num_tokens):
        return -(-num_tokens // self.block_size)

    def take(self):
        """A block to write into; the caller has seen that one is available."""
        if self.free:
            block = self.free.popleft()
        else:
            block, _ = self.unused.popitem(last=False)
            del self.block_of[self.name_of.pop(block)]
        self.num_users[block] = 1
        return block

    def share(self, block):
        """One user more."""
        self.unused.pop(block, None)
        self.num_users[block] += 1

    def release(self, block):
        """One user less. Without any, a block with a name waits for somebody who needs its content."""
        self.num_users[block] -= 1
        if self.num_users[block] == 0:
            if block in self.name_of:
                self.unused[block] = None
            else:
                self.free.append(block)

    def is_private(self, block):
        """Whether its user may write into it."""
        return self.num_users[block] == 1 and block not in self.name_of

    def give_name(self, block, name):
        """What a full block holds. Two texts may have computed the same: then one of the two has the name."""
        if name not in self.block_of and block not in self.name_of:
            self.name_of[block], self.block_of[name] = name, block

    def forget(self, blocks):
        """Those of them that nobody uses now; what they hold is not to be found again."""
        unused = [block for block in blocks if self.num_users[block] == 0]
        for block in unused:
            if block in self.unused:
                del self.unused[block], self.block_of[self.name_of.pop(block)]
                self.free.append(block)
        return unused

    def names_of(self, tokens, known=()):
        """The names of all full blocks of a text, in their order; known: those of the first ones."""
        names, size = list(known), self.block_size
        for start in range(len(names) * size, len(tokens) - size + 1, size):
            before, own = names[-1] if names else b"", repr(tokens[start : start + size]).encode()
            names.append(hashlib.sha256(before + own).digest())
        return names

    def find(self, names):
        """The blocks that hold the longest known beginning of a text with these names."""
        found = []
        for name in names:
            if name not in self.block_of:
                break
            found.append(self.block_of[name])
        return found
