"""Turn a published checkpoint into one that this project reads, and back.

    python convert_hf_checkpoint.py checkpoints/NAME              a folder that is already here
    python convert_hf_checkpoint.py meta-llama/Llama-3.2-1B       a repository of the Hugging Face hub

What happens: config.json says which model it is, and its fields become a flat config of ours. The model,
built without memory, says which tensors it wants, in which shapes. A table (in models/utils/hf/) says
where they stand in the checkpoint. Every disagreement is listed before a byte is written. Then the tensors go
over, one at a time, through the table's transforms.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from models import build_model, config_from_dict, config_to_dict, fill
from models.utils.checkpoint_files import DTYPE_NAMES, Spec, open_weights, write_weights
from models.utils.errors import UserError, run_main
from models.utils.files import converted_folder, one_line, read_json, read_text, write_atomically
from models.utils.hf import LAYOUTS, PAGES, from_hf_config, from_names, generation_ids, to_hf_config
from models.utils.hf.config import label_fields, read_labels
from models.utils.hf.layout import Layout, layer_count, plan
from models.utils.hub import COMPANIONS, fetch
from models.utils.meta_layout import META_LLAMA, MetaOptions, open_meta
from models.utils.quantize import (
    GROUP_SIZES,
    KINDS,
    calibrate,
    parts_of,
    plan_layers,
    quantization_of,
    quantized_parts,
    spoken,
    stored_quantization,
)
from models.utils.tokenizer import load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_PROBLEMS = 20
CALIBRATION_TOKENS = 16384  # at most, of which a window goes through the model at a time
CALIBRATION_WINDOW = 512

EXAMPLES = """
examples:
  python convert_hf_checkpoint.py HuggingFaceTB/SmolLM2-135M         fetch it into checkpoints/, convert it
  python convert_hf_checkpoint.py checkpoints/gpt2 --inspect         how their tensors become ours
  python convert_hf_checkpoint.py checkpoints/gpt2 --dtype bfloat16  half the size of float32
  python convert_hf_checkpoint.py checkpoints/gpt2 --dtype bfloat16 --quantize int4 --out gpt2-int4
  python convert_hf_checkpoint.py checkpoints/gpt2 --reverse         from ours to their layout again
  python convert_hf_checkpoint.py checkpoints/NAME --model transformer_lm     a Llama, read with another page
  python convert_hf_checkpoint.py Llama3.1-8B --max-seq-len 131072 --rope-factor 8     Meta's own files

The result is checkpoints/NAME/converted/ with config.json, model.safetensors and the tokenizer's files. Then:
  python run.py --checkpoint checkpoints/NAME --prompt "Once upon a time"
