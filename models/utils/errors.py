"""What a person sees when something is wrong: one line, exit status 2, no traceback."""

import contextlib
import io
import os
import re
import signal
import sys
import threading

MAX_LINE = 1000  # characters; a longer one loses its middle, since what to do stands at the end


class UserError(Exception):
    """Something the person at the keyboard can put right.

    line: what is wrong, with which file or argument, and what to do. details: a line for each of several
    things that are wrong at once, shown below it.
    """

    def __init__(self, line, details=()):
        super().__init__(str(line))
        self.lines = [str(line), *details]

    def __str__(self):
        return "\n  ".join(self.lines)


def report(line):
    """Say something about the run, beside its result."""
    print(line, file=sys.stderr)


def one_line(error):
    """The message of an exception, on one line; of a file's, the reason without the number and the path."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def printable(text, longest=MAX_LINE):
    """Text from a stranger's file as it may be shown in a terminal: on one line, of a bearable length.

    An escape sequence could move the cursor, and a line end could forge a line that looks like ours.
    """
    if len(text) > longest:
        text = f"{text[: longest * 2 // 3]} ... {text[-longest // 3 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run_main(main):
    """Run a script's `main()` and turn what can go wrong outside the code into one line and an exit status.

    2: a UserError, a full disk, too little memory, a package that is not installed. 130: Ctrl-C. 141: a
    closed pipe (`python run.py | head`), quietly. 143 and 129: SIGTERM and SIGHUP, after cleaning up as
    after any error. Whatever else is raised is a mistake of ours and keeps its traceback.
    """
    open_missing_streams()
    with orderly_ends():
        try:
            main()
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            end(130)
        except BrokenPipeError:
            end(141)
        except BaseException as error:
            lines = lines_about(error)
            if lines is None:
                raise
            print("error: " + "\n  ".join(map(printable, lines)), file=sys.stderr)
            end(2)


def lines_about(error):
    """What to tell about an exception that is no mistake of ours; None for one that is."""
    kind, text = type(error).__name__, one_line(error)
    if isinstance(error, UserError):
        return error.lines
    if isinstance(error, ModuleNotFoundError):
        package = error.name.split(".")[0]
        if package in ("models", "conversion") or package in sys.stdlib_module_names:
            return None
        run = "make run, or if that was done: source .venv/bin/activate"
        return [f"the package {package} is not installed here; run: {run}"]
    if isinstance(error, OSError):
        where = error.filename or "standard output, or a file"
        return [f"{where}: cannot be read or written ({text})"]
    if isinstance(error, MemoryError) or re.search(
        "can't allocate memory|out of memory", text, re.IGNORECASE
    ):
        return ["there is not enough memory; close other programs, or choose something smaller"]
    if kind == "SafetensorError" or "PytorchStreamWriter" in text or "inline_container" in text:
        return [f"a file of tensors cannot be read or written ({text}); is the disk full?"]
    return None


def end(status):
    """Exit. Python flushes standard output once more as it does; where that must fail, nobody hears of it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def open_missing_streams():
    """A program may be started without streams (`>&-`): then what it prints goes nowhere.

    A terminal that cannot show a character shows a question mark instead, and the run goes on.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115 (open to the end)
            setattr(sys, name, stream)
    with contextlib.suppress(AttributeError, io.UnsupportedOperation):
        sys.stdout.reconfigure(errors="replace")


@contextlib.contextmanager
def orderly_ends():
    """Let SIGTERM and SIGHUP end the program as an exception does, so that half-written files are removed."""

    def leave(number, frame):
        for each in signals:
            signal.signal(each, signal.SIG_IGN)  # the cleaning up is not interrupted
        sys.exit(128 + number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # Whoever started us may have had a signal ignored, as nohup does.
    signals = [each for each in signals if signal.getsignal(each) is signal.SIG_DFL]
    for each in signals:
        signal.signal(each, leave)
    try:
        yield
    finally:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
