"""A model's cache in blocks: from a page's side a cache like any other.

A page writes new keys and values with `cache.write(k, v, positions)` and reads them as `cache.k`, `cache.v`.
What stands behind that is here a pool of blocks for all texts, and for each row of the batch a table that
says which blocks hold its text (blocks.py):

    pool    (N blocks, K, block_size, d)
    table   row 0: 7 2 9      position p of row 0 is in block table[0, p // block_size],
            row 1: 7 4 0                              at place p % block_size

Not every cache has a slot for each position. A window of the last tokens, or a state, has one size however
long the text grows. `Plan` asks the model, by the shapes of a cache for n tokens and of one for n + 1. What
grows by a slot is paged; everything else has a place for each sequence, lent to the page for a call and put
back. (gpt_oss.py also keeps the position that each slot holds. Here that is the slot's own number.)

Shapes: B rows, T new tokens of a row, K heads of keys and values, S slots (of the longest row), d features,
    N blocks, n blocks of a row.
Proof: tests/test_serve.py, tests/test_serve_compiled.py.
"""

import inspect
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from models.utils.errors import UserError
from models.utils.kernels.row_attention import attention_fits, row_attention
from models.utils.kernels.row_linear import MAX_ROWS
from models.utils.machine import available_memory, spoken_bytes
from runs_ar.generate import keeps_states
from runs_serve.blocks import NOBODY


