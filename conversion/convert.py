"""Writing a checkpoint in our form, and back in Hugging Face's, and showing how the two match.

What happens: config.json says which model it is, and its fields become a flat config of ours. The model,
built without memory, says which tensors it wants, in which shapes. A table (in conversion/tables/) says
where they stand in the checkpoint. Every disagreement is listed before a byte is written (match.py). Then the
tensors go over, one at a time, through the table's transforms.
"""

import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
from tqdm import tqdm

from conversion.config_fields import label_fields, stored_labels
from conversion.find import FROM, identity, usual_place
from conversion.hub import COMPANIONS
from conversion.match import (
    Move,
    compare,
    fold,
    inverse,
    match_tensors,
    stop_if,
    their_shape,
    wanted_shapes,
)
from conversion.source import open_source
from conversion.tables import LAYOUTS, hf_type_of, to_hf_config
from conversion.tensor_table import plan
from conversion.weight_files import Spec, open_weights, write_weights
from models import build_model, config_from_dict, config_to_dict
from models.utils.errors import UserError, one_line, printable
from models.utils.files import (
    MAX_BYTES,
    converted_folder,
    files_in,
    plain_file,
    read_json,
    read_text,
    refuse_to_replace,
    write_atomically,
)
from models.utils.quantize import (
    calibrate,
    pack,
    parts_of,
    plan_layers,
    quantized_parts,
    spoken,
    stored_quantization,
)
from models.utils.safetensors_files import CODE_NAMES
from models.utils.tokenizer import load_tokenizer
from models.utils.weights import fill, main_dtype

