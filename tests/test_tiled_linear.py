"""The proof of tiled_linear.py and its C++: arithmetic, layout, and what happens without it."""

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models.utils.kernels import cpp_library, tiled_linear
from models.utils.kernels.cpp_library import build
from models.utils.kernels.row_attention import load_row_attention
from models.utils.kernels.row_linear import load_row_linear
from models.utils.kernels.tiled_linear import (
    TiledLinear,
    into_huge_pages,
    load_kernel,
    tile_layers,
    why_not_faster,
)
from models.utils.machine import instructions
from models.utils.quantize import (
    Int4Linear,
    Int8Linear,
    Quantization,
    dequantize_int4,
    dequantize_int8,
    prepare,
    quantize_int4,
    quantize_int8,
    quantize_layers,
)

ROOT = Path(__file__).parent.parent

# Without a compiler only the tests of the fallback have something to say; without the instructions torch's
# kernels stay where there are some, in bf16.
needs_kernel = pytest.mark.skipif(load_kernel() is not None, reason=str(load_kernel()))
needs_vectors = pytest.mark.skipif(why_not_faster() is not None, reason=str(why_not_faster()))
BF16, FP32 = pytest.param(torch.bfloat16, marks=needs_vectors), torch.float32
INT4_SHAPES = [(64, 64, 32), (100, 128, 64), (33, 256, 128), (7, 96, 32), (200, 1024, 32)]
# No group size is int8.
SHAPES = [*INT4_SHAPES, (64, 64, None), (33, 160, None), (7, 96, None), (200, 1024, None)]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def matrix(N, K, group_size, dtype=torch.bfloat16):
    """(product with x, the weights that the codes stand for in fp64); no row or group is even about 0."""
    generator = torch.Generator().manual_seed(N * K)
    weight = 0.1 * torch.randn(N, K, generator=generator) + 0.05 * torch.randn(N, 1, generator=generator)
    if group_size is None:
        codes, scale = quantize_int8(weight.to(dtype))
        bits, tiles, weight = (
            8,
            tiled_linear.tiles_of_int8(codes, scale),
            dequantize_int8(codes, scale.double()),
        )
    else:
        packed, scale_zero = quantize_int4(weight.to(dtype), group_size)
        tiles, weight = (
            tiled_linear.tiles_of_int4(packed, scale_zero),
            dequantize_int4(packed, scale_zero.double()),
        )
        bits = 4
    return lambda x, plain=False: torch.ops.zoo.tiled_linear(x, tiles, N, bits, plain), weight


def rows(M, K, dtype=torch.float32):
    """Rows and groups of different sizes, a group of zeros among them."""
    generator = torch.Generator().manual_seed(M + K)
    x = torch.randn(M, K, generator=generator) * torch.rand(M, 1, generator=generator) * 10
    x[:, -32:] *= 0.01
    x[0, :32] = 0
    return x.to(dtype)


def rounded(x):
    """Activations in 8 bits, 32 by one scale: the page's formula, in fp64."""
    groups = x.double().unflatten(-1, (-1, 32))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return ((groups / scale).round() * scale).flatten(-2)


def difference(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


# The arithmetic ---------------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("N, K, group_size", SHAPES)
def test_it_multiplies_dequantized_weights_by_rounded_activations(N, K, group_size, plain):
    product, weight = matrix(N, K, group_size)
    for M in (1, 2, 3, 4, 5, 6, 7, 8, 9, 21):
        x = rows(M, K)
        out = product(x, plain)
        assert out.shape == (M, N) and out.dtype == torch.float32
        assert difference(out, rounded(x) @ weight.T) < 2e-6
        # A code may fall on the other side of a half; in no output does it show.
        assert (out - rounded(x) @ weight.T).abs().max() < 1e-4 * out.abs().max()


@needs_kernel
def test_int8_keeps_a_scale_in_fp32():
    product, weight = matrix(64, 256, None, torch.float32)
    x = rows(5, 256)
    assert difference(product(x), rounded(x) @ weight.T) < 2e-6


@needs_kernel
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("group_size", [None, 32])
def test_bf16_rows_differ_by_the_rounding_of_the_output_alone(group_size, plain):
    product, _ = matrix(200, 1024, group_size)
    x = rows(5, 1024, torch.bfloat16)
    out = product(x, plain)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, product(x.float(), plain).bfloat16())


