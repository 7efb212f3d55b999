"""The numbers of a model as plain text: a row for each module, layers folded, then what it takes to run."""

from models.utils.machine import spoken_bytes
from structure.facts import DTYPES, MEMORIES, evaluate, totals


def table(box, info, batch=1, length=1024, bandwidth=100):
    """Lines of text: the rows, then the totals.

    batch: rows; length: of the prompt, of the cache, and of a source. bandwidth: GB (10^9 bytes) a second.
    """
    sizes = {"batch": batch, "prompt": length, "cached": length, "source": length, "bandwidth": bandwidth}
    step = bool(info["facts"]["model"]["cache"])
    header = ["module", "", "output", "parameters", "bf16", f"FLOPs of {length:,} tokens"]
    header += ["of one more"] if step else []
    rows = [header, *rows_of(box, info, length, batch, step)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(header))]
    lines = ["  ".join(aligned(row, widths)).rstrip() for row in rows]
    used = [f"{box.used:,} of {box.parameters:,} parameters are active for a token", ""]
    return [*lines, "", *(used if box.used < box.parameters else []), *summary(info, sizes, step)]


def aligned(row, widths):
    return [
        cell.ljust(width) if n < 3 else cell.rjust(width) for n, (cell, width) in enumerate(zip(row, widths))
    ]


def rows_of(box, info, length, batch, step, depth=0):
    """The cells of a box and of the modules in it."""
    fact = info["facts"][box.id]
    sizes = {"B": batch, "T": length, "S": length, "N": length}
    repeat = f" x {box.repeat}" if box.repeat > 1 else ""
    repeat += f", {box.active} active" if box.active else ""
    tied = f"tied to {box.tied_to}" if box.tied_to else ""
    cells = [
        "  " * depth + box.label + repeat,
        tied or spoken_title(box),
        spoken_shape(box.output),
        number(fact["parameters"] * fact["repeat"]),
        spoken_bytes(fact["bytes"]["bf16"] * fact["repeat"]) if fact["parameters"] else "",
        flops(evaluate(fact["flops"], **sizes) * fact["repeat"]),
    ]
    if step:
        cells.append(flops(evaluate(fact["decode"], **{**sizes, "T": 1}) * fact["repeat"]))
    shown = [child for child in box.children if child.weights or child.children or child.flops]
    inner = [rows_of(child, info, length, batch, step, depth + 1) for child in shown]
    return [cells, *(row for rows in inner for row in rows)]


def spoken_title(box):
    """A module's title; an operation's is its source, which has no place in a table."""
    return box.title if box.members else ""


def spoken_shape(shape):
    return f"({', '.join(map(str, shape.numbers))})" if shape else ""


def number(count):
    return f"{count:,}" if count else ""


def plain(value):
    """1234.5 -> "1,234", 1.2345 -> "1.23"."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def flops(count):
    """1,234,567 -> "1.23 M"."""
    if not count:
        return ""
    for unit in ("", "k", "M", "G", "T", "P"):
        if count < 1000:
            return f"{count:.3g} {unit}".strip()
        count /= 1000
    return f"{count:,.3g} E"


def summary(info, sizes, step):
    """What it takes to run the model, for each form of its weights."""
    batch, length = sizes["batch"], sizes["prompt"]
    rows = [["", *DTYPES]]
    of = {dtype: totals(info, dtype, **sizes) for dtype in DTYPES}

    def row(label, name, spoken):
        rows.append([label, *(spoken(of[dtype][name]) for dtype in DTYPES)])

    row("weights", "weights", spoken_bytes)
    if step:
        row("cache of a token", "cache_per_token", spoken_bytes)
        row(f"cache of {batch} x {length:,}", "cache", spoken_bytes)
        row("FLOPs a byte, one more token", "step_intensity", plain)
        row(f"tokens/s at {sizes['bandwidth']:g} GB/s", "tokens_per_second", plain)
    row("FLOPs a byte, all tokens", "prefill_intensity", plain)
    for memory in MEMORIES:
        rows.append([f"fits in {memory} GB", *("yes" if of[d]["fits"][memory] else "no" for d in DTYPES)])
    width = max(len(row[0]) for row in rows)
    lines = [row[0].ljust(width) + "".join(cell.rjust(12) for cell in row[1:]) for row in rows]
    note = "FLOPs: matrix products, convolutions and attention, all pairs counted. tokens/s: an upper bound,"
    return [*lines, "", note, "since each token reads all weights and the cache once."]