CALIBRATION_TOKENS = 16384  # at most, of which a window goes through the model at a time
CALIBRATION_WINDOW = 512
INT4_GROUP = 32  # weights that share a scale in the int4 of other people's files


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

    folder: the checkpoint's, or a GGUF file, whose converted form goes to checkpoints/ under its name.
    out: where to write, if not into `folder`/converted. dtype: of the new weights, if not as stored.
    allow: unknown fields of config.json to let pass. meta: what Meta's params.json does not say.
    progress: whether to show a bar, on a terminal. model: which of ours, where more than one can be chosen.
    quantization: of the linear layers, a Quantization of models/utils/quantize.py.
    calibration: a file of text for int4, which the whole model reads first, see whole_model.
    """
    source = open_source(folder, allow, meta, model)
    match = match_tensors(source)
    stop_if(match.problems, folder)
    for what, count in match.left_out.items():
        print(f"{folder}: left out: {count} tensors of what {what}", file=sys.stderr)
    usual = usual_place(folder)
    model_name, config = config_from_dict(source.config, source.where)
    windows = calibration_windows(calibration, folder, model_name, config)
    ours, layers, products = config_to_dict(model_name, config), {}, {}
    if source.stored:
        if quantization:
            raise UserError(f"{folder}: is {source.stored} already, and stays so; leave out --quantize")
        ours["quantization"] = asdict(source.stored)
        print(f"{folder}: the experts' matrices stay in {source.stored}, as they are", file=sys.stderr)
    if quantization:
        layers, notes = plan_layers(build_model(model_name, config), quantization)
        ours["quantization"] = asdict(quantization)
        print(f"{folder}: {spoken(quantization, notes)}", file=sys.stderr)
    if windows:
        products = calibrate(whole_model(source, match.moves), layers, windows)
    with writing(out, usual) as new:
        write_moves(new, source.weights, match.moves, dtype, progress, layers, products)
        write_json(new / "config.json", ours)
        write_json(new / "generation_config.json", source.generation)
        write_json(new / "labels.json", source.labels)
        if source.files is None:
            for place in dict.fromkeys((Path(folder), source.folder)):
                copy_companions(place, new)
        for name, content in (source.files or {}).items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_bytes(content)
        if source.files is not None:
            (new / FROM).write_text(identity(source.where), encoding="utf-8")
    return Path(out or usual)


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
    if Path(folder).suffix == ".gguf":
        raise UserError(
            f"--calibrate: {folder} brings no tokenizer's files yet; convert it, then calibrate that"
        )
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
    stored = stored_quantization(config, converted / "config.json")
    layout = LAYOUTS[config_from_dict(config, converted / "config.json")[0]]
    if stored and stored.kind not in layout.in_codes:
        raise UserError(
            f"{converted}: is {stored}, and what rounding took is gone; convert the original again without "
            "--quantize, then reverse that"
        )
    layout = layout.stored_in(stored)
    weights = open_weights(converted)
    wanted = wanted_shapes(config, converted / "config.json", stored)
    steps = plan(layout, config, wanted)
    codes = {name for step in steps if step.row in layout.codes for name in step.ours}
    stop_if(compare(wanted, weights.entries, codes), converted)
    moves = [
        Move(
            step.ours,
            {layout.saved_name(step.theirs, config): their_shape(step, wanted, config)},
            partial(inverse, step, config),
        )
        for step in steps
    ]
    beside = converted.parent if converted.name == "converted" else converted
    with writing(out, beside / "reversed") as new:
        write_moves(new, weights, moves, dtype, progress)
        copy_companions(converted, new)
        numbers = [entry for entry in weights.entries.values() if isinstance(entry.dtype, torch.dtype)]
        write_json(new / "config.json", reversed_config(config, converted, dtype or main_dtype(numbers)))
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
        print(printable("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()))
    stop_if(match.problems, folder)


@contextmanager
def writing(out, default):
    """A new folder that takes its place when the block succeeds, and of which nothing stays when it fails.

    An earlier conversion is replaced at the usual place alone; what somebody else put there is not touched.
    """
    target = Path(os.path.abspath(out or default))
    try:
        empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
        if target != Path(os.path.abspath(default)) and not empty:
            raise UserError(f"--out {out}: is there and not empty; name a new folder, or remove this one")
        refuse_to_replace(target, written_before_markers, by="folder")
        with write_atomically(target, written_before_markers) as new:
            new.mkdir()
            yield new
    except OSError as error:
        raise UserError(
            f"{out or default}: cannot be written ({one_line(error)}) and nothing was left there; free some "
            "space or choose another place with --out"
        ) from None


def written_before_markers(folder):
    """Whether a folder is a conversion of the time before such folders were marked, and nothing else."""
    known = {
        *COMPANIONS,
        "config.json",
        "generation_config.json",
        "labels.json",
        "model.safetensors.index.json",
    }
    weights = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
    if not all(
        any(Path(name).match(k) for k in known) or weights.fullmatch(name) for name in files_in(folder)
    ):
        return False
    try:
        return "model" in read_json(folder / "config.json")
    except UserError:
        return False


def write_moves(folder, weights, moves, dtype, progress, layers=None, products=None):
    """Carry out the moves, one after the other, into the weight files of `folder`.

    layers: those that are quantized on the way; products: what calibrates them; models/utils/quantize.py.
    """
    layers, products = layers or {}, products or {}
    files = list({entry.file: None for entry in weights.entries.values()})

    def dtype_of(move):
        stored = weights.entries[move.reads[0]].dtype
        return CODE_NAMES.get(stored) or dtype or stored  # codes are no numbers to be rounded

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
        if kept := kept_codes(weights, move, layers, dtype_of(move)):
            for part in kept:
                yield part
                bar.update(part.nbytes)
            continue
        tensors = [weights.read(name) for name in move.reads]
        for name, tensor in zip(move.reads, tensors):
            refuse_infinite(tensor, name)
        for name, tensor in zip(move.writes, move.transform(tensors)):
            parts = quantized_parts(layers, name, cast(tensor, dtype_of(move), name), products)
            for part in parts.values():
                yield part
                bar.update(part.nbytes)


def kept_codes(weights, move, layers, dtype):
    """The parts to write of matrices that the file holds in int4 already and that are to be int4; else None.

    Their codes go over as they are, without being rounded again; move.transform may change the places of
    rows, and does with codes, scales and zeros what it does with weights.
    """
    plans = [layers.get(name.removesuffix(".weight")) for name in move.writes]
    read_int4 = getattr(weights, "read_int4", None)  # which gguf.py has alone
    if read_int4 is None or not all(plan and plan[1] == INT4_GROUP for plan in plans):
        return None
    if (stored := read_int4(*move.reads)) is None:
        return None
    for numbers in stored[1:]:
        refuse_infinite(numbers, move.reads[0])
    codes, scales, zeros = (move.transform([numbers]) for numbers in stored)
    return [
        part
        for matrix, scale, zero in zip(codes, scales, zeros)
        for part in (pack(matrix), torch.stack([scale.T, zero.T], dim=-1).to(dtype).contiguous())
    ]


def refuse_infinite(tensor, name):
    """One NaN or infinity among the weights makes answers that are none, and mostly of every number NaN."""
    if torch.stack(torch.aminmax(tensor)).isfinite().all():
        return
    count = (~tensor.isfinite()).sum().item()
    raise UserError(
        f"{name}: {count} of its {tensor.numel()} numbers are NaN or infinite, so the model cannot answer; "
        "the file is damaged or its training failed; fetch it again, or take another checkpoint"
    )


def cast(tensor, dtype, name):
    new = tensor.to(dtype)
    # float16 ends at 65504, where bfloat16 weights may go on, and float32 where float64 goes on.
    if new.dtype != tensor.dtype and (new.isinf() & tensor.isfinite()).any():
        shown = str(dtype).removeprefix("torch.")
        raise UserError(f"{name}: has values too large for {shown}; use --dtype bfloat16, or leave it out")
    return new


def write_json(path, content):
    if content:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_companions(source, target):
    """The tokenizer's files and whatever else running needs, where the checkpoint has them."""
    for path in (path for pattern in COMPANIONS for path in source.glob(pattern)):
        if plain_file(path, source).stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: has more than {MAX_BYTES:,} bytes, which no such file needs; remove it")
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def reversed_config(config, folder, dtype):
    """config.json as transformers wants it: with the dtype, and with the special tokens' ids."""
    path = folder / "generation_config.json"
    kept = read_json(path) if path.is_file() else {}
    ids = {name: kept[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in kept}
    labels = label_fields(stored_labels(folder)) if config.get("num_labels") else {}
    theirs = {**to_hf_config(config["model"], config), **labels, **ids}
    if config.get("quantization"):
        theirs["quantization_config"] = hf_type_of(theirs).quantization
    return {**theirs, "dtype": str(dtype).removeprefix("torch.")}