@needs_kernel
@pytest.mark.parametrize("group_size", [None, 32])
def test_the_error_of_8_bit_activations_is_what_the_page_says(group_size):
    product, weight = matrix(512, 2048, group_size)
    x = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    assert 0.0045 < difference(product(x), x.double() @ weight.T) < 0.0065


@needs_kernel
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("group_size", [None, 64])
def test_a_row_alone_equals_the_row_in_a_batch(group_size, plain):
    product, _ = matrix(100, 512, group_size)
    x = rows(19, 512)
    alone = torch.cat([product(row, plain) for row in x.split(1)])
    for M in (*range(1, 10), 16, 19):
        assert torch.equal(product(x[:M], plain), alone[:M])


# Prints a word that stands for all results of a loop; some matrices have the largest codes and activations.
RESULTS = """
import hashlib, torch
from models.utils.kernels import tiled_linear
from models.utils.quantize import quantize_int4, quantize_int8
assert tiled_linear.load_kernel() is None
said, draw = hashlib.sha256(), torch.Generator().manual_seed(0)
for K in (32, 96, 1024):
    weight = torch.randn(100, K, generator=draw)
    packed = torch.randint(256, (100, K // 2), generator=draw)
    scale = torch.randint(120, 130, (100, K // 32), generator=draw)
    packed[:40], weight[:40] = 0x77, weight[:40].sign()
    each = [
        (8, False, tiled_linear.tiles_of_int8(*quantize_int8(weight))),
        (4, False, tiled_linear.tiles_of_int4(*quantize_int4(weight, 32))),
        (4, True, tiled_linear.tiles_of_mxfp4(packed.to(torch.uint8), scale.to(torch.uint8))),
    ]
    for bits, floats, tiles in each:
        for M in (1, 2, 3, 4, 5, 6, 7, 8):
            for x in (torch.randn(M, K, generator=draw), torch.randn(M, K, generator=draw).sign()):
                out = torch.ops.zoo.tiled_linear(x, tiles, 100, bits, PLAIN, None, floats)
                said.update(out.numpy().tobytes())
print(said.hexdigest())
"""


def results(level, plain):
    """The word of RESULTS, as on a processor that has nothing newer than `level`."""
    code, environment = RESULTS.replace("PLAIN", str(plain)), os.environ | {"ZOO_CPU": level}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_vectors
def test_every_loop_that_runs_here_gives_the_same_to_the_bit():
    """AVX2, AVX-VNNI, AVX-512: three ways to the same whole numbers; and the plain loop."""
    levels = [name for name in ("avx2", "avx_vnni", "avx512_vnni") if name in instructions()]
    assert {results(level, plain=False) for level in levels} == {results(levels[0], plain=True)}


