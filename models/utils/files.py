"""Files that are whole or not there: reading with clear errors, writing beside and renaming.

A checkpoint comes from strangers: of its files only regular ones are read, and no link leads out of its
folder. And what stands where something is to be written is replaced only if this program wrote it.
"""

import glob
import json
import os
import shutil
import stat
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from models.utils.errors import UserError, one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_BYTES = 200 * 10**6  # of a file that is read as a whole; the largest tokenizer.json has 35 MB
MAX_TEXT_BYTES = 2 * 10**9
MARKER = ".written-by-zoo"  # in a folder that this program wrote, and may therefore replace
MARKER_NOTE = "Written by a program of the model zoo, which may replace this folder. It consists of:"
LOCK, LOCK_NOTE = ".lock", "held while the folder around this file is being written"


# Reading ----------------------------------------------------------------------------------------------------


@contextmanager
def reading(path, then="fetch it again"):
    """Whatever the reading of a damaged or hostile file may throw, as one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {then}") from None
    except BaseException as error:
        # The libraries written in Rust panic with an exception that is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{path}: cannot be read ({one_line(error)[:200]}); {then}") from None


def plain_file(path, home=None, then="fetch it again"):
    """`path`, which must be a regular file inside the folder `home` (default: its own), links followed.

    A link that leads out of a checkpoint would read, or copy, whatever its author likes. Only the cache of
    huggingface_hub consists of links: from snapshots/REVISION/ to files in blobs/ beside it.
    """
    path = Path(path)
    with reading(path, then):
        real, home = path.resolve(strict=True), Path(home or path.parent).resolve()
        if not stat.S_ISREG(real.stat().st_mode):
            raise UserError(f"{path}: is no regular file (but a folder, a device or a pipe); remove it")
        blobs = [folder.parent / "blobs" for folder in home.parents if folder.name == "snapshots"]
        if not real.is_relative_to(home) and real.parent not in blobs:
            raise UserError(
                f"{path}: is a link that leads out of its folder, to {real}; put the file itself there"
            )
    return path


def read_bytes(path):
    """The content of a plain file, as for plain_file, that is no larger than any of its kind should be."""
    with reading(path):
        size = plain_file(path).stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: has {size:,} bytes, and no such file needs more than {MAX_BYTES:,}")
        return Path(path).read_bytes()


def read_json(path):
    """The object in a JSON file. UserError when the file is missing, broken or no object."""
    content = read_bytes(path)
    try:
        content = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({one_line(error)}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__} where an object was expected")
    return content


def read_text(path, option):
    """The text of the file that a command line's option names, exactly as it stands there, in UTF-8."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {option} takes a text file") from None
    if not content:
        raise UserError(f"{path}: is empty; {option} takes a text file")
    if b"\0" in content:
        raise UserError(f"{path}: is a binary file; {option} takes a text file")
    if len(content) > MAX_TEXT_BYTES:
        raise UserError(f"{path}: is too large; {option} takes up to {MAX_TEXT_BYTES:,} bytes")
    return decode_utf8(content, path)


def decode_utf8(content, where):
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: no UTF-8 text (byte {error.start}); is it a binary file?") from None


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
        if config.is_file() and "model" in (fields := read_json(plain_file(config, folder))):
            return candidate, fields
    raise NotConverted(f"{folder}: not converted yet; run: python convert_hf_checkpoint.py {folder}")


class NotConverted(UserError):
    """A checkpoint as it was published."""


# Writing ----------------------------------------------------------------------------------------------------


@contextmanager
def write_atomically(path, ours=lambda folder: False):
    """Yield a path to write a file or a folder at; it becomes `path` if the block succeeds.

    A reader finds the old content or the new, never a half, and of two that write at once the last wins
    whole. Only a regular file is replaced by a file, and by a folder only a folder that was written here
    before and to which nothing was added; anything else, links too, is refused with a UserError.
    ours: whether a folder without MARKER was nevertheless written by this program, before there were markers.
    """
    path = Path(path)
    refuse_to_replace(path, ours)
    with room_beside(path) as room:
        new = room / path.name
        try:
            yield new
        except OSError as error:
            if str(error.filename).startswith(str(room)):
                error.filename = str(path)
            raise
        if new.is_dir():
            (new / MARKER).write_text("\n".join([MARKER_NOTE, *files_in(new), ""]), encoding="utf-8")
            replace_folder(new, path, room, ours)
        else:
            refuse_to_replace(path, ours, by="file")
            os.replace(new, path)


