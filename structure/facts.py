"""What a model costs: memory, work, and the time that its memory allows, box by box and in all.

Work is counted in FLOPs, two for a multiplication and its addition, of matrix products, convolutions and
attention (flops_of). What depends on the call is kept as terms: [[16384, "B*T*S"], [33554432, "B*T"]] is the
sum 16384 B T S + 33554432 B T, which anyone can evaluate for other sizes, a page in its browser too:

    prefill           B rows of T tokens, which attend to each other: S = T
    a decoded token   T = 1, attending to the S slots of the cache that are filled
    a source          N tokens, in an encoder-decoder

The call that is looked at writes behind a cache. DeepSeek's attention is absorbed there, as in its steps; a
prompt that begins a text it expands, and between tokens a third of the products counted here are made.

Weights in int8 and int4 take what models/utils/quantize.py makes of them (int4 in groups of 32), and what it
leaves alone is in bf16; so are activations and the cache.
"""

import math
from dataclasses import asdict
from itertools import product

import torch

from models.utils.quantize import Quantization, parts_of, plan_layers

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
QUANTIZED = {"int8": Quantization("int8"), "int4": Quantization("int4", 32)}
DTYPES = (*FLOATS, *QUANTIZED)
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "int8": 2, "int4": 2}  # of an activation, or of a number in the cache
MEMORIES = (8, 16, 24, 80)  # GB (10^9 bytes) that people have


def stored_bytes(model):
    """{parameter: {"fp32": bytes, ...}} of a model on the meta device."""
    plans = {dtype: plan_layers(model, quantization)[0] for dtype, quantization in QUANTIZED.items()}
    sizes = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = tuple(parameter.shape)
        sizes[name] = {dtype: parameter.numel() * kind.itemsize for dtype, kind in FLOATS.items()}
        for dtype, plan in plans.items():
            parts = parts_of(plan, name, shape, torch.bfloat16).values()
            sizes[name][dtype] = sum(math.prod(part) * kind.itemsize for part, kind in parts)
    return sizes


# Work -------------------------------------------------------------------------------------------------------


def flops_of(op):
    """The numbers whose sum an operation costs in FLOPs, each a product of its dimensions.

    Norms, activations, softmax and additions are left out, as by torch's FlopCounterMode: they are a few
    hundredths of the work. Attention counts every pair of a query and a slot, masked or not.
    """
    shapes = [argument.shape for argument in op.arguments]
    if op.target == "linear":
        return [2 * math.prod(op.shape) * shapes[1][-1]]
    if op.target in ("matmul", "bmm", "mm"):
        return [2 * math.prod(op.shape) * shapes[0][-1]]
    if op.target == "einsum":
        # One matrix product: what both have is summed over, or goes along.
        return [2 * math.prod(op.shape) * shapes[0][-1]]
    if op.target == "scaled_dot_product_attention":
        # Values as wide as the result: they may be the same tensor as the keys, which then stands there once.
        q, k = shapes[:2]
        return [2 * math.prod(q) * k[-2], 2 * math.prod(op.shape) * k[-2]]
    if op.target in ("conv1d", "conv2d", "conv3d"):
        return [2 * math.prod(op.shape) * math.prod(shapes[1][1:])]
    return []


# Boxes ------------------------------------------------------------------------------------------------------


def describe(name, model_name, config, box):
    """What a picture, a page or a table says of a model besides its boxes; plain data.

    active: the parameters that work for a token. facts: of each box by its id, see facts_of. read: bytes of
    weights that one decoded token reads, by dtype. experts: how many a layer has and a token uses, and the
    bytes of all of them; None without any.
    """
    facts, fields = {}, asdict(config)
    facts_of(box, 1, facts)
    read, experts = read_by_a_step(box), None
    if box.used < box.parameters:
        experts = {"all": fields["num_experts"], "active": fields["num_active_experts"]}
        share = experts["active"] / experts["all"]
        experts["bytes"] = bytes_of_experts(box, share)
        read = {
            dtype: round(number - (1 - share) * experts["bytes"][dtype]) for dtype, number in read.items()
        }
    return {
        "name": name,
        "model": model_name,
        "config": {"model": model_name, **fields},
        "parameters": box.parameters,
        "active": box.used,
        "facts": facts,
        "read": read,
        "experts": experts,
    }


def facts_of(box, around, facts):
    """The facts of a box and of all in it, into `facts`; around: how often what it stands in stands there.

    Of one member, with all that it holds: parameters, active (those that work for a token), bytes by dtype,
    flops of the whole call, decode where a decoded token needs other terms, activation (the numbers of all
    results, in inference never kept at once), cache (numbers that it keeps). repeat: how many of it the whole
    model has.
    """
    children = [(child, facts_of(child, around * box.repeat, facts)) for child in box.children]
    own = {
        "flops": box.flops,
        "decode": () if box.once else box.flops,
        "activation": terms_of((*box.output.numbers, box.times or 1)) if computes(box) else [],
        "cache": box.kept,
    }
    fact = {
        name: add([terms] + [scaled(inner[name], child.repeat) for child, inner in children])
        for name, terms in own.items()
    }
    fact["bytes"] = {
        dtype: box.bytes.get(dtype, 0)
        + sum(inner["bytes"][dtype] * child.repeat for child, inner in children)
        for dtype in DTYPES
    }
    facts[box.id] = {"parameters": box.parameters, "active": box.used, "repeat": around * box.repeat, **fact}
    return facts[box.id]


