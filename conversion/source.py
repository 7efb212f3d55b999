"""A published checkpoint, opened: which layout it has, what its config says, where its weights stand."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversion.config_fields import read_labels
from conversion.fp8 import BlockScaled
from conversion.meta import META_LLAMA, MetaOptions, open_meta
from conversion.tables import LAYOUTS, from_hf_config, from_names, generation_ids
from conversion.tensor_table import Layout
from conversion.weight_files import open_weights
from models import config_from_dict
from models.utils.errors import UserError
from models.utils.files import plain_file, read_json, reading
from models.utils.quantize import Quantization, published_quantization, stored_quantization


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
    stored: Quantization | None = None  # in whose codes the files hold their matrices, and we keep them
    files: dict | None = None  # {name: content} of a tokenizer that stands in the file itself


def open_source(folder, allow=(), meta=None, model=None):
    """Hugging Face's layout where there is a config.json, Meta's where there is a params.json."""
    folder = Path(folder)
    if folder.suffix == ".gguf":
        return open_gguf(folder, allow, meta, model)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / "config.json").is_file():
        return open_hf(folder, allow, meta, model)
    for place in (folder, folder / "original"):
        if (place / "params.json").is_file():
            plain_file(place / "params.json", folder)
            if model not in (None, "llama"):
                raise UserError(f"{place}: Meta's files are for models/llama.py; leave out --model {model}")
            config, weights = open_meta(place, meta or MetaOptions(), allow)
            return Source(place, place / "params.json", config, weights, META_LLAMA)
    if files := sorted(folder.glob("*.gguf")):
        raise UserError(f"{folder}: holds GGUF files; convert one of them: {', '.join(map(str, files[:9]))}")
    raise UserError(f"{folder}: no config.json (nor Meta's params.json); fetch the checkpoint's config too")


def open_gguf(path, allow, meta, model):
    from conversion.gguf_model import read_gguf  # the gguf package takes a moment to import

    if meta not in (None, MetaOptions()):
        raise UserError(f"{path}: says what --max-seq-len and --rope-... are for; leave these options out")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    file, config, layout, generation, files, stored = read_gguf(path, allow)
    if model not in (None, config["model"]):
        raise UserError(f"{path}: is for models/{config['model']}.py; leave out --model {model}")
    config_from_dict(config, path)
    return Source(path.parent, path, config, file, layout, generation, stored=stored, files=files)


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
        with reading(where):
            model_name, config = from_hf_config(theirs, allow, model)
        weights = open_weights(folder)
        if (theirs.get("quantization_config") or {}).get("quant_method") == "fp8":
            weights = BlockScaled(weights, folder)
        with reading(where):
            config |= from_names(theirs, weights.entries, model)
            generation = generation_ids(theirs, model)
        config_from_dict(config, where)
        labels = read_labels(theirs, config["num_labels"]) if config.get("num_labels") else {}
    except UserError as error:
        raise UserError(f"{folder}/{error}" if str(error).startswith("config.json") else error) from None
    stored = published_quantization(theirs)
    layout = LAYOUTS[model_name].stored_in(stored)
    return Source(folder, where, config, weights, layout, generation, labels, stored)
