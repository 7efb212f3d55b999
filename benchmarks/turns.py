"""A process for each thing that is measured: it loads once, then sleeps until it is its turn.

    benchmark.py --pipe--> python -m benchmarks.worker SUBJECT --pipe--> benchmark.py
                 {"call": "run", "with": {...}}             {"result": ..., "peak_memory": ...}

Two libraries in one process would share memory that nobody could tell apart, and the threads of one might
still spin while the other is timed. Apart, each process has its own peak, and between its turns it waits for
a line from its pipe, which takes no processor time.

A process leads a group of its own, so that Ctrl-C reaches benchmark.py alone, which then ends all of them,
with the compilers that they may have started. Should benchmark.py itself be killed, Linux kills them with it;
elsewhere their pipes close, and they end when their turn does. The folder of the weights goes the same way.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from models.utils.errors import UserError

ROOT = Path(__file__).parent.parent
# Waits until the process that started it has ended, by whatever death, and removes a folder.
SWEEPER = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"


@contextmanager
def scratch_folder():
    """A folder for gigabytes, which is gone when this process is, even if that is killed."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        command = [sys.executable, "-c", SWEEPER, folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
            yield folder


class Process:
    """This side of the pipe."""

    def __init__(self, subject, label, **settings):
        self.label = label
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", subject, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """End the process and all that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.log):
            with suppress(BrokenPipeError):  # at a line that it never read
                file.close()

    def call(self, method, **arguments):
        """What the subject's method returns, as a dict: "result", "seconds", "peak_memory" (bytes)."""
        try:
            print(json.dumps({"call": method, "with": arguments}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(f"{self.label}: {self.how_it_ended()}")
        reply = json.loads(line)
        if "error" in reply:
            raise UserError(f"{self.label}: {reply['error']}")
        if "traceback" in reply:
            raise RuntimeError(f"{self.label}: {reply['traceback']}")
        return reply

    def how_it_ended(self):
        status = self.process.wait()
        if status == -signal.SIGKILL:
            return "its process was killed, probably for want of memory; measure fewer things at once"
        self.log.seek(0)
        last_words = [line.strip() for line in self.log if line.strip()][-1:] or ["it said nothing"]
        return f"its process ended with status {status}: {last_words[0]}"