"""


def main():
    args = parse_arguments()
    dtype = DTYPES.get(args.dtype)
    quantization = quantization_of(args.quantize, args.group_size, args.calibrate)
    if quantization and (args.reverse or args.inspect):
        raise UserError(
            "--quantize goes with writing our form; transformers has other layouts for quantized weights, so "
            "--reverse writes none, and --inspect writes nothing; leave it out"
        )
    if args.reverse:
        print(f"wrote {reverse(args.checkpoint, args.out, dtype)}")
        return

    folder = fetch(args.checkpoint)
    meta = MetaOptions(**{name: getattr(args, name) for name in MetaOptions.__dataclass_fields__})
    if args.inspect:
        inspect(folder, args.allow, meta, args.model)
    else:
        options = (dtype, args.allow, meta, True, args.model, quantization, args.calibrate)
        print(f"wrote {convert(folder, args.out, *options)}")


def convert(
    folder,
    out=None,
    dtype=None,
    allow=(),
    meta=None,
    progress=True,
    model=None,
    quantization=None,
    calibration=None,
):
    """Write the converted form of the checkpoint in `folder` and return the folder that holds it.

    out: where to write, if not into `folder`/converted. dtype: of the new weights, if not as stored.
    allow: unknown fields of config.json to let pass. meta: what Meta's params.json does not say.
    progress: whether to show a bar, on a terminal. model: which of ours, where more than one can be chosen.
    quantization: of the linear layers, a Quantization of models/utils/quantize.py.
    calibration: a file of text for int4, which the whole model reads first, see whole_model.
    """
    source = open_source(folder, allow, meta, model)
    match = match_tensors(source)
    stop_if(match.problems, folder)
    model_name, config = config_from_dict(source.config, source.where)
    windows = calibration_windows(calibration, folder, model_name, config)
    ours, layers, products = config_to_dict(model_name, config), {}, {}
    if quantization:
        layers, notes = plan_layers(build_model(model_name, config), quantization)
        ours["quantization"] = asdict(quantization)
        print(f"{folder}: {spoken(quantization, notes)}", file=sys.stderr)
    if windows:
        products = calibrate(whole_model(source, match.moves), layers, windows)
    with writing(out, Path(folder) / "converted") as new:
        write_moves(new, source.weights, match.moves, dtype, progress, layers, products)
        write_json(new / "config.json", ours)
        write_json(new / "generation_config.json", source.generation)
        write_json(new / "labels.json", source.labels)
        for place in dict.fromkeys((Path(folder), source.folder)):
            copy_companions(place, new)
    return Path(out or Path(folder) / "converted")


def whole_model(source, moves):
    """The model with the weights of the checkpoint; those that come over as they are stay mapped."""
    model, tensors = build_model(*config_from_dict(source.config, source.where)), {}
    for move in moves:
        ours = move.transform([source.weights.read(name) for name in move.reads])
        # A matrix that lies the other way round is multiplied in another order, and rounds differently.
        tensors |= {name: tensor.contiguous() for name, tensor in zip(move.writes, ours)}
    fill(model, tensors)
    return model


def calibration_windows(path, folder, model_name, config):
    """The beginning of the text of --calibrate as (1, T) token ids, window by window; none without a path."""
    if path is None:
        return ()
    if model_name in ("transformer", "vision_transformer"):
        raise UserError(f"--calibrate: a text is not what {folder} reads, a {model_name} model; leave it out")
    tokens = torch.tensor(load_tokenizer(folder).encode(read_text(path, "--calibrate")))
    if tokens.max() >= config.vocab_size:
        raise UserError(f"{folder}: its tokenizer has more than the {config.vocab_size} tokens of the model")
    return tokens[None, :CALIBRATION_TOKENS].split(min(CALIBRATION_WINDOW, config.max_seq_len), dim=1)


def reverse(folder, out=None, dtype=None, progress=True):
    """Write a converted checkpoint in Hugging Face's layout and return the folder that holds it."""
    converted = converted_folder(folder)
    config = read_json(converted / "config.json")
    if stored := stored_quantization(config, converted / "config.json"):
        raise UserError(
            f"{converted}: is {stored}, and what rounding took is gone; convert the original again without "
            "--quantize, then reverse that"
        )
    weights = open_weights(converted)
    wanted = wanted_shapes(config, converted / "config.json")
    stop_if(compare(wanted, weights.entries), converted)

    layout = LAYOUTS[config["model"]]
    moves = [
        Move(
            step.ours,
            {layout.saved_name(step.theirs, config): their_shape(step, wanted, config)},
            partial(inverse, step, config),
        )
        for step in plan(layout, config, wanted)
    ]
    beside = converted.parent if converted.name == "converted" else converted
    with writing(out, beside / "reversed") as new:
        write_moves(new, weights, moves, dtype, progress)
        copy_companions(converted, new)
        stored = next(iter(weights.entries.values())).dtype
        write_json(new / "config.json", reversed_config(config, converted, dtype or stored))
    return Path(out or beside / "reversed")


def inspect(folder, allow=(), meta=None, model=None):
    """Print their tensors beside those of ours that they become, layers folded, then all problems."""
    source = open_source(folder, allow, meta, model)
    match = match_tensors(source)
    header = ("theirs", "shape", "ours", "shape", "transform", "{n}")
    lines = [header]
    for row in fold(match.rows):
        lines += zip_longest(*(cell.split("\n") for cell in row), fillvalue="")
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"{folder}: becomes models/{source.config['model']}.py with\n{json.dumps(source.config)}\n")
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    stop_if(match.problems, folder)


# The checkpoint ---------------------------------------------------------------------------------------------


@dataclass
class Source:
    """A checkpoint whose weights are open, with their names and shapes, and not yet read."""

    folder: Path
    where: Path  # the file that the config was read from
    config: dict  # ours, flat
    weights: Any  # .entries, .read(name)
    layout: Layout
    generation: dict = field(default_factory=dict)  # special tokens, where config.json alone names them
    labels: dict = field(default_factory=dict)  # of a classifier


