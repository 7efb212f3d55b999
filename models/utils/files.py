"""Files that are whole or not there: reading with clear errors, writing beside and renaming."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from models.utils.errors import UserError


def read_json(path):
    """The object in a JSON file. UserError when the file is missing, broken or no object."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({one_line(error)}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__} where an object was expected")
    return content


def read_text(path, option):
    """The text of the file that a command line's option names, exactly as it stands there, in UTF-8."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {option} takes a text file") from None
    if not content:
        raise UserError(f"{path}: is empty; {option} takes a text file")
    if b"\0" in content:
        raise UserError(f"{path}: is a binary file; {option} takes a text file")
    return decode_utf8(content, path)


def decode_utf8(content, where):
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: no UTF-8 text (byte {error.start}); is it a binary file?") from None


def one_line(error):
    """The message of an exception, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def write_atomically(path):
    """Yield a path beside `path` to write a file or a folder at; renamed to `path` if the block succeeds.

    A reader therefore finds the old content or the new, never a half. What an earlier, killed run left behind
    under the temporary name is removed first.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    try:
        yield partial
        if partial.is_dir():
            replace_folder(partial, path)
        else:
            os.replace(partial, path)
    except BaseException:
        remove(partial)
        raise


def replace_folder(source, target):
    """Rename a folder over another: a full one cannot be overwritten, so it steps aside first."""
    aside = target.with_name(target.name + ".old")
    remove(aside)
    if target.exists():
        os.rename(target, aside)
    os.rename(source, target)
    remove(aside)


def remove(path):
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def converted_folder(folder):
    """The folder that load_model and load_tokenizer read: `folder`/converted, or `folder` itself."""
    return read_converted(folder)[0]


def read_converted(folder):
    """(the converted folder, the fields of its config.json) of a checkpoint."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; checkpoints are folders under checkpoints/")
    for candidate in (folder / "converted", folder):
        config = candidate / "config.json"
        if config.is_file() and "model" in (fields := read_json(config)):
            return candidate, fields
    raise NotConverted(f"{folder}: not converted yet; run: python convert_hf_checkpoint.py {folder}")


class NotConverted(UserError):
    """A checkpoint as it was published."""
