"""The folder of a run: whose it is, that one run at a time writes there, and that nothing of others is lost.

Proof: tests/test_train_loops.py.
"""

from contextlib import contextmanager, suppress
from pathlib import Path

from models.utils.command_line import CHECKPOINTS
from models.utils.errors import UserError, one_line
from models.utils.files import remove, write_atomically
from models.utils.training_notes import (
    NOTES,
    TRAINING,
    has_notes,
    is_ours,
    note_file,
    read_notes,
    write_notes,
)

ALWAYS = ("config.json", "model.safetensors", "README.md", "loss.png")  # what every page leaves


@contextmanager
def run_folder(options, files=()):
    """The folder of the run, a Path, which no other run writes to meanwhile.

    files: the names of what the page leaves there besides ALWAYS. UserError where a run would replace what
    is not its own, which --restart does not allow either.
    """
    folder = folder_of(options)
    check_place(folder)
    check_owner(folder, (*ALWAYS, *files))
    training = folder / TRAINING
    with writing(folder):
        training.mkdir(parents=True, exist_ok=True)
    with locked(training / "lock", folder):
        if not has_notes(folder):
            with writing(folder):
                write_notes(folder, page=options.page, start=options.start, arguments=options.arguments)
        try:
            yield folder
        finally:
            forget_unless_begun(folder)


def folder_of(options):
    return Path(options.out or CHECKPOINTS / f"my-{Path(options.config).stem}")


def check_place(folder):
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {folder}: {path} is a file; give a folder, which may be new")


def check_owner(folder, names):
    if not has_notes(folder) and strangers(folder / TRAINING):
        raise UserError(
            f"{folder / TRAINING} was not written by a training run; move it away, or give another --out"
        )
    for name in names:
        if (folder / name).exists() and not is_ours(folder, name):
            what = "holds a model that was not trained there" if name == "config.json" else f"has a {name}"
            raise UserError(
                f"{folder} {what}, or that was changed since; move it away, or give another --out"
            )


def strangers(training):
    """Whether there is more than a run that was killed in its first moment leaves."""
    if not training.is_dir():
        return training.exists()
    return any(path.name != "lock" and not path.name.startswith(NOTES) for path in training.iterdir())


@contextmanager
def locked(path, folder):
    """Held until the block ends. The system lets go of it when a process dies, however it dies."""
    with writing(folder):
        file = open(path, "a")  # noqa: SIM115 (closed below)
    with file:
        try:
            lock(file)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another training run is at work in this folder; wait, or give another --out"
            ) from None
        yield


def lock(file):
    """BlockingIOError if another process, or another open file of this one, has the lock."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            raise BlockingIOError from None
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system without locks


def forget_unless_begun(folder):
    """A command that came to nothing leaves nothing: no tokens and no state, then no folder either."""
    training = folder / TRAINING
    if training.is_dir() and {path.name for path in training.iterdir()} <= {"lock", NOTES}:
        remove(training)
        with suppress(OSError):  # not empty
            folder.rmdir()


# What is written --------------------------------------------------------------------------------------------


@contextmanager
def writing(path):
    """What the system refuses (a full disk, a folder of somebody else's) as one line about `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save makes a RuntimeError of what its file says.
        error = error if isinstance(error, OSError) else error.__context__
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"{path}: cannot be written ({error.strerror or one_line(error)}); what was there still is; "
            "make room, and the same command goes on"
        ) from None


@contextmanager
def write_result(folder, name):
    """A path to write the file `name` of the run's folder at, which replaces it if the run wrote that."""
    with writing(folder / name), write_atomically(folder / name) as path:
        yield path
        check_owner(folder, [name])
        note_file(folder, name, path)


def remove_results(folder, names):
    """Delete those of the files that the run wrote."""
    for name in names:
        if is_ours(folder, name):
            (folder / name).unlink()


def remove_other_results(folder, names):
    """What an earlier run wrote here and this one does not: the tokenizer of another kind of model, say."""
    remove_results(folder, set(read_notes(folder)["written"]) - set(names))