class Rows:
    """The blocks of each row of a batch, and where in them its new tokens go."""

    def __init__(self, table: Tensor, block_size: int):
        self.table, self.block_size = table, block_size  # (B, n)
        self.positions = self.places = None

    def numbers(self):
        """The position that each slot holds, (B, S). One that is not written yet lies ahead of the text."""
        B, n = self.table.shape
        return torch.arange(n * self.block_size, device=self.table.device).expand(B, -1)  # (B, S)

    def places_of(self, positions: Tensor):
        """(blocks, places in them), each (B, T), once for all layers; of a pad (-1) the block is nobody's."""
        if positions is not self.positions:
            blocks = self.table.gather(1, positions.clamp(min=0) // self.block_size)  # (B, T)
            blocks = blocks.masked_fill(positions < 0, NOBODY)
            self.positions, self.places = positions, (blocks, positions % self.block_size)
        return self.places


class PagedTensor:
    """One tensor of a layer's cache, (B, K, S, d), whose slots lie in blocks.

    It is no tensor, but torch takes it for one. Attention of a few queries reads the blocks where they lie;
    whatever else is done with it gathers them first.
    """

    def __init__(self, pool: Tensor, rows: Rows):
        self.pool, self.rows, self.table = pool, rows, rows.table  # (N, K, block_size, d), Rows, (B, n)
        self.dtype, self.device = pool.dtype, pool.device

    @property
    def shape(self):
        (B, n), (K, block_size, d) = self.table.shape, self.pool.shape[1:]
        return torch.Size((B, K, n * block_size, d))

    def gathered(self):
        K = self.pool.shape[1]
        heads = torch.arange(K, device=self.table.device)[:, None]  # (K, 1)
        places = self.table[:, None] * K + heads  # (B, K, n): of a block's part for a head
        return self.pool.flatten(0, 1)[places].flatten(2, 3)  # (B, K, S, d)

    def write(self, new: Tensor, positions: Tensor):
        """new (B, K, T, d) goes to the slots of its positions (B, T)."""
        blocks, places = self.rows.places_of(positions)
        # Indexed by (B, T) twice, the left side is (B, T, K, d).
        self.pool[blocks, :, places] = new.transpose(1, 2)  # (N, K, block_size, d)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return attend(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map(gather_paged, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.gathered(), name)

    def __getitem__(self, index):
        return self.gathered()[index]


def gather_paged(value):
    return value.gathered() if isinstance(value, PagedTensor) else value


def attend(q, k, v, mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention; k and v may be paged."""
    if isinstance(k, PagedTensor) and isinstance(v, PagedTensor) and attention_fits(q, k, mask):
        return row_attention(q, k.pool, v.pool, mask, scale, k.table)
    k, v = gather_paged(k), gather_paged(v)
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


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


class PagedCache:
    """What a page is given for some rows: by its number each layer, made of tensors when it is asked for.

    table (B, n): the blocks of each row; for each layer its pools by name, and what is lent to these rows.
    A compiled step takes the tensors and puts them together again (models/utils/compile.py).
    """

    def __init__(self, memory, table, pools, lent):
        self.memory, self.table, self.pools, self.lent = memory, table, pools, lent
        self.rows = Rows(table, memory.block_size)

    def __len__(self):
        return len(self.pools)

    def __getitem__(self, n):
        return self.memory.layers[n].for_page(self.pools[n], self.lent[n], self.rows)

    def __iter__(self):
        return (self[n] for n in range(len(self)))

    def lasting(self):
        """The tensors that are the same in the next call."""
        return [pool for layer in self.pools for pool in layer.values()]

    def free_sizes(self):
        """A step is compiled once for all numbers of rows from 2 on, of blocks in a row, and of blocks."""
        rows = {0: "B"} if 2 <= len(self.table) <= MAX_ROWS else {}
        pools = [{0: "N"} for layer in self.pools for _ in layer]
        return [{**rows, 1: "n"}, *pools, *(rows for _ in pytree.tree_leaves(self.lent))]


pytree.register_pytree_node(
    PagedCache,
    lambda cache: ([cache.table, cache.pools, cache.lent], cache.memory),
    lambda tensors, memory: PagedCache(memory, *tensors),
)


class LayerMemory:
    """One layer's memory for all texts: a pool for each field that is paged, places for what is not."""

    def __init__(self, layer, grows, num_blocks, block_size, num_places, device):
        """layer: its cache for one text; grows: as Growth says."""
        self.grows, self.pools = grows, {}
        for name in grows.slots:
            _, K, _, d = getattr(layer, name).shape
            # One block more than there are: nobody's.
            shape = (num_blocks + 1, K, block_size, d)
            self.pools[name] = torch.zeros(shape, dtype=getattr(layer, name).dtype, device=device)
        self.names, growing = layer._fields if self.pools else (), (*grows.slots, *grows.numbers)
        kept = {name: getattr(layer, name) for name in self.names if name not in growing}
        self.fresh = kept if self.pools else layer
        self.places = pytree.tree_map(lambda one: one.repeat_interleave(num_places, dim=0), self.fresh)

    def begin(self, place):
        """A new text in this place: nothing of the last one is left."""
        for own, fresh in self.pairs(self.fresh):
            own[place : place + 1] = fresh

    def lend(self, places):
        return pytree.tree_map(lambda own: own[places], self.places)

    def for_page(self, pools, lent, rows):
        """The layer's cache as the page knows it."""
        if not pools:
            return lent
        fields = lent | {name: PagedTensor(pool, rows) for name, pool in pools.items()}
        fields |= {name: rows.numbers() for name in self.grows.numbers}
        return PagedLayer({name: fields[name] for name in self.names})

    def put_back(self, lent, places):
        for own, used in self.pairs(lent):
            own[places] = used

    def pairs(self, other):
        return zip(pytree.tree_leaves(self.places), pytree.tree_leaves(other))


class Memory:
    """The memory of all layers, for `num_places` texts at once, of at most plan.num_slots tokens."""

    def __init__(self, plan, num_blocks, num_places):
        self.device, self.block_size = plan.device, plan.block_size
        self.is_all_paged = plan.bytes_per_place == 0
        layers = plan.layers if self.is_all_paged else plan.new_cache()
        sizes = (num_blocks, plan.block_size, num_places, self.device)
        self.layers = [LayerMemory(layer, grows, *sizes) for layer, grows in zip(layers, plan.grows)]
        # A page may take the most slots that any layer has for those of a full one: no table is shorter than
        # a window. And some pages count on slots behind the last, for pads.
        own = [one for layer in self.layers for one in pytree.tree_leaves(layer.fresh) if one.dim() == 4]
        self.least_width = max([2, *(-(-one.shape[2] // self.block_size) for one in own)])
        self.more_width = -(-max(grows.num_spare for grows in plan.grows) // self.block_size)

    @contextmanager
    def lend(self, tables, places):
        """A cache for these rows, as a page knows it; what is not paged is put back at the end."""
        width = max(self.least_width, max(map(len, tables)) + self.more_width)
        if self.device.type == "cuda":  # a graph is recorded for each width: few of them
            width = 1 << (width - 1).bit_length()
        padded = [table + [NOBODY] * (width - len(table)) for table in tables]
        table = torch.tensor(padded, dtype=torch.long, device=self.device)  # (B, n)
        lent = [layer.lend(places) for layer in self.layers]
        yield PagedCache(self, table, [layer.pools for layer in self.layers], lent)
        for layer, used in zip(self.layers, lent):
            layer.put_back(used, places)

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
        self.grows = [growth(*pair, num_slots) for pair in zip(self.layers, longer)]
        fields = [layer._asdict() if hasattr(layer, "_asdict") else {} for layer in self.layers]
        slots = [own[name] for own, grows in zip(fields, self.grows) for name in grows.slots]
        numbers = [own[name] for own, grows in zip(fields, self.grows) for name in grows.numbers]
        self.bytes_per_token = sum(one.nbytes // one.shape[2] for one in slots)
        kept = sum(one.nbytes for one in pytree.tree_leaves(self.layers))
        self.bytes_per_place = kept - sum(one.nbytes for one in (*slots, *numbers))

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


class Growth(NamedTuple):
    """How a layer's cache grows by a token: the names of its fields that do."""

    slots: tuple = ()  # (1, K, S, d), in which `write` puts what it is given; none: the layer is not paged
    numbers: tuple = ()  # (1, S): the position that each slot holds
    num_spare: int = 0  # slots beyond those of the text


def growth(layer, longer, num_slots):
    """longer: the same cache for one token more. Paged is what grows by slots that `write` takes."""
    if not hasattr(layer, "write"):
        return Growth()
    fields = {name: field for name, field in layer._asdict().items() if isinstance(field, Tensor)}
    pairs = {name: (field, getattr(longer, name)) for name, field in fields.items()}
    pairs = {name: (short, long) for name, (short, long) in pairs.items() if short.shape != long.shape}
    slots = tuple(name for name, pair in pairs.items() if pair[0].dim() == 4 and grows_by_one(*pair, 2))
    numbers = tuple(name for name, pair in pairs.items() if pair[0].dim() == 2 and grows_by_one(*pair, 1))
    num_written = len(inspect.signature(layer.write).parameters) - 1  # the last are the positions
    if len(slots) != num_written or len(slots) + len(numbers) != len(pairs):
        return Growth()
    return Growth(slots, numbers, pairs[slots[0]][0].shape[2] - num_slots)


def grows_by_one(short, long, dimension):
    return long.shape == (*short.shape[:dimension], short.shape[dimension] + 1, *short.shape[dimension + 1 :])
