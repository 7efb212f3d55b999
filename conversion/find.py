"""Which folder a checkpoint's name means, what there is, and what was probably meant; nothing slow."""

import difflib
import re
from pathlib import Path

from models.utils.command_line import CHECKPOINTS
from models.utils.errors import UserError
from models.utils.files import read_json

# What people call a checkpoint -> the repository that has it, for the names that do not say it themselves.
PUBLISHED = {
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "gpt-neox-20b": "EleutherAI/gpt-neox-20b",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "opus-mt-en-fr": "Helsinki-NLP/opus-mt-en-fr",
    "pythia-160m": "EleutherAI/pythia-160m",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "vit-base-patch16-224": "google/vit-base-patch16-224",
}


def find_folder(name):
    """The folder of a checkpoint: a path, or the name of one under checkpoints/; or a GGUF file."""
    for folder in (Path(name), CHECKPOINTS / name):
        if folder.is_dir():
            return folder
    if str(name).endswith(".gguf"):
        if Path(name).is_file():
            return Path(name)
        raise UserError(f"{name}: no such file; one of the hub is fetched by convert_hf_checkpoint.py")
    raise UserError(f"{name}: no such checkpoint; {what_was_meant(str(name))}")


def usual_place(folder):
    """Where a checkpoint's converted form stands: beside it, or for a GGUF file under its name."""
    is_file = Path(folder).suffix == ".gguf"
    return (CHECKPOINTS / Path(folder).stem if is_file else Path(folder)) / "converted"


FROM = "converted_from.txt"  # in what was made of a GGUF file, whose name another file may have too


def identity(path):
    """What tells a file from others of its name, and from itself before it was fetched anew."""
    about = path.stat()
    return f"{path.resolve()}\n{about.st_size} bytes, of {about.st_mtime_ns}\n"


def converted_from(path):
    """Whether what stands at the usual place was made of this GGUF file, as it is now."""
    note = usual_place(path) / FROM
    return note.is_file() and note.read_text(encoding="utf-8") == identity(path)


def what_was_meant(name):
    """The end of an error: the nearest checkpoint there is, or how to get this one, or all there are."""
    here = {path.name: path.name for path in CHECKPOINTS.glob("*/")}
    here |= {path.name: str(path) for path in Path(name).parent.glob("*/") if "/" in name}
    short = name.rstrip("/").rpartition("/")[2]
    if short.lower() in PUBLISHED:
        return f"fetch it with: python convert_hf_checkpoint.py {PUBLISHED[short.lower()]}"
    if holding := [path.name for path in sorted(CHECKPOINTS.glob("*/")) if model_of(path) == short]:
        return f"checkpoints of this model: {', '.join(holding)}"
    if close := difflib.get_close_matches(short, here, n=1):
        return f"did you mean {here[close[0]]}?"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("checkpoints/"):
        return f"if it is on Hugging Face, fetch it with: python convert_hf_checkpoint.py {name}"
    return f"there are: {', '.join(sorted(path.name for path in CHECKPOINTS.glob('*/'))) or 'none yet'}"


def model_of(folder):
    """Which of models/ a checkpoint is for, "llama", or its model_type where it is not converted; or None."""
    for place in (folder / "converted", folder):
        if (place / "config.json").is_file():
            try:
                fields = read_json(place / "config.json")
            except UserError:
                return None
            return fields.get("model", fields.get("model_type"))
    return None


def size_of(folder):
    """Bytes of the weights of a checkpoint, as they were published where they are there, else converted."""
    for place in (folder, folder / "original", folder / "converted"):
        files = [path for ending in ("safetensors", "bin", "pth") for path in place.glob(f"*.{ending}")]
        if files:
            return sum(path.stat().st_size for path in files)
    return 0


def listing():
    """The lines of `run.py --list`: what is there, what it can do, its size, whether it is converted."""
    # Asking a model what it can do takes seconds of imports; looking for a folder does not wait for them.
    from conversion.tables import HF_TYPES
    from models import MODEL_NAMES, kind_of
    from models.utils.machine import spoken_bytes

    rows = [("checkpoint", "model", "kind", "weights", "")]
    for folder in sorted(CHECKPOINTS.glob("*/")):
        name = model_of(folder)
        model = HF_TYPES[name].model if name in HF_TYPES else name
        kind = kind_of(model) if model in MODEL_NAMES else "?"
        converted = (folder / "converted" / "config.json").is_file()
        state = "converted" if converted else "converted when first run"
        rows.append((folder.name, str(model or "?"), kind, spoken_bytes(size_of(folder)), state))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
