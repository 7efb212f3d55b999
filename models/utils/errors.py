"""What a person sees when something is wrong: one line, exit status 2, no traceback."""

import os
import sys


class UserError(Exception):
    """Something the person at the keyboard can put right.

    The message is one line that says what is wrong, with which file or argument, and what to do.
    """


def report(line):
    """Say something about the run, beside its result."""
    print(line, file=sys.stderr)


def run_main(main):
    """Run a script's `main()` and turn what can go wrong outside the code into an exit status.

    A UserError ends with status 2, Ctrl-C with 130, and a closed pipe (`python run.py | head`) quietly.
    Anything else is a mistake of ours and keeps its traceback.
    """
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name in ("models", "conversion") or error.name.split(".")[0] in sys.stdlib_module_names:
            raise
        print(
            f"error: the package {error.name} is not installed here; run: make run, or if that was done: "
            "source .venv/bin/activate",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes standard output once more as it exits; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
