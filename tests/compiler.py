"""Whether this machine has a C++ compiler: what compiles a step asks for it, and is skipped without."""

import os
import shlex
import subprocess
import tempfile

import pytest


def why_not():
    """None, or why nothing can be compiled here."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, "-x", "c++", "-shared", "-fPIC", "-o", f"{folder}/x.so", "-"]
        try:
            done = subprocess.run(command, input=b"int x;", capture_output=True)
        except OSError:
            return f"no C++ compiler ({compiler[0]} is not there)"
        whole = done.returncode == 0 and os.path.exists(f"{folder}/x.so")
    return None if whole else f"no C++ compiler ({compiler[0]} compiles nothing)"


needs_compiler = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
