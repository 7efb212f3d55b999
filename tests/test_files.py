"""The proof of files.py and errors.py: nothing of a user is lost, nothing stays half, an error is a line."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from models.utils.errors import UserError, printable, run_main
from models.utils.files import (
    MARKER,
    check_output,
    plain_file,
    read_bytes,
    read_json,
    read_text,
    reading,
    write_atomically,
)

ROOT = Path(__file__).parents[1]


def fill(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def put(path, ours=lambda folder: False, **files):
    with write_atomically(path, ours) as new:
        fill(new, **files)


def holds(folder):
    """name -> text of a folder's files, but for the marker."""
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != MARKER}


# What is replaced -------------------------------------------------------------------------------------------


def test_what_was_written_here_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    put(tmp_path / "new" / "folder", a="1", b="2")
    put(tmp_path / "new" / "folder", a="3")
    assert holds(tmp_path / "new" / "folder") == {"a": "3"}
    for text in "45":
        with write_atomically(tmp_path / "new" / "file") as path:
            path.write_text(text)
    assert (tmp_path / "new" / "file").read_text() == "5"
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"folder", "file"}


def test_a_folder_that_somebody_filled_is_not_replaced(tmp_path):
    mine = fill(tmp_path / "folder", notes="dear")
    with pytest.raises(UserError, match="folder: holds notes, which this program did not write"):
        put(mine, a="1")
    assert holds(mine) == {"notes": "dear"}
    put(mine, ours=lambda folder: True, a="1")  # one of the time before there were markers
    assert holds(mine) == {"a": "1"}


def test_a_folder_to_which_somebody_added_is_not_replaced(tmp_path):
    put(tmp_path / "folder", a="1")
    fill(tmp_path / "folder" / "deep", notes="dear")
    with pytest.raises(UserError, match="holds deep/notes, which"):
        put(tmp_path / "folder", a="2")
    assert (tmp_path / "folder" / "deep" / "notes").read_text() == "dear"
    assert (tmp_path / "folder" / "a").read_text() == "1"


def test_a_marker_of_another_program_says_nothing(tmp_path):
    fill(tmp_path / "folder", **{MARKER: "mine\nnotes\n", "notes": "dear"})
    with pytest.raises(UserError, match="did not write"):
        put(tmp_path / "folder", a="1")
    assert (tmp_path / "folder" / "notes").read_text() == "dear"


@pytest.mark.parametrize("kind", ["link to a folder", "link to a file", "dangling link", "file"])
def test_a_folder_replaces_neither_link_nor_file(kind, tmp_path):
    put(tmp_path / "elsewhere", precious="dear")
    (tmp_path / "letter").write_text("dear")
    targets = {"link to a folder": "elsewhere", "link to a file": "letter", "dangling link": "nowhere"}
    place = tmp_path / "place"
    place.symlink_to(tmp_path / targets[kind]) if kind in targets else place.write_text("dear")
    with pytest.raises(UserError, match="place: is a link" if kind in targets else "place: is there"):
        put(place, a="1")
    assert holds(tmp_path / "elsewhere") == {"precious": "dear"}
    assert (tmp_path / "letter").read_text() == "dear"
    assert place.is_symlink() if kind in targets else place.read_text() == "dear"


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_file_replaces_files_alone(kind, tmp_path):
    place, letter = tmp_path / "place", tmp_path / "letter"
    letter.write_text("dear")
    {"link": lambda: place.symlink_to(letter), "folder": place.mkdir, "pipe": lambda: os.mkfifo(place)}[
        kind
    ]()
    with pytest.raises(UserError, match="place: is "), write_atomically(place) as path:
        path.write_text("new")
    assert letter.read_text() == "dear" and not place.is_file() or place.is_symlink()


def test_names_that_an_older_version_used_are_the_user_s(tmp_path):
    names = ["folder.old", "folder.partial", ".folder.x.partial"]
    for name in names:
        fill(tmp_path / name, notes="dear")
    put(tmp_path / "folder", a="1")
    put(tmp_path / "folder", a="2")
    assert all(holds(tmp_path / name) == {"notes": "dear"} for name in names)


def test_a_folder_that_looks_like_one_of_a_killed_run_is_not_removed(tmp_path):
    fill(tmp_path / ".folder.x.partial", **{".lock": "mine", "notes": "dear"})
    put(tmp_path / "folder", a="1")
    assert (tmp_path / ".folder.x.partial" / "notes").read_text() == "dear"


