"""The process that measures one subject: the other end of the pipe in turns.py.

What a subject weighs is to be its own, so this page imports no library: the subject's page does, and only in
the process of that subject.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

SUBJECTS = {
    "eager": "zoo:Eager",
    "compiled": "zoo:Compiled",
    "speculative": "zoo:Speculative",
    "compiled+speculative": "zoo:CompiledSpeculative",
    "served": "zoo:Served",
    "compiled+served": "zoo:CompiledServed",
    "transformers": "transformers_peer:Transformers",
    "llama.cpp": "llama_cpp_peer:LlamaCpp",
    "eager encoder": "zoo:Encoder",
    "transformers encoder": "transformers_peer:TransformersEncoder",
    "memory": "bandwidth:Memory",
    "writer": "weights:Writer",
}


def serve(subject, settings):
    """Answer each line of standard input with a line, until there are no more."""
    end_with_parent()
    # The answers alone have the pipe; what libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, name = SUBJECTS[subject].split(":")
    worker = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if worker is None:
                worker = getattr(importlib.import_module(f"benchmarks.{module}"), name)(**settings)
            started = time.perf_counter()
            result = getattr(worker, request["call"])(**request["with"])
            seconds = time.perf_counter() - started
            reply = {"result": result, "seconds": seconds, "peak_memory": peak_memory()}
        except Exception as error:
            # models.utils.errors would bring torch along.
            for_a_person = type(error).__name__ == "UserError"
            reply = {"error": str(error)} if for_a_person else {"traceback": traceback.format_exc()}
        print(json.dumps(reply), file=answers, flush=True)


def end_with_parent():
    """Have Linux kill this process when the one that started it ends, even if that was killed itself."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # prctl.h
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def peak_memory():
    """The most bytes that this process has held: of a GPU, once it computes there, otherwise of main memory.

    Linux hands the peak that getrusage tells of on to a child, so that a small one would seem as large as
    its parent; /proc speaks of this program alone.
    """
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