def open_source(folder, allow=(), meta=None, model=None):
    """Hugging Face's layout where there is a config.json, Meta's where there is a params.json."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / "config.json").is_file():
        return open_hf(folder, allow, meta, model)
    for place in (folder, folder / "original"):
        if (place / "params.json").is_file():
            if model not in (None, "llama"):
                raise UserError(f"{place}: Meta's files are for models/llama.py; leave out --model {model}")
            config, weights = open_meta(place, meta or MetaOptions(), allow)
            return Source(place, place / "params.json", config, weights, META_LLAMA)
    raise UserError(f"{folder}: no config.json (nor Meta's params.json); fetch the checkpoint's config too")


def open_hf(folder, allow, meta, model):
    where = folder / "config.json"
    theirs = read_json(where)
    if stored := stored_quantization(theirs, where):
        raise UserError(f"{folder}: is {stored} already; convert the checkpoint that it was made from")
    if "model" in theirs and "model_type" not in theirs:
        raise UserError(f"{folder}: is converted already; --reverse writes Hugging Face's layout again")
    if meta not in (None, MetaOptions()):
        raise UserError(f"{where}: says what --max-seq-len and --rope-... are for; leave these options out")
    try:
        model_name, config = from_hf_config(theirs, allow, model)
        weights = open_weights(folder)
        config |= from_names(theirs, weights.entries, model)
        labels = read_labels(theirs, config["num_labels"]) if config.get("num_labels") else {}
    except UserError as error:
        raise UserError(f"{folder}/{error}" if str(error).startswith("config.json") else error) from None
    return Source(folder, where, config, weights, LAYOUTS[model_name], generation_ids(theirs), labels)


# Both sides beside each other -------------------------------------------------------------------------------


class Move(NamedTuple):
    """A piece of the work: read some tensors, transform them, write what comes out."""

    reads: tuple  # names
    writes: dict  # name -> shape
    transform: Callable  # list of tensors -> list of tensors


@dataclass
class Match:
    moves: list
    problems: list  # what has to be settled before anything is written
    rows: list  # of the table that --inspect prints


def match_tensors(source):
    """Everything that has to be done to fill our model, and everything that stands against it."""
    config, layout, entries = source.config, source.layout, source.weights.entries
    num_layers = layer_count(config)
    if num_layers > len(entries):
        raise UserError(f"{source.where}: {num_layers} layers, but there are {len(entries)} tensors in all")
    wanted = wanted_shapes(config, source.where)
    steps = plan(layout, config, wanted)
    expected = {step.theirs: their_shape(step, wanted, config) for step in steps}
    skipped = layout.skipped_names(num_layers)
    repeats = layout.repeats(config)

    stored, problems = full_names(layout, entries, {*repeats, *expected, *skipped})
    for name, original in repeats.items():
        if name in stored:
            skipped[name] = f"tied: equal to {original}"
            problems += tied_problems(source, stored[name], stored.get(original))
    skipped = {name: reason for name, reason in skipped.items() if name in stored}
    found = {name: entries[at] for name, at in stored.items() if name not in skipped}
    problems += compare(expected, found)

    moves = [
        Move(
            (stored[step.theirs],), {name: wanted[name] for name in step.ours}, partial(forward, step, config)
        )
        for step in steps
        if step.theirs in stored
    ]
    rows = [beside(step, found, wanted) for step in steps]
    rows += [
        (name, shown(entries[stored[name]]), "-", "", f"skipped: {why}") for name, why in skipped.items()
    ]
    rows += [(name, shown(found[name]), "?", "", "") for name in found if name not in expected]
    return Match(moves, problems, rows)


def wanted_shapes(config, where):
    """The shape of every tensor of our model by its name; a tied tensor is none of its own."""
    model_name, built = config_from_dict(config, where)
    try:
        state = build_model(model_name, built).state_dict()
    except (RuntimeError, OverflowError, TypeError) as error:
        raise UserError(f"{where}: no model of such sizes can be built ({one_line(error)[:90]})") from None
    tied = LAYOUTS[model_name].tied(config)
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in tied}


def their_shape(step, wanted, config):
    """The shape in which they store a tensor: ours transformed back, on the meta device, without data."""
    ours = [torch.empty(wanted[name], device="meta") for name in step.ours]
    return tuple(step.transform.inverse(ours, config).shape)


def full_names(layout, entries, known):
    """(name as our table has it -> name in the file, problems)."""
    stored, problems = {}, []
    for name in entries:
        full = layout.full_name(name, known)
        if full in stored:
            problems.append(f"{stored[full]} and {name} are the same tensor, stored twice")
        stored[full] = name
    return stored, problems


def tied_problems(source, name, original):
    """A tensor that is tied to another may be stored as well, but must then be equal to it."""
    if original is None:
        return []  # reported as missing
    tensor, same = source.weights.read(name), source.weights.read(original)
    if tensor.dtype == same.dtype and torch.equal(tensor, same):
        return []
    return [f"{name} differs from {original}, though {source.where.name} says that they are tied"]


def compare(expected, found):
    """What keeps the tensors found from being those expected, a phrase each."""
    problems = [f"{name} {shape} is missing" for name, shape in expected.items() if name not in found]
    problems += [
        f"{name} {entry.shape} has no place in the model"
        for name, entry in found.items()
        if name not in expected
    ]
    for name, shape in expected.items():
        if name in found and found[name].shape != shape:
            problems.append(f"{name} has shape {found[name].shape}, where the config asks for {shape}")
        elif name in found and found[name].dtype not in DTYPE_NAMES.values():
            problems.append(f"{name} is stored as {found[name].dtype}, which is not supported")
    return problems


def stop_if(problems, folder):
    """One problem makes one line; several make a list, the layers folded, that a person can still read."""
    if not problems:
        return
    lines = [text + (f" (n = {layers})" if layers else "") for text, layers in fold([(p,) for p in problems])]
    if len(lines) == 1:
        raise UserError(f"{folder}: {lines[0]}; nothing was written")
    more = [f"... and {len(lines) - MAX_PROBLEMS} more"] if len(lines) > MAX_PROBLEMS else []
    listed = "\n  ".join(lines[:MAX_PROBLEMS] + more)
    raise UserError(f"{folder}: {len(problems)} problems, nothing was written:\n  {listed}")


def beside(step, found, wanted):
    """A row of --inspect: their tensor and those of ours that it becomes."""
    return (
        step.theirs,
        shown(found[step.theirs]) if step.theirs in found else "missing",
        "\n".join(step.ours),
        "\n".join(str(wanted[name]) for name in step.ours),
        "" if step.row.transform == "copy" else step.row.transform,
    )


def shown(entry):
    return f"{entry.shape} {str(entry.dtype).removeprefix('torch.')}"


def fold(rows):
    """Rows that differ by the layer's number alone, as one row with {n} and the layers in a last column."""
    groups = {}
    for row in rows:
        numbers = re.findall(r"\.(\d+)\.", row[0])
        folded = tuple(re.sub(r"\.\d+\.", ".{n}.", cell) for cell in row)
        groups.setdefault(folded, []).extend(map(int, numbers[:1]))
    return [(*row, ranges(layers)) for row, layers in groups.items()]