def computes(box):
    """Whether a box has a result of its own; a table of positions has the same for every call."""
    return box.output and not box.children and any(isinstance(number, str) for number in box.output.numbers)


def read_by_a_step(box):
    """{dtype: bytes} of the weights that a decoded token takes from memory, of experts those of all.

    That is all of them, but for what runs once for a source or not at all, and for tables, of which it takes
    a few rows (unless a head is tied to them, which takes them all).
    """
    tied = {each.tied_to for each, _ in walk(box)}
    total = dict.fromkeys(DTYPES, 0)
    for each, repeat in walk(box):
        table = each.role in ("embedding", "position") and not each.flops and each.id not in tied
        runs = each.used or not each.parameters
        if runs and not table and (not each.once or each.id in tied):
            total = {dtype: total[dtype] + repeat * each.bytes.get(dtype, 0) for dtype in DTYPES}
    return total


def bytes_of_experts(box, share, around=1, inside=False):
    """{dtype: bytes} of all experts of a model, of which each token uses a share."""
    if not box.used:
        return dict.fromkeys(DTYPES, 0)
    around, inside = around * box.repeat, inside or box.active > 0
    parts = [bytes_of_experts(child, share, around, inside) for child in box.children]
    # Experts whose matrices stand in one tensor are told by what a token does not use of it.
    own = box.parameters - sum(child.parameters * child.repeat for child in box.children)
    used = box.used - sum(child.used * (child.active or child.repeat) for child in box.children)
    together = (own - used) / (1 - share) / own if own else 0
    part = around * (1 if inside else together)
    return {
        dtype: round(part * box.bytes.get(dtype, 0)) + sum(inner[dtype] for inner in parts)
        for dtype in DTYPES
    }


def walk(box, around=1):
    """(box, how often it stands in the model) of a box and all boxes in it."""
    yield box, around * box.repeat
    for child in box.children:
        yield from walk(child, around * box.repeat)


# Terms ------------------------------------------------------------------------------------------------------


def product_of(numbers):
    """The term [4096, "B*T"] of a shape ("B", "T", 4096)."""
    coefficient, letters = 1, []
    for number in numbers:
        factors, _, divisor = str(number).partition("/")
        for factor in factors.split("*"):
            if factor.isalpha():
                letters.append(factor)
            else:
                coefficient *= int(factor)
        coefficient = coefficient / int(divisor) if divisor else coefficient
    return [coefficient, "*".join(letters)]


def terms_of(numbers):
    """The terms of a shape: of ("B", "S+1") [[1, "B*S"], [1, "B"]]."""
    return add([[product_of(each)] for each in product(*(str(number).split("+") for number in numbers))])


def add(lists):
    """Terms of several lists, those in the same letters summed up."""
    total = {}
    for coefficient, letters in (term for terms in lists for term in terms):
        total[letters] = total.get(letters, 0) + coefficient
    return [[coefficient, letters] for letters, coefficient in total.items()]


def scaled(terms, factor):
    return [[coefficient * factor, letters] for coefficient, letters in terms]


def evaluate(terms, **sizes):
    """Terms as a number: evaluate(flops, B=1, T=512, S=512)."""
    return sum(
        coefficient * math.prod(sizes[letter] for letter in letters.split("*") if letter)
        for coefficient, letters in terms
    )


# The whole model --------------------------------------------------------------------------------------------


def totals(info, dtype="bf16", batch=1, prompt=1024, cached=1024, source=1024, bandwidth=100):
    """The numbers of a model in use, in bytes and FLOPs; bandwidth in GB (10^9 bytes) a second.

    cached: tokens that a decoded one attends to, itself among them.
    """
    root = info["facts"]["model"]
    keys = {"B": batch, "S": cached, "N": source}
    cache = evaluate(root["cache"], **keys) * ELEMENT_BYTES[dtype]
    grown = evaluate(root["cache"], **{**keys, "S": cached + 1}) * ELEMENT_BYTES[dtype]
    weights = root["bytes"][dtype]
    prefill = evaluate(root["flops"], T=prompt, **{**keys, "S": prompt})
    step = evaluate(root["decode"], T=1, **keys)
    read = info["read"][dtype] + more_experts(info, dtype, batch) + cache
    return {
        "weights": weights,
        "cache": cache,
        "cache_per_token": (grown - cache) // batch,
        "prefill_flops": prefill,
        "step_flops": step,
        "prefill_intensity": prefill / weights,
        "step_intensity": step / read,
        "tokens_per_second": batch * bandwidth * 1e9 / read,
        "fits": {memory: weights + cache <= memory * 1e9 for memory in MEMORIES},
    }


def more_experts(info, dtype, batch):
    """Bytes of the experts that a batch reads besides those of one token, if rows choose by chance."""
    if not info["experts"]:
        return 0
    share = info["experts"]["active"] / info["experts"]["all"]
    return info["experts"]["bytes"][dtype] * (1 - (1 - share) ** batch - share)