@needs_kernel
@pytest.mark.parametrize("group_size", [None, 32])
def test_threads_change_nothing(group_size):
    product, _ = matrix(2000, 256, group_size)
    x = rows(33, 256)
    one = product(x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(product(x), one)
    finally:
        torch.set_num_threads(1)


@needs_kernel
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_is_seen(bad, group_size, plain):
    product, _ = matrix(64, 128, group_size)
    x = rows(3, 128)
    x[1, 70] = bad
    out = product(x, plain)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@needs_kernel
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("group_size", [None, 32])
def test_rows_go_through_the_tiles_of_their_experts(group_size, plain):
    bits = 4 if group_size else 8
    tiles = torch.stack([tiles_of(40, 96, group_size, seed) for seed in range(5)])
    x, experts = rows(21, 96), torch.arange(21) * 3 % 4
    out = torch.ops.zoo.tiled_linear(x, tiles, 40, bits, plain, experts)
    for row, one, expert in zip(out, x, experts):
        assert torch.equal(row, torch.ops.zoo.tiled_linear(one[None], tiles[expert], 40, bits, plain)[0])
    few = torch.ops.zoo.tiled_linear(x[:7], tiles, 40, bits, plain, experts)  # three experts for each row
    assert torch.equal(
        few, torch.ops.zoo.tiled_linear(x[:7].repeat_interleave(3, 0), tiles, 40, bits, plain, experts)
    )
    with pytest.raises(RuntimeError, match="needs as many experts"):
        torch.ops.zoo.tiled_linear(x[:4], tiles, 40, bits, plain, experts)
    with pytest.raises(RuntimeError, match="no such expert"):
        torch.ops.zoo.tiled_linear(x, tiles, 40, bits, plain, experts + 4)


def tiles_of(N, K, group_size, seed):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    if group_size is None:
        return tiled_linear.tiles_of_int8(*quantize_int8(weight))
    return tiled_linear.tiles_of_int4(*quantize_int4(weight, group_size))


@needs_kernel
@pytest.mark.parametrize("group_size", [None, 32])
def test_shapes_of_x(group_size):
    product, _ = matrix(48, 64, group_size)
    x = rows(12, 64)
    flat = product(x)
    assert torch.equal(product(x.view(3, 4, 64)), flat.view(3, 4, 48))
    assert torch.equal(product(x[5]), flat[5])
    spread = torch.empty(64, 12).copy_(x.T).T
    assert torch.equal(product(spread), flat)
    assert product(x[:0]).shape == (0, 48)
    with pytest.raises(RuntimeError, match="96 inputs, not 64"):
        product(rows(1, 96))


# Layers and models ------------------------------------------------------------------------------------------


def quantized(*shapes, dtype=torch.bfloat16, kind="int4", bias=True):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(K, N, bias=bias) for N, K in shapes]
    model = torch.nn.Sequential(*layers).to(dtype)
    quantize_layers(model, Quantization(kind, 32 if kind == "int4" else None))
    return model


def as_torch_has_it(model):
    """A copy with torch's own kernels, whose order of the codes is another one."""
    model = copy.deepcopy(model)
    prepare(model)
    return model


@needs_kernel
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("bias", [True, False])
def test_a_model_keeps_its_outputs_to_the_stated_error(kind, dtype, bias):
    model = quantized((96, 128), (130, 96), dtype=dtype, kind=kind, bias=bias)
    x = rows(5, 128, dtype)
    before = as_torch_has_it(model)(x)
    assert tile_layers(model) is None
    assert all(isinstance(layer, TiledLinear) for layer in model)
    after = model(x)
    assert after.dtype == dtype and 0 < difference(after, before.double()) < 0.02
    assert tile_layers(model) is None and torch.equal(model(x), after)


@needs_vectors
def test_a_width_that_blocks_do_not_fill_keeps_its_layer():
    model = quantized((96, 48), (32, 96), kind="int8")
    assert tile_layers(model) is None
    assert [type(layer) for layer in model] == [Int8Linear, TiledLinear]
    assert model(rows(5, 48, torch.bfloat16)).isfinite().all()


def test_huge_pages_hold_the_same_parameters():
    model = torch.nn.Sequential(
        torch.nn.Linear(1000, 700), torch.nn.Linear(3, 5).bfloat16(), torch.nn.Linear(7, 7, bias=False)
    )
    model[2].weight = torch.nn.Parameter(torch.arange(21, dtype=torch.int8).view(7, 3), requires_grad=False)
    model.register_parameter("tied", model[0].weight)
    expected = [p.clone() for p in model.parameters()]
    into_huge_pages(model)
    assert model.tied is model[0].weight
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1
    for parameter, value in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter, value) and parameter.data_ptr() % 64 == 0


@needs_kernel
def test_the_compiler_takes_it_without_a_break():
    model = torch.nn.Sequential(
        *quantized((96, 64), dtype=torch.float32), *quantized((64, 96), kind="int8").float()
    )
    tile_layers(model)
    into_huge_pages(model)
    x = rows(2, 64)
    compiled = torch.compile(lambda x: F.relu(model(x)) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(x), F.relu(model(x)) + 1)
    torch.library.opcheck(torch.ops.zoo.tiled_linear, (x, model[0].weight, 96, 4))