def refuse_to_replace(path, ours, by=None):
    """UserError where something stands at `path` that this program did not write; by: "file" or "folder"."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(mode):
        raise UserError(f"{path}: is a link, which is not followed; remove it, or choose another place")
    if stat.S_ISDIR(mode):
        # Looked at twice, since somebody else who writes here may just be replacing it.
        strange = strangers(path, ours) and strangers(path, ours)
        if strange:
            more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            raise UserError(
                f"{path}: holds {strange[0]}{more}, which this program did not write; move that elsewhere, "
                "or choose another place"
            )
    if (by == "file" and stat.S_ISDIR(mode)) or (by == "folder" and stat.S_ISREG(mode)):
        raise UserError(f"{path}: is there and no {by}; move it, or choose another place")
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise UserError(f"{path}: is a device or a pipe; choose another place")


def strangers(folder, ours):
    """The files in a folder that this program did not write there."""
    try:
        note, *listed = (folder / MARKER).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return [] if ours(folder) else files_in(folder)
    written = {MARKER, *listed} if note == MARKER_NOTE else set()
    return [name for name in files_in(folder) if name not in written]


def files_in(folder):
    """What a folder holds at any depth, but for folders, by the path from there; links are not followed."""
    paths = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        paths += [Path(place, name).relative_to(folder).as_posix() for name in files + links]
    return sorted(paths)


def replace_folder(new, path, room, ours):
    """Rename a folder over another: a full one cannot be overwritten, so it first steps aside into `room`."""
    for attempt in range(100):
        try:
            refuse_to_replace(path, ours, by="folder")
            if path.is_dir():
                os.rename(path, room / f"{BEFORE}{attempt}")
            os.rename(new, path)
            return
        except OSError:
            # Somebody else who writes here was quicker: his folder is whole, and steps aside like any other.
            if attempt == 99 or not new.exists():
                raise


BEFORE = "before-"  # in a room: what stood at the place before


@contextmanager
def room_beside(path):
    """A new folder on the disk of `path`, for what is being written, and gone afterwards.

    Nobody can guess its name. As long as its lock is held its process lives; one whose lock is free was left
    by a process that was killed, and is removed by the next that writes at this place.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:40]}."
    for lock in path.parent.glob(f"{glob.escape(prefix)}*.partial/{LOCK}"):
        with ExitStack() as held:
            if not lock.parent.is_symlink() and hold(lock, held):
                clear(lock.parent, path)
    with ExitStack() as held:
        room = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=path.parent))
        try:
            # Held before it has the name by which it is looked for.
            (room / "lock").write_text(LOCK_NOTE)
            hold(room / "lock", held)
            os.rename(room / "lock", room / LOCK)
            yield room
        finally:
            clear(room, path)
            with suppress(OSError):
                for folder in missing:
                    folder.rmdir()  # which fails where it holds something


def hold(lock, held):
    """Whether nobody else holds this lock of a room; it is then ours until the ExitStack `held` closes."""
    if fcntl is None or lock.is_symlink():
        return False
    try:
        file = held.enter_context(lock.open(encoding="utf-8"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file.read() == LOCK_NOTE
    except (OSError, ValueError):
        return False


def clear(room, path):
    """Remove a room; what had stepped aside into it goes back where nothing took its place."""
    for before in room.glob(f"{BEFORE}*"):
        if not os.path.lexists(path):
            with suppress(OSError):
                os.rename(before, path)
    shutil.rmtree(room, ignore_errors=True)


def check_output(path, option, ending=".png", begins=b"\x89PNG"):
    """A file that a command line's option names for a result: not one that holds something else already."""
    path = Path(path)
    if path.suffix.lower() != ending:
        raise UserError(f"{option} {path}: is no name of a {ending} file; give one that ends in {ending}")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{option} {path}: is a link or no file, and is not replaced; choose another name")
    if path.exists():
        with reading(path), open(path, "rb") as file:
            if file.read(len(begins)) not in (begins, b""):
                raise UserError(f"{option} {path}: is there and no {ending} file; choose another name")


def remove(path):
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