def test_an_error_names_the_place_and_not_the_room(tmp_path):
    with pytest.raises(OSError) as error, write_atomically(tmp_path / "file") as path:
        (path / "below").read_bytes()
    assert error.value.filename == str(tmp_path / "file")


def test_a_failure_leaves_no_trace(tmp_path):
    put(tmp_path / "folder", a="1")
    for place in (tmp_path / "folder", tmp_path / "new" / "deep" / "folder"):
        with pytest.raises(KeyboardInterrupt), write_atomically(place) as new:
            fill(new, a="2")
            raise KeyboardInterrupt
    assert holds(tmp_path / "folder") == {"a": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# Several at once, and runs that are killed ------------------------------------------------------------------


def test_of_many_that_write_at_once_one_wins_whole(tmp_path):
    failures = []

    def write(n):
        try:
            for _ in range(20):
                put(tmp_path / "folder", **{f"part{i}": str(n) for i in range(5)})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(holds(tmp_path / "folder")) == 5 and len(set(holds(tmp_path / "folder").values())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


WRITER = """
import signal, sys, time
from models.utils.errors import run_main
from models.utils.files import write_atomically

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which a suite under nohup hands on ignored

def main():
    with write_atomically(sys.argv[1]) as new:
        new.mkdir()
        (new / "half").write_text("half")
        print("writing", flush=True)
        time.sleep(600)

run_main(main)
"""


def start_writer(place):
    """A process that stands in the middle of writing a folder."""
    command = [sys.executable, "-c", WRITER, str(place)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environment)
    assert process.stdout.readline() == "writing\n"
    return process


def test_what_a_killed_run_left_goes_but_not_what_a_living_one_writes(tmp_path):
    killed, alive = start_writer(tmp_path / "folder"), start_writer(tmp_path / "folder")
    try:
        killed.kill()
        killed.communicate()
        assert len(list(tmp_path.iterdir())) == 2
        put(tmp_path / "folder", a="1")
        (left,) = [path for path in tmp_path.iterdir() if path.name != "folder"]
        assert (left / "folder" / "half").exists()
    finally:
        alive.kill()
        alive.communicate()
    put(tmp_path / "folder", a="2")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_run_that_cleans_up(name, tmp_path):
    writer = start_writer(tmp_path / "folder")
    writer.send_signal(getattr(signal, name))
    assert writer.communicate()[1] == ""
    assert writer.returncode == 128 + getattr(signal, name) and not list(tmp_path.iterdir())


def test_what_stepped_aside_comes_back_when_the_run_was_killed_in_between(tmp_path):
    put(tmp_path / "folder", a="1")
    killed = start_writer(tmp_path / "folder")
    (room,) = [path for path in tmp_path.iterdir() if path.name != "folder"]
    (tmp_path / "folder").rename(room / "before-0")
    killed.kill()
    killed.communicate()
    with pytest.raises(ZeroDivisionError), write_atomically(tmp_path / "folder"):
        raise ZeroDivisionError
    assert holds(tmp_path / "folder") == {"a": "1"}


# Reading ----------------------------------------------------------------------------------------------------


def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "secret.json").write_text('{"a": 1}')
    folder = fill(tmp_path / "checkpoint", real='{"a": 2}')
    (folder / "inside.json").symlink_to("real")
    (folder / "outside.json").symlink_to(tmp_path / "secret.json")
    (folder / "zero.json").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.json")
    assert read_json(folder / "inside.json") == {"a": 2}
    with pytest.raises(UserError, match=r"outside\.json: is a link that leads out of its folder"):
        read_json(folder / "outside.json")
    for name in ("zero.json", "pipe.json"):
        with pytest.raises(UserError, match=f"{name}: is no regular file"):
            read_bytes(folder / name)


def test_the_links_of_the_hub_s_cache_are_followed_into_its_blobs_alone(tmp_path):
    blobs, folder = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "123"
    fill(blobs, abc='{"a": 1}')
    folder.mkdir(parents=True)
    (folder / "config.json").symlink_to("../../blobs/abc")
    assert read_json(folder / "config.json") == {"a": 1}
    (tmp_path / "secret").write_text("{}")
    (folder / "other.json").symlink_to("../../../secret")
    with pytest.raises(UserError, match="leads out"):
        plain_file(folder / "other.json")
    # Nor are blobs themselves a link to somewhere else.
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out"):
        plain_file(folder / "config.json")


@pytest.mark.parametrize(
    "text", ['{"a": ' + "9" * 5000 + "}", '{"a": ' * 10_000, "\udcff", "[1]", "", '{"a": 1}' * 2]
)
def test_json_that_is_none(text, tmp_path):
    (tmp_path / "x.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_a_file_that_is_far_too_large_is_not_read(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(10**12)
    with pytest.raises(UserError, match="1,000,000,000,000 bytes"):
        read_json(tmp_path / "x.json")


def test_whatever_a_reader_throws_names_the_file():
    class PanicException(BaseException):
        """As the libraries written in Rust throw it."""

    for error in (IndexError("x"), MemoryError(), RecursionError(), PanicException("panicked")):
        with pytest.raises(UserError, match="here: cannot be read"), reading("here"):
            raise error
    for error in (KeyboardInterrupt(), SystemExit(3), UserError("mine")):
        with pytest.raises(type(error)), reading("here"):
            raise error


def test_a_result_does_not_replace_a_file_of_another_kind(tmp_path):
    for name in ("notes.txt", "notes.png"):
        (tmp_path / name).write_text("dear")
        with pytest.raises(UserError, match=f"--attention .*{name}"):
            check_output(tmp_path / name, "--attention")
    (tmp_path / "old.png").write_bytes(b"\x89PNG and so on")
    for name in ("old.png", "new.png"):
        check_output(tmp_path / name, "--attention")
    (tmp_path / "link.png").symlink_to(tmp_path / "old.png")
    with pytest.raises(UserError, match="is a link"):
        check_output(tmp_path / "link.png", "--attention")


def test_a_text_without_end_is_refused(monkeypatch):
    monkeypatch.setattr("models.utils.files.MAX_TEXT_BYTES", 1000)
    with pytest.raises(UserError, match="--score takes"):
        read_text("/dev/urandom", "--score")


# What a person sees -----------------------------------------------------------------------------------------


def ends(main, capsys):
    """(status, standard error) of a script whose work is `main`."""
    with pytest.raises(SystemExit) as end:
        run_main(main)
    return end.value.code, capsys.readouterr().err


def raiser(error):
    def main():
        raise error

    return main


def test_foreign_text_cannot_move_the_cursor_nor_forge_a_line(capsys):
    name = "a\x1b[2J\x07\nerror: all is well\r\u202e\u2028b"
    status, shown = ends(raiser(UserError(f"x: no {name}", [f"{name} is missing"])), capsys)
    assert status == 2 and len(shown.splitlines()) == 2 and shown.isascii()
    assert shown.startswith("error: x: no a\\x1b[2J\\x07\\nerror: all is well") and "\x1b" not in shown


def test_long_messages_lose_their_middle(capsys):
    status, shown = ends(raiser(UserError(f"{'y' * 2_000_000}: unknown; fetch it again")), capsys)
    assert status == 2 and len(shown) < 1100 and shown.endswith("unknown; fetch it again\n")
    assert printable("é 漢字 ½") == "é 漢字 ½"


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(28, "No space left on device", "/x/y"), "/x/y: cannot be read or written (No space left"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1"), "not enough memory"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), "is the disk full?"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "the package torch is not installed"),
    ],
)
def test_accidents_are_one_line(error, words, capsys):
    status, shown = ends(raiser(error), capsys)
    assert status == 2 and shown.startswith("error: ") and words in shown and shown.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError(), ModuleNotFoundError("x", name="models.gpt9")])
def test_a_mistake_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_main(raiser(error))


@pytest.mark.parametrize(
    "shell, length, status, words",
    [
        ("> /dev/full", 1, 2, "error: standard output, or a file: cannot be read or written (No space left"),
        ("> /dev/full", 10**6, 2, "error: standard output"),
        (">&-", 1, 0, ""),
        (">&- 2>&-", 1, 0, ""),
        ("| true", 10**6, 0, ""),
    ],
)
def test_standard_output_that_cannot_be_written(shell, length, status, words):
    code = f"from models.utils.errors import run_main; run_main(lambda: print('x' * {length}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f'{sys.executable} -c "{code}" {shell}'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(words) and done.stderr.count("\n") == bool(words)


def test_a_signal_that_was_ignored_stays_ignored():
    """nohup has SIGHUP ignored, and means it."""
    code = "import os, signal; from models.utils.errors import run_main\n"
    code += "run_main(lambda: (os.kill(os.getpid(), signal.SIGHUP), print('goes on')))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", 'trap "" HUP; exec "$0" -c "$1"', sys.executable, code],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "goes on\n")