# Without it -------------------------------------------------------------------------------------------------

REPORT = """
import sys, torch
from models.utils.kernels.tiled_linear import tile_layers
from models.utils.quantize import Int4Linear, Quantization, prepare, quantize_layers
model = torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16()
quantize_layers(model, Quantization("int4", 32))
print(tile_layers(model))
prepare(model)
print(type(model[0]).__name__, model(torch.ones(1, 64).bfloat16()).isfinite().all().item())
"""


def in_new_process(extensions, before="", **variables):
    """What tile_layers says and what kind of layer is left, with an empty cache of extensions."""
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(extensions), "PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{REPORT}"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_compiler_that_fails_or_is_missing_leaves_torchs_kernel(tmp_path):
    assert in_new_process(tmp_path, CXX="/bin/false") == [
        "/bin/false could not compile tiled_linear.cpp",
        "Int4Linear True",
    ]
    assert in_new_process(tmp_path, CXX="no-such-compiler") == [
        "no C++ compiler (no-such-compiler is not there; CXX names another)",
        "Int4Linear True",
    ]
    # One that says it did and did nothing.
    assert in_new_process(tmp_path, CXX="/bin/true")[0] == "/bin/true could not compile tiled_linear.cpp"
    assert list(tmp_path.iterdir()) == []


def test_the_compilers_first_error_is_told(tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_text(
        "#!/bin/sh\necho 'in file x' >&2\necho 'y.h:3: fatal error: no such header' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    reason, _ = in_new_process(tmp_path / "cache", CXX=str(compiler))
    assert reason == f"{compiler} could not compile tiled_linear.cpp: y.h:3: fatal error: no such header"


def test_a_cache_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    reason, layer = in_new_process(file / "cache")
    assert reason == f"{file}/cache: Not a directory; TORCH_EXTENSIONS_DIR names another"
    assert layer == "Int4Linear True"


@pytest.mark.parametrize("load", [load_kernel, load_row_linear, load_row_attention])
def test_what_is_built_here_gives_the_sums_that_are_known(load):
    """Otherwise the tests that need a kernel would be skipped, and nobody would see why."""
    assert "wrong sums" not in str(load())


@needs_vectors
def test_a_kernel_that_gives_wrong_sums_is_not_used_and_says_so(tmp_path):
    """The loop for vectors takes one number for another; torch's kernel stays."""
    for path in [tiled_linear.SOURCE, *tiled_linear.SOURCE.parent.glob("*.h")]:
        shutil.copy(path, tmp_path)
    broken = tmp_path / tiled_linear.SOURCE.name
    text = broken.read_text()
    assert "* row.sum" in text
    broken.write_text(text.replace("* row.sum", "* row.scale"))
    before = "import pathlib; from models.utils.kernels import tiled_linear"
    reason, layer = in_new_process(tmp_path, f"{before}; tiled_linear.SOURCE = pathlib.Path({str(broken)!r})")
    assert reason.startswith("tiled_linear.cpp gives wrong sums on this processor (")
    assert reason.endswith("), and is not used") and layer == "Int4Linear True"


@needs_kernel
@pytest.mark.parametrize("kind, layer_class", [("int8", Int8Linear), ("int4", Int4Linear)])
def test_a_cpu_without_the_instructions_keeps_torchs_kernel_where_it_has_one(monkeypatch, kind, layer_class):
    monkeypatch.setattr(torch.ops.zoo, "has_vector_loop", lambda: False)
    model = quantized((64, 64), kind=kind)
    assert "neither AVX2 nor AVX-512 VNNI" in tile_layers(model) and isinstance(model[0], layer_class)
    in_fp32 = quantized((64, 64), dtype=torch.float32, kind=kind)
    assert tile_layers(in_fp32) is None and isinstance(in_fp32[0], TiledLinear)


@needs_vectors
def test_codes_in_the_order_of_torchs_kernel_stay_there():
    model = as_torch_has_it(quantized((64, 64)))
    assert "load the model with arranged=False" in tile_layers(model) and isinstance(model[0], Int4Linear)


def test_what_has_nothing_quantized_on_the_cpu_is_not_touched(monkeypatch):
    monkeypatch.setattr(tiled_linear, "load_kernel", lambda: pytest.fail("built for nothing"))
    assert tile_layers(torch.nn.Sequential(torch.nn.Linear(64, 64))) is None
    with torch.device("meta"):
        elsewhere = torch.nn.Sequential(Int4Linear(torch.nn.Linear(64, 64), 32))
    assert (
        tile_layers(elsewhere)
        == "the kernel of quantized layers needs a model on the CPU, this one is on meta"
    )


@needs_kernel
def test_two_builds_at_once_leave_one_whole_library(tmp_path):
    """Each waits, half done, until the other has begun; what stands in the end works."""
    compiler, begun, cache = tmp_path / "cxx", tmp_path / "begun", tmp_path / "cache"
    begun.mkdir()
    compiler.write_text(f"""#!/bin/sh
for last; do :; done
head -c 1000 {build(tiled_linear.SOURCE)} >$last
touch {begun}/$$
while [ $(ls {begun} | wc -l) -lt 2 ]; do sleep 0.1; done
cp {build(tiled_linear.SOURCE)} $last
""")
    compiler.chmod(0o755)
    environment = os.environ | {
        "TORCH_EXTENSIONS_DIR": str(cache),
        "CXX": str(compiler),
        "PYTHONPATH": str(ROOT),
    }
    command, pipe = [sys.executable, "-c", REPORT], subprocess.PIPE
    both = [subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) for _ in "12"]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0] and said[0][0].startswith(f"{why_not_faster()}\n")
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_every_kind_of_processor_has_a_library_of_its_own(tmp_path, monkeypatch):
    """A home folder may be shared by several, and ZOO_CPU is one too."""
    commands = []

    def compiled(command, **options):
        commands.append(command)
        Path(command[-1]).touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_library.subprocess, "run", compiled)
    for names in (["avx2"], ["avx2", "avx_vnni"], ["avx2", "avx512", "avx512_vnni"], ["neon"]):
        monkeypatch.setattr(cpp_library, "instructions", lambda names=names: names)
        library = build(tiled_linear.SOURCE)
        assert build(tiled_linear.SOURCE) == library and library.exists()
    assert len(list(tmp_path.iterdir())) == len(commands) == 4
    told = [[word for word in command if word.startswith("-m")] for command in commands]
    avx2, server = ["-mavx2", "-mfma"], ["-mavx512f", "-mavx512bw", "-mavx512vnni"]
    assert told == [avx2, [*avx2, "-mavxvnni"], [*avx2, *server], []]


