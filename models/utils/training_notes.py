"""What a training run notes in its folder, so that others know what they find: FOLDER/training/run.json.

    {"page": "language_model", "start": "python -m runs_train.language_model",
     "arguments": ["--config", ...], "written": {"README.md": [sha256, ...], ...}}

The start and the arguments are the command that goes on with the run. What it wrote is known by its hash: a
file that has another one is somebody's own work, and is left alone.
"""

import hashlib
import json
import shlex
from pathlib import Path

from models.utils.errors import UserError
from models.utils.files import read_json, write_atomically

TRAINING = "training"  # the folder inside a run's folder
NOTES = "run.json"


def unfinished_run(folder):
    """One sentence about a folder that holds a training run and no model yet; None about any other folder."""
    folder = Path(folder)
    if (folder / "config.json").exists() or not has_notes(folder):
        return None
    try:
        notes = read_notes(folder)
    except UserError:
        return None
    start = notes.get("start", f"python -m runs_train.{notes['page']}")
    command = f"{start} {shlex.join(notes['arguments'])}"
    # A folder may come from anywhere, and its notes bring no line ends and no escape sequences.
    command = "".join(letter if letter.isprintable() else "?" for letter in command)
    return f"{folder}: an unfinished training run, not a model yet; go on with: {command}"


def has_notes(folder):
    return (folder / TRAINING / NOTES).is_file()


def read_notes(folder):
    path = folder / TRAINING / NOTES
    notes = read_json(path)
    kinds = {"page": str, "arguments": list, "written": dict}
    is_whole = all(isinstance(notes.get(name), kind) for name, kind in kinds.items())
    if not is_whole or not all(isinstance(word, str) for word in notes["arguments"]):
        raise UserError(f"{path}: is not what a training run writes; move that folder away")
    return notes


def write_notes(folder, **changes):
    """Change some of the notes, or begin them."""
    notes = read_notes(folder) if has_notes(folder) else {"written": {}}
    with write_atomically(folder / TRAINING / NOTES) as path:
        path.write_text(json.dumps(notes | changes, indent=2) + "\n", encoding="utf-8")


def is_ours(folder, name):
    """Whether the file was written by this folder's run, and not changed since."""
    path = folder / name
    return (
        path.is_file() and has_notes(folder) and hash_of(path) in read_notes(folder)["written"].get(name, [])
    )


def note_file(folder, name, path):
    """Note that `path` is about to become the file `name`, which until then is what it was."""
    written = read_notes(folder)["written"]
    write_notes(folder, written=written | {name: [*written.get(name, []), hash_of(path)][-2:]})


def hash_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