def ranges(numbers):
    """0..2, 5 for 0, 1, 2, 5."""
    runs = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(f"{first}..{last}" if first < last else str(first) for first, last in runs)


# Writing ----------------------------------------------------------------------------------------------------


def forward(step, config, tensors):
    return step.transform.forward(tensors[0], config)


def inverse(step, config, tensors):
    return [step.transform.inverse(tensors, config)]


@contextmanager
def writing(out, default):
    """A new folder that takes its place when the block succeeds, and of which nothing stays when it fails."""
    target = Path(out or default).resolve()
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if target != default.resolve() and not empty:
        raise UserError(f"--out {out}: is there and not empty; name a new folder, or remove this one")
    try:
        with write_atomically(target) as new:
            new.mkdir()
            yield new
    except OSError as error:
        raise UserError(
            f"{out or default}: cannot be written ({one_line(error)}) and nothing was left there; free some "
            "space or choose another place with --out"
        ) from None


def write_moves(folder, weights, moves, dtype, progress, layers=None, products=None):
    """Carry out the moves, one after the other, into the weight files of `folder`.

    layers: those that are quantized on the way; products: what calibrates them; models/utils/quantize.py.
    """
    layers, products = layers or {}, products or {}
    files = list({entry.file: None for entry in weights.entries.values()})

    def dtype_of(move):
        return dtype or weights.entries[move.reads[0]].dtype

    def order(move):
        # Wide dtypes first keeps every tensor aligned; file by file, since some formats are read whole.
        return -dtype_of(move).itemsize, files.index(weights.entries[move.reads[0]].file)

    moves = sorted(moves, key=order)
    specs = [
        Spec(part, *shape_and_dtype)
        for move in moves
        for name, shape in move.writes.items()
        for part, shape_and_dtype in parts_of(layers, name, shape, dtype_of(move)).items()
    ]
    total = sum(spec.num_bytes for spec in specs)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None if progress else True) as bar:
        write_weights(folder, specs, transformed(weights, moves, dtype_of, bar, layers, products))


