"""One model on several devices: each rank holds some heads, some features and some experts of every layer.

What one device cannot hold, or not read fast enough, is shared so that the ranks need to talk only twice a
layer (Shoeybi et al. 2019, Megatron-LM, section 3). A feed-forward on two ranks:

               rank 0                       rank 1
    x          all of it                    all of it
    gate, up   the first half of f          the second half of f          "columns"
    down       what these features make     what those make               "rows"
    sum        <----------- each adds what the other has ----------->

A feature of f is made of all of x and of no other feature, so that nothing need be said in between. So it is
with heads, which know nothing of each other. The words are Megatron's, which multiplies from the right (x A);
torch's Linear keeps A transposed, so that its "columns" are rows of the weight.

    columns     ColwiseParallel: a rank has some of the outputs
    rows        RowwiseParallel: a rank has some of the inputs; what all make of them is summed (all-reduce)
    part        rows, but the sum is made further up, together with other parts
    heads       this attention has a rank's share of the heads, and of its parameters with a row per head
    experts     a rank has some of them, whole; what the others make of a token is added
    vocabulary  lm_head: a rank has the logits of some tokens, which then all get (all-gather)

PARALLEL in conversion/tables/NAME.py says what applies to which modules, by the end of their names. All else
(embedding, norms, routers) is whole on every rank. The page is the same: it meets its share of the heads.

Shapes: V vocabulary.
Proof: tests/test_parallel.py: the logits of one process, for every decoder.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)

from models.utils.errors import UserError
from models.utils.head import keep_logits_in_fp32

COUNTS = ("num_heads", "num_kv_heads")


def split(model, table, mesh):
    """Make a model on the meta device one rank's share of it; table: the PARALLEL of its page."""
    for name, linear in named(model, "Linear"):
        model.set_submodule(name, torchs_own(linear))
    plan = {name: STYLES[style]() for name, style in plan_of(model, table)}
    check(model, plan, mesh.size())
    parallelize_module(model, mesh, plan, src_data_rank=None)
    # new_cache asks the config how many heads there are.
    fields = {field.name for field in dataclasses.fields(model.config)}.intersection(COUNTS)
    shares = {name: getattr(model.config, name) // mesh.size() for name in fields}
    model.config = dataclasses.replace(model.config, **shares)
    return model


def plan_of(model, table):
    """(name, style) of each module that the table speaks of: `ffn.down_proj` is the end of such names."""
    for name, _ in model.named_modules():
        for end, style in table.items():
            if f".{name}".endswith(f".{end}"):
                yield name, style


def named(model, kind):
    return [(name, module) for name, module in model.named_modules() if type(module).__name__ == kind]


def torchs_own(linear):
    """transformer_lm has a Linear of its own, which torch's styles do not know."""
    if isinstance(linear, nn.Linear):
        return linear
    own = nn.Linear(*linear.weight.shape[::-1], bias=False, device="meta")
    own.weight = linear.weight
    return own


def check(model, plan, num_ranks):
    """UserError if something cannot be shared out equally."""

    def misfit(ranks):
        shared = (
            (name, what, n)
            for name, style in plan.items()
            for what, n in style.shared(model.get_submodule(name))
        )
        return next(((name, what, n) for name, what, n in shared if n % ranks), None)

    if found := misfit(num_ranks):
        name, what, n = found
        fitting = " or ".join(str(ranks) for ranks in range(1, num_ranks) if not misfit(ranks))
        raise UserError(
            f"{num_ranks} ranks cannot share {name}, whose {what} is {n}; give --nproc-per-node {fitting}"
        )


# How a module is split --------------------------------------------------------------------------------------


class Columns(ColwiseParallel):
    def shared(self, linear):
        return [("number of outputs", linear.weight.shape[0])]


class Rows(RowwiseParallel):
    def shared(self, linear):
        return [("number of inputs", linear.weight.shape[1])]


class Part(Rows):
    def __init__(self):
        super().__init__(output_layouts=Partial())


class Heads(ParallelStyle):
    def shared(self, attn):
        return [(name, getattr(attn, name)) for name in COUNTS if hasattr(attn, name)]

    def _apply(self, attn, mesh):
        for name, count in self.shared(attn):
            setattr(attn, name, count // mesh.size())
        for name, parameter in attn.named_parameters(recurse=False):
            setattr(attn, name, nn.Parameter(share_of_rows(parameter, mesh), False))
        return attn


class Experts(ParallelStyle):
    """Of the list `experts` a rank keeps some neighbours; the page asks all of them, as ever."""

    def shared(self, ffn):
        return []  # the last rank may have fewer

    def _apply(self, ffn, mesh):
        if not hasattr(ffn, "experts"):  # a layer without any
            return ffn
        here = share_of(len(ffn.experts), mesh)
        for number in range(len(ffn.experts)):
            if not here.start <= number < here.stop:
                ffn.experts[number] = Elsewhere()
        return PrepareModuleOutput(output_layouts=Partial(), desired_output_layouts=Replicate())._apply(
            ffn, mesh
        )


class Elsewhere(nn.Module):
    """In the place of an expert that another rank has, which adds what that makes of a token."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Vocabulary(ParallelStyle):
    def shared(self, head):
        return []  # the last rank may have fewer

    def _apply(self, head, mesh):
        head.weight = nn.Parameter(share_of_rows(head.weight, mesh), False)
        return head


STYLES = {
    "columns": Columns,
    "rows": Rows,
    "part": Part,
    "heads": Heads,
    "experts": Experts,
    "vocabulary": Vocabulary,
}


# Which part is whose ----------------------------------------------------------------------------------------


def share_of(count, mesh):
    """The slice of `count` things that are this rank's: as many for each, but for the last."""
    size = math.ceil(count / mesh.size())
    start = min(mesh.get_local_rank() * size, count)
    return slice(start, min(start + size, count))


def share_of_rows(parameter, mesh):
    return parameter.detach()[share_of(len(parameter), mesh)]


def local_part(parameter):
    """What this rank has of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def load_share(model, names_of, files, mesh, device, dtype):
    """Give a model that was split its weights; of a tensor of which a rank has a part, only that is read.

    names_of: names_of_parameters of the model before it was split.
    """
    # A tied head is a part of the embedding, by whose name the files call it.
    stored_as = {name: names[0] for names in names_of.values() for name in names}
    vocab_size, tensors = model.config.vocab_size, {}
    for name, parameter in list(model.named_parameters()):
        source = stored_as[name]
        shapes = zip(local_part(parameter).shape, files.entries[source].shape)
        part = tuple(slice(None) if here == whole else share_of(whole, mesh) for here, whole in shapes)
        if source in tensors:
            tensor = tensors[source][part]
        elif part == (slice(None),) * len(part):
            tensor = files.read(source).to(device, dtype)
        else:
            tensor = files.read_part(source, part).to(device, dtype)
        tensors[name] = tensor
        if isinstance(parameter, DTensor):
            tensor = DTensor.from_local(tensor, mesh, parameter.placements, run_check=False)
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(tensor, False))
    keep_logits_in_fp32(model)
    model.lm_head.register_forward_hook(lambda head, inputs, logits: gathered(logits, vocab_size, mesh))
    return model.eval()


def gathered(logits, vocab_size, mesh):
    """The logits of all tokens, on every rank: (..., V) from each rank's part of them."""
    shape = torch.Size((*logits.shape[:-1], vocab_size))
    stride = torch.empty(shape, device="meta").stride()
    parts = [Shard(logits.dim() - 1)]
    return DTensor.from_local(logits, mesh, parts, run_check=False, shape=shape, stride=stride).full_tensor()
