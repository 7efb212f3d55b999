"""A model's cache in blocks: from a page's side a cache like any other.

A page writes new keys and values with `cache.write(k, v, positions)` and reads them as `cache.k`, `cache.v`.
What stands behind that is here a pool of blocks for all texts, and for each row of the batch a table that
says which blocks hold its text (blocks.py):

    pool    (N blocks, block_size, K, d)
    table   row 0: 7 2 9      position p of row 0 is in block table[0, p // block_size],
            row 1: 7 4 0                              at place p % block_size

Not every cache has a slot for each position. A window of the last tokens, or a state, has one size however
long the text grows. `Plan` asks the model, by the shapes of a cache for n tokens and of one for n + 1. What
grows by a slot is paged; everything else has a place for each sequence, lent to the page for a call and put
back.

Shapes: B rows, T new tokens of a row, K heads of keys and values, S slots (of the longest row), d features,
    N blocks, n blocks of a row.
Proof: tests/test_serve.py.
"""

import inspect
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from models.utils.errors import UserError
from models.utils.machine import available_memory, spoken_bytes
from runs_ar.generate import keeps_states
from runs_serve.blocks import NOBODY


class PagedTensor:
    """One tensor of a layer's cache, (B, K, S, d), whose slots lie in blocks.

    It is no tensor, but torch treats it as one: what an operation is given is gathered before.
    """

    def __init__(self, pool: Tensor, table: Tensor):
        self.pool, self.table = pool, table  # (N, block_size, K, d), (B, n)

    @property
    def shape(self):
        block_size, K, d = self.pool.shape[1:]
        return torch.Size((len(self.table), K, self.table.shape[1] * block_size, d))

    def gathered(self):
        return self.pool[self.table].flatten(1, 2).transpose(1, 2)  # (B, K, S, d)

    def write(self, new: Tensor, positions: Tensor):
        """new (B, K, T, d) goes to its slots; a pad's position is -1, and its block nobody's."""
        block_size = self.pool.shape[1]
        blocks = self.table.gather(1, positions.clamp(min=0) // block_size)  # (B, T)
        blocks = blocks.masked_fill(positions < 0, NOBODY)
        self.pool[blocks, positions % block_size] = new.transpose(1, 2)  # (N, block_size, K, d)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = pytree.tree_map(
            lambda x: x.gathered() if isinstance(x, cls) else x, (args, kwargs or {})
        )
        return function(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.gathered(), name)

    def __getitem__(self, index):
        return self.gathered()[index]


class PagedLayer:
    """Stands where a page expects its LayerCache: the same fields in the same order, the same `write`."""

    def __init__(self, fields: dict):
        self.__dict__.update(fields)
        self.fields = tuple(fields.values())

    def __iter__(self):
        return iter(self.fields)

    def write(self, *values_and_positions):
        *values, positions = values_and_positions
        paged = [field for field in self.fields if isinstance(field, PagedTensor)]
        for field, new in zip(paged, values, strict=True):
            field.write(new, positions)


class LayerMemory:
    """One layer's memory for all texts: a pool for each field that is paged, places for what is not."""

    def __init__(self, layer, paged, num_blocks, block_size, num_places, device):
        """layer: its cache for one text; paged: the names of its fields that are slots."""
        self.pools = {}
        for name in paged:
            _, K, _, d = getattr(layer, name).shape
            # One block more than there are: nobody's.
            shape = (num_blocks + 1, block_size, K, d)
            self.pools[name] = torch.zeros(shape, dtype=getattr(layer, name).dtype, device=device)
        self.names = layer._fields if paged else ()
        self.fresh = (
            {name: getattr(layer, name) for name in self.names if name not in paged} if paged else layer
        )
        self.places = pytree.tree_map(lambda one: one.repeat_interleave(num_places, dim=0), self.fresh)

    def begin(self, place):
        """A new text in this place: nothing of the last one is left."""
        for own, fresh in self.pairs(self.fresh):
            own[place : place + 1] = fresh

    def lend(self, table, places):
        """(what the page is given for these rows, what must be put back)."""
        lent = pytree.tree_map(lambda own: own[places], self.places)
        if not self.pools:
            return lent, lent
        fields = lent | {name: PagedTensor(pool, table) for name, pool in self.pools.items()}
        return PagedLayer({name: fields[name] for name in self.names}), lent

    def put_back(self, lent, places):
        for own, used in self.pairs(lent):
            own[places] = used

    def pairs(self, other):
        return zip(pytree.tree_leaves(self.places), pytree.tree_leaves(other))


