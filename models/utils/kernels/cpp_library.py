"""The C++ pages of this project, each compiled when it is first needed, then kept.

    reason = load_library(Path("models/utils/kernels/row_linear.cpp"), shape_of)
    torch.ops.zoo.row_linear                                                   is there, if reason is None

torch.utils.cpp_extension does the same and asks for ninja, and for Python's headers; a page that sees only
ATen's tensors is one call of the compiler. The compiler is told what this processor has, and a page asks what
that is (#ifdef __AVX512VNNI__). ZOO_CPU=avx2 in the environment takes what is newer away (machine.py), to try
how the pages do elsewhere. Before a library is used it has to give sums that are known (NAME_works in it): a
compiler may be wrong, or a processor not what it says. Proof: tests/test_tiled_linear.py.
"""

import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
import torch.compiler.config

from models.utils.machine import instructions, spoken_instructions

TORCH = Path(torch.__file__).parent
# Vectors wider than a CPU's registers are passed in a way of which GCC warns (psabi); here they never are.
# What the compiler calls the instructions of machine.py; it needs to know nothing of the others.
OPTIONS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx_vnni": ["-mavxvnni"],
    "avx512": ["-mavx512f", "-mavx512bw"],
    "avx512_vnni": ["-mavx512vnni"],
    "avx512_bf16": ["-mavx512bf16"],
}
FLAGS = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi"]


class BuildError(Exception):
    """Why there is no library, in a line."""


@lru_cache
def load_library(source: Path, shape_of):
    """Make the operator of a C++ page, which has its name, known to torch; None, or a line that says why not.

    shape_of takes the operator's arguments and gives an empty result: what tracing needs to know of it.
    """
    try:
        torch.ops.load_library(build(source))
    except (BuildError, OSError) as error:
        return str(error).partition("\n")[0]
    if not getattr(torch.ops.zoo, f"{source.stem}_works")():
        return f"{source.name} gives wrong sums on this processor ({spoken_instructions()}), and is not used"
    torch.library.register_fake(f"zoo::{source.stem}", shape_of)
    # What torch compiled once calls an operator with the arguments that it had then, and is not to be found.
    torch.compiler.config.cache_key_tag = " ".join(libraries())
    return None


@lru_cache
def is_built(source: Path):
    """Whether the library is there, so that nobody would have to wait for it."""
    return plan(source)[1].exists()


def libraries():
    """The file names of the libraries of all pages, each of which stands for what it was made from."""
    return [plan(source)[1].name for source in sorted(Path(__file__).parent.glob("*.cpp"))]


def plan(source):
    """(command, path of what it writes): a library for each source, torch, compiler and processor."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = FLAGS + [option for name in instructions() for option in OPTIONS.get(name, [])]
    command = [*compiler, *flags, f"-I{TORCH}/include", str(source), f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10"]
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    recipe = "\n".join([*texts, torch.__version__, *command])
    return command, cache_folder() / f"{source.stem}_{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"


def build(source):
    """The path of the library, compiled unless it is there."""
    command, library = plan(source)
    if library.exists():
        return library
    print(f"compiling {source.name} (once, about ten seconds)", file=sys.stderr)
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, then renamed: neither Ctrl-C nor a second process leaves half a library there.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            part = Path(folder) / library.name
            done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
            if done.returncode or not part.exists():
                raise BuildError(f"{command[0]} could not compile {source.name}{first_error(done.stderr)}")
            part.replace(library)
    except FileNotFoundError:
        raise BuildError(f"no C++ compiler ({command[0]} is not there; CXX names another)") from None
    except OSError as error:
        raise BuildError(f"{library.parent}: {error.strerror}; TORCH_EXTENSIONS_DIR names another") from None
    return library


def cache_folder():
    """Where torch keeps what it compiles of its extensions."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions")


def first_error(output):
    errors = [line for line in output.splitlines() if "error" in line]
    return f": {errors[0].strip()}" if errors else ""