def test_a_header_is_part_of_what_includes_it(tmp_path, monkeypatch):
    source, header = tmp_path / "page.cpp", tmp_path / "part.h"
    source.write_text("one")
    names = set()
    for text in ("two", "three"):
        header.write_text(text)
        names.add(cpp_library.plan(source)[1])
    assert len(names) == 2


@needs_kernel
def test_torch_does_not_find_what_it_compiled_for_another_library():
    assert build(tiled_linear.SOURCE).name in torch.compiler.config.cache_key_tag.split()


def test_an_interrupted_build_leaves_nothing_behind(tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path}/begun\nexec sleep 60\n")
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    environment = os.environ | {
        "TORCH_EXTENSIONS_DIR": str(cache),
        "CXX": str(compiler),
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", REPORT],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode != 0 and "KeyboardInterrupt" in said
    assert list(cache.iterdir()) == []


@needs_kernel
def test_a_library_that_is_there_is_taken_and_one_that_is_broken_reported(tmp_path):
    library = build(tiled_linear.SOURCE)
    shutil.copy(library, tmp_path)
    taken = "TiledLinear True" if why_not_faster() is None else "Int4Linear True"
    assert in_new_process(tmp_path) == [str(why_not_faster()), taken]
    assert [path.name for path in tmp_path.iterdir()] == [library.name]
    (tmp_path / library.name).write_text("no library")
    reason, layer = in_new_process(tmp_path)
    assert library.name in reason and layer == "Int4Linear True"