class Memory:
    """The memory of all layers, for `num_places` texts at once, of at most plan.num_slots tokens."""

    def __init__(self, plan, num_blocks, num_places):
        self.device, self.is_all_paged = plan.device, plan.bytes_per_place == 0
        layers = plan.layers if self.is_all_paged else plan.new_cache()
        sizes = (num_blocks, plan.block_size, num_places, self.device)
        self.layers = [LayerMemory(layer, names, *sizes) for layer, names in zip(layers, plan.paged)]

    @contextmanager
    def lend(self, tables, places):
        """A cache for these rows, as a page knows it; what is not paged is put back at the end."""
        width = max(map(len, tables))
        padded = [table + [NOBODY] * (width - len(table)) for table in tables]
        table = torch.tensor(padded, dtype=torch.long, device=self.device)  # (B, n)
        lent = [layer.lend(table, places) for layer in self.layers]
        yield tuple(cache for cache, _ in lent)
        for layer, (_, own) in zip(self.layers, lent):
            layer.put_back(own, places)

    def begin(self, place):
        for layer in self.layers:
            layer.begin(place)

    def copy_block(self, source, target):
        for pool in self.all_pools():
            pool[target] = pool[source]

    def wipe(self, blocks):
        """Zeros instead of NaN: what is masked is multiplied by 0, and 0 times NaN is NaN."""
        for pool in self.all_pools():
            pool[blocks] = 0

    def all_pools(self):
        return [pool for layer in self.layers for pool in layer.pools.values()]


class Plan:
    """What a model's cache is like, before any memory is taken.

    num_slots: tokens of the longest text; num_undo: how many tokens back a text may go (by rejected drafts).
    """

    def __init__(self, model, num_slots, block_size, num_undo=0):
        options = {"num_undo": num_undo} if keeps_states(model) else {}
        self.num_slots, self.block_size = num_slots, block_size
        self.device = model.lm_head.weight.device
        self.new_cache = lambda: model.new_cache(1, num_slots, **options)
        with FakeTensorMode(allow_non_fake_inputs=True):  # shapes without memory
            self.layers, longer = self.new_cache(), model.new_cache(1, num_slots + 1, **options)
        self.paged = [paged_fields(*pair, num_slots) for pair in zip(self.layers, longer)]
        paged = [getattr(layer, name) for layer, names in zip(self.layers, self.paged) for name in names]
        self.bytes_per_token = sum(one.nbytes for one in paged) // num_slots
        all_bytes = sum(one.nbytes for one in pytree.tree_leaves(self.layers))
        self.bytes_per_place = all_bytes - self.bytes_per_token * num_slots

    def num_blocks(self, share, num_places):
        """How many blocks a share of the free memory has room for; never more than can be used."""
        free = available_memory(self.device)
        room = int(share * free) - self.bytes_per_place * num_places
        most = num_places * -(-self.num_slots // self.block_size)
        fit = room // (self.bytes_per_token * self.block_size) if self.bytes_per_token else most
        if room < 0 or fit < 1:
            raise UserError(
                f"{share:.0%} of the {spoken_bytes(free)} that {self.device} has free is too little for "
                f"{num_places} texts at once; allow fewer at once, or shorter ones, or a larger share"
            )
        return min(most, fit)


def paged_fields(layer, longer, num_slots):
    """The names of a layer's fields that are slots, (1, K, S, d), if they are what its `write` takes."""
    if not hasattr(layer, "write"):
        return []
    fields = {name: field for name, field in layer._asdict().items() if isinstance(field, Tensor)}
    grows = [name for name, field in fields.items() if field.shape != getattr(longer, name).shape]
    shapes = [(fields[name].shape, getattr(longer, name).shape) for name in grows]
    are_slots = all(
        len(short) == 4 and short[2] == num_slots and long == (*short[:2], num_slots + 1, short[3])
        for short, long in shapes
    )
    num_written = len(inspect.signature(layer.write).parameters) - 1  # the last are the positions
    return grows if are_slots and len(grows) == num_written else []