def transformed(weights, moves, dtype_of, bar, layers, products):
    """The tensors to write, each made when the one before it is on disk."""
    for move in moves:
        for name, tensor in zip(move.writes, move.transform([weights.read(name) for name in move.reads])):
            parts = quantized_parts(layers, name, cast(tensor, dtype_of(move), name), products)
            for part in parts.values():
                yield part
                bar.update(part.nbytes)


def cast(tensor, dtype, name):
    new = tensor.to(dtype)
    # float16 ends at 65504, where bfloat16 weights may go on.
    if dtype == torch.float16 and tensor.dtype != dtype and (new.isinf() & tensor.isfinite()).any():
        raise UserError(f"{name}: has values too large for float16; use --dtype bfloat16")
    return new


def write_json(path, content):
    if content:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_companions(source, target):
    """The tokenizer's files and whatever else running needs, where the checkpoint has them."""
    for path in (path for pattern in COMPANIONS for path in source.glob(pattern)):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def reversed_config(config, folder, dtype):
    """config.json as transformers wants it: with the dtype, and with the special tokens' ids."""
    path = folder / "generation_config.json"
    kept = read_json(path) if path.is_file() else {}
    ids = {name: kept[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in kept}
    path = folder / "labels.json"
    labels = label_fields(read_json(path)) if path.is_file() else {}
    theirs = {**to_hf_config(config["model"], config), **labels, **ids}
    return {**theirs, "dtype": str(dtype).removeprefix("torch.")}


# The command line -------------------------------------------------------------------------------------------


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Turn a published checkpoint into one that this project reads, and back.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    sizes = ", ".join(map(str, sorted(GROUP_SIZES)))
    add(
        "checkpoint",
        help="a folder in Hugging Face's or Meta's layout, or OWNER/NAME on the Hugging Face hub",
    )
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--inspect", action="store_true", help="print both sides' names and shapes; write nothing")
    instead("--reverse", action="store_true", help="from a converted checkpoint to Hugging Face's layout")
    add("--dtype", choices=DTYPES, help="of the weights written (default: as stored)")
    add("--quantize", choices=KINDS, help="the linear layers' weights; for a CPU with --dtype bfloat16")
    add("--group-size", type=int, metavar="N", help=f"of int4: {sizes}; default: 32, the most exact")
    add("--calibrate", metavar="FILE", help="a text that tells int4 which errors count; the model reads it")
    add("--model", choices=PAGES, help="which of models/, where more than one can read the checkpoint")
    add(
        "--out",
        metavar="FOLDER",
        help="where to write (default: CHECKPOINT/converted or CHECKPOINT/reversed)",
    )
    add(
        "--allow",
        metavar="FIELD",
        action="append",
        default=[],
        help="let an unknown field of config.json pass",
    )

    meta = parser.add_argument_group("what Meta's params.json leaves out (for consolidated.*.pth only)")
    add = meta.add_argument
    add("--max-seq-len", type=positive(int), metavar="N", help="the context: 4096, 8192 or 131072")
    add("--rope-factor", type=positive(float), metavar="X", help="8 for Llama 3.1, 32 for Llama 3.2")
    for name, default in (("low", 1.0), ("high", 4.0)):
        add(
            f"--rope-{name}-freq-factor",
            type=positive(float),
            metavar="X",
            default=default,
            help="default: %(default)s, as in Llama 3.1",
        )
    add("--rope-original-seq-len", type=positive(int), metavar="N", default=8192, help="default: %(default)s")
    return parser.parse_args()


def positive(kind):
    """An argparse type: a finite int or float above 0."""

    def parse(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


if __name__ == "__main__":
    run_main(main)
