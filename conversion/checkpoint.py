"""A converted checkpoint, found, checked against the memory there is, and loaded."""

import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from conversion.convert import calibration_windows, convert
from conversion.weight_files import open_weights
from models import build_model, config_from_dict, load_model
from models.utils.command_line import CHECKPOINTS
from models.utils.compile import compile_decoding
from models.utils.errors import UserError
from models.utils.files import converted_folder, read_json
from models.utils.machine import DTYPES, available_memory, spoken_bytes
from models.utils.quantize import spoken, stored_quantization, swap


class Checkpoint(NamedTuple):
    folder: Path
    model_name: str
    config: object
    load: Callable  # load(num_slots) gives the model, when its memory and that of the cache are there


def open_checkpoint(name, args, widths=(1,)):
    """widths: how many tokens per row are fed at once behind what is cached, which --compile must know."""
    folder = find_checkpoint(name)
    model_name, config = config_from_dict(read_json(folder / "config.json"), folder / "config.json")
    windows = calibration_windows(args.calibrate, folder, model_name, config)

    def load(num_slots=0):
        check_memory(folder, model_name, config, num_slots, args)
        model = load_model(folder, args.device, DTYPES.get(args.dtype), args.quantization, windows)
        if args.compile:
            model = compile_decoding(model, widths, report)
            model.new_cache(1, num_slots)  # compiles, before anybody's clock starts
        return model

    return Checkpoint(folder, model_name, config, load)


def open_draft(args, kinds):
    """The Checkpoint of --draft, which must be a model of one of these kinds; None: --lookup needs none."""
    if args.lookup:
        return None
    # A drafter feeds one token after the other, and two where it has not seen its own last one.
    draft = open_checkpoint(args.draft, args, widths=(1, 2))
    if draft.model_name not in kinds:
        raise UserError(
            f"--draft {args.draft}: holds a {draft.model_name} model, which cannot draft here; "
            f"give one of these: {', '.join(kinds)}"
        )
    return draft


def find_checkpoint(name):
    """The converted folder of a checkpoint, which is converted first if that was not done yet."""
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"{name}: no such folder; {what_was_meant(str(name))}")
    try:
        return converted_folder(folder)
    except UserError:
        print(f"{folder} is not converted yet; converting it first", file=sys.stderr)
        convert(folder)
    return converted_folder(folder)


def what_was_meant(name):
    """The end of the error about a missing checkpoint: the nearest one there is, or how to get this one."""
    known = {path.name: path for place in (CHECKPOINTS, Path(name).parent) for path in place.glob("*/")}
    close = difflib.get_close_matches(Path(name).name, known, n=1)
    if close:
        return f"did you mean {known[close[0]]}?"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("checkpoints/"):
        return f"if it is on Hugging Face, fetch it with: python convert_hf_checkpoint.py {name}"
    return f"there are: {', '.join(sorted(path.name for path in CHECKPOINTS.glob('*/'))) or 'none yet'}"


def report(line):
    print(line, file=sys.stderr)


def check_memory(folder, model_name, config, num_slots, args):
    """Say how much memory weights and cache take before they take it; UserError if there is not enough."""
    stored = stored_quantization(read_json(folder / "config.json"), folder / "config.json")
    if stored and args.quantization:
        raise UserError(f"{folder}: is {stored} already; run it without --quantize")
    dtypes = (entry.dtype for entry in open_weights(folder).entries.values())
    # The codes of quantized layers have other dtypes than the rest.
    floats = (dtype for dtype in dtypes if isinstance(dtype, torch.dtype))
    model = build_model(model_name, config, device="meta").to(DTYPES.get(args.dtype, next(floats, None)))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if quantization := stored or args.quantization:
        dtype += f", {spoken(quantization, swap(model, quantization))}"
    weights = sum(parameter.nbytes for parameter in model.parameters())
    needs, cache = f"{spoken_bytes(weights)} of weights ({dtype})", 0
    if num_slots:
        cache = sum(tensor.nbytes for layer in model.new_cache(1, num_slots) for tensor in layer)
        needs += f" and {spoken_bytes(cache)} of cache for {num_slots} tokens"
    print(f"{folder}: {needs}, on {args.device}", file=sys.stderr)

    available = available_memory(args.device)
    if available is not None and weights + cache > available:
        raise UserError(
            f"{folder}: {needs} do not fit into the {spoken_bytes(available)} that {args.device} has free; "
            f"try --dtype bfloat16, fewer --max-new-tokens, or a smaller checkpoint"
        )
