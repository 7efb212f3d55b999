"""The proof of compiled steps in runs_serve/: every text is what it is alone."""

import copy
from collections import Counter

import pytest
import torch

from models.utils import compile as page
from models.utils.compile import compile_decoding
from models.utils.kernels.row_attention import load_row_attention
from runs_serve import paged_cache
from runs_serve.engine import Engine
from runs_serve.paged_cache import Memory, Plan
from tests.compiler import needs_compiler
from tests.serving import model_named
from tests.test_serve import SCHEDULE, check_answers, run_schedule

OPTIONS = {"block_size": 4, "chunk": 7, "max_running": 5}


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "CACHE_FOLDER", tmp_path_factory.mktemp("compiled"))
        yield


def counted(compiled):
    """How often its steps were made for how many rows."""
    counts = Counter()

    def counting(step):
        return lambda tokens, *rest: (counts.update([len(tokens)]), step(tokens, *rest))[1]

    compiled.compiled = lambda *args, make=compiled.compiled: counting(make(*args))
    return counts


def check_schedules(name, compiled):
    """One with room for all, one in which texts are sent away: the same step serves any number of blocks."""
    counts = counted(compiled)
    for num_blocks in (60, 10):
        options = {**OPTIONS, "num_blocks": num_blocks}
        asked, made, engine = run_schedule(name, options, SCHEDULE, compiled)
        check_answers(name, asked, made)
        assert (engine.statistics()["num_preempted"] > 0) == (num_blocks == 10)
    assert counts[1] > 5 and len(counts) >= 3 and len(compiled.steps) == 2


@needs_compiler
@pytest.mark.parametrize("name", ["wide", "gemma3"])
def test_compiled_steps_change_no_text(name):
    """Slots in blocks; windows, which have places, beside them. Two steps: for one row, for any number."""
    said = []
    compiled = compile_decoding(copy.deepcopy(model_named(name)), report=said.append)
    check_schedules(name, compiled)
    assert len(said) == 2 and all("compiling" in line for line in said)


@pytest.mark.skipif(load_row_attention() is not None, reason=str(load_row_attention()))
def test_a_step_reads_blocks_where_they_lie(monkeypatch):
    """As FewRows has it, in which steps are traced; gathered, they give the same."""
    model = model_named("wide")
    memory = Memory(Plan(model, 40, 4), 9, 2)
    for pool in memory.all_pools():
        pool.normal_()
    tokens, positions, outs = torch.tensor([[7], [8]]), torch.tensor([[6], [2]]), []
    with torch.inference_mode(), memory.lend([[1, 2], [5]], [0, 1]) as cache:
        monkeypatch.setattr(paged_cache, "attention_fits", lambda *args: False)
        outs.append(model(tokens, positions, cache))
        monkeypatch.undo()
        monkeypatch.setattr(paged_cache.PagedTensor, "gathered", None)
        with page.FewRows():
            outs.append(model(tokens, positions, cache))
    torch.testing.assert_close(*outs, rtol=0, atol=1e-4)


def test_a_step_for_a_gpu_is_made_once_for_all_sizes(monkeypatch):
    """What is recorded there as CUDA graphs, here as far as a CPU can do it: traced, and run as traced."""
    graphs, original = [], torch.compile

    def traced(step, fullgraph, dynamic, mode):
        assert mode == "reduce-overhead"
        keep = lambda graph, inputs: graphs.append(graph) or graph  # noqa: E731
        return original(step, fullgraph=fullgraph, dynamic=dynamic, backend=keep)

    monkeypatch.setattr(torch, "compile", traced)
    compiled = compile_decoding(copy.deepcopy(model_named("llama")))
    compiled.compiled = lambda cache, width: page.graph_step(compiled.model, cache)
    check_schedules("llama", compiled)
    # Pools of another number of blocks are other tensors, at another address.
    assert len(graphs) <= 4


@needs_compiler
def test_everything_is_compiled_before_the_first_request(monkeypatch):
    compiled = compile_decoding(copy.deepcopy(model_named("wide")), report=print)
    engine = Engine(compiled, num_blocks=20, **OPTIONS)
    assert len(compiled.steps) == 2 and not engine.has_work
    assert all(step is not None for step in compiled.steps.values())
    monkeypatch.setattr(page, "compile_step", None)  # the next start finds it on the disk
    again = compile_decoding(copy.deepcopy(model_named("wide")), report=print)
    assert all(step is not None for step in Engine(again, num_blocks=33, **OPTIONS).model.steps.values())
