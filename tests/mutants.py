"""Mutants: is there a test that turns red when the code is wrong?

A mutant is the code with one careless change: a sign, an axis, a forgotten cast. tests/mutants.txt has a list
of them, each with the test that must turn red. One that stays green is a line that nothing proves: whoever
breaks it by mistake will not be told. Run the suite first, since a test that is red anyway says nothing here.

    make mutants                                    all of them, in half an hour on two cores
    make mutants FILES="models/llama.py runs_ar/"   those of some files or folders
    python tests/mutants.py -j 1 models/llama.py    the same, one at a time

Each change is made in a copy of the tree, never in the tree itself, and nothing stays of the copy, after
Ctrl-C neither. The exit status is 1 where a mutant stayed green or could not be tried.

To add one, choose a line of your page that a reader could get wrong, get it wrong, and write down the change,
the smallest test that notices, and in a few words what is wrong. Entries are separated by empty lines:

    models/llama.py: RoPE turns the other way
    - x1 * cos - x2 * sin
    + x1 * cos + x2 * sin
    tests/test_llama.py::TestLlama::test_logits_equal_the_oracle

Several lines with "-" are one text of several lines. The old text must stand exactly once in its file, which
tests/test_mutants.py checks. If no test notices, write one. If none can, because the program does the same as
before, it is no mutant.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # for one test; a mutant may never end, and that is noticed too
GOOD = ("red", "red (no end)", "skipped")  # skipped: by a machine that lacks what the test needs
VERDICTS = {0: "STILL GREEN", 1: "red", 4: "NO SUCH TEST", 5: "NO SUCH TEST"}  # by pytest's exit status


class Mutant(NamedTuple):
    file: str
    why: str
    old: str
    new: str
    test: str

    def fits(self, root):
        """Whether the old text stands in its file, exactly once."""
        path = root / self.file
        return path.is_file() and path.read_text(encoding="utf-8").count(self.old) == 1

    def report(self, verdict, seconds=0):
        print(f"{verdict:13}{seconds:4.0f} s  {self.file}: {self.why}", flush=True)


def read_mutants(path):
    mutants = []
    for entry in path.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in entry.splitlines() if line and not line.startswith("#")]
        if lines:
            file, _, why = lines[0].partition(": ")
            old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
            mutants.append(Mutant(file, why, old, new, lines[-1]))
    return mutants


class Trial:
    """A mutant in a copy of the tree, and its test, which runs beside this program."""

    def __init__(self, mutant, tree):
        self.mutant, self.path, self.start = mutant, tree / mutant.file, time.monotonic()
        self.text = self.path.read_text(encoding="utf-8")
        self.path.write_text(self.text.replace(mutant.old, mutant.new), encoding="utf-8")
        self.scratch = Path(tempfile.mkdtemp(dir=tree.parent))
        # No bytecode: Python would take it for fresh where a file changes twice in a second.
        variables = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(self.scratch)}
        command = [sys.executable, "-m", "pytest", "-x", "-v", "--tb=no", "-p", "no:cacheprovider"]
        with open(self.scratch / "output", "w") as output:
            self.process = subprocess.Popen(
                [*command, mutant.test], cwd=tree, env=os.environ | variables, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def verdict(self):
        """None while the test runs."""
        status = self.process.poll()
        if status is None:
            return "red (no end)" if time.monotonic() > self.start + SECONDS else None
        if status == 0 and " passed" not in (self.scratch / "output").read_text():
            return "skipped"
        return VERDICTS.get(status, f"PYTEST FAILED ({status})")

    def end(self):
        """Whatever the test has started ends with it, and the tree is what it was."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.path.write_text(self.text, encoding="utf-8")


def copy_tree(root, target):
    """What git would take: neither downloads nor what programs have left behind."""
    listed = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, target / name)
    return target


def try_mutants(mutants, root=ROOT, jobs=1):
    """How many were not noticed; each is told of as it is known."""
    lost = [mutant for mutant in mutants if not mutant.fits(root)]
    for mutant in lost:
        mutant.report("NOT THERE")
    waiting, running, bad = [mutant for mutant in reversed(mutants) if mutant not in lost], {}, len(lost)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = [copy_tree(root, Path(folder) / str(n)) for n in range(min(jobs, len(mutants)))]
        try:
            while waiting or running:
                for tree in trees:
                    if tree not in running and waiting:
                        running[tree] = Trial(waiting.pop(), tree)
                    if tree in running and (verdict := running[tree].verdict()):
                        trial = running.pop(tree)
                        trial.end()
                        bad += verdict not in GOOD
                        trial.mutant.report(verdict, time.monotonic() - trial.start)
                time.sleep(0.05)
        finally:
            for trial in running.values():
                trial.end()
    return bad


def main(argv=None):
    parser = argparse.ArgumentParser(description="Change the code on purpose; is there a test that notices?")
    parser.add_argument("files", nargs="*", help="only mutants of these files or folders [all]")
    parser.add_argument("-j", dest="jobs", type=int, default=2, help="tests at a time [%(default)s]")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wanted = tuple(args.files) or ("",)
    mutants = [m for m in read_mutants(ROOT / "tests/mutants.txt") if m.file.startswith(wanted)]
    if not mutants:
        parser.error(f"tests/mutants.txt has none of {' '.join(args.files)}")
    bad = try_mutants(mutants, jobs=max(1, args.jobs))
    print(f"{len(mutants)} mutants, {bad} not noticed")
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
