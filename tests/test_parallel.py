"""The proof of runs_parallel/: two processes compute what one does, and say in a line when they cannot."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.tables import PAGES
from models import build_model, config_to_dict, load_model
from models.utils.errors import UserError
from models.utils.training_notes import unfinished_run
from runs_ar.generate import generate
from runs_parallel import figures
from runs_parallel.tensor_parallel import plan_of
from runs_train.training_run import TrainingRun
from tests.model_proof import assert_close
from tests.parallel_worker import LENGTH, passes
from tests.training_runs import CONFIGS, ROOT, main_of, small_run, state_of, weights_of
from tests.zoo import DECODERS, small_configs, small_model

# Ranks speak over 127.0.0.1; the port is one that is free.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]


def torchrun(*words, ranks=2, stdin=None):
    command = [*TORCHRUN, "--nproc-per-node", str(ranks), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, input=stdin, capture_output=True, text=True, timeout=300
    )


# A model on two devices -------------------------------------------------------------------------------------


def write_checkpoint(folder, model_name, config):
    model = small_model(model_name, config=config)
    folder.mkdir()
    # A tied matrix is named once.
    save_file(
        {name: parameter.detach() for name, parameter in model.named_parameters()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config_to_dict(model_name, config)))
    generator = torch.Generator().manual_seed(0)
    torch.save(torch.randint(config.vocab_size, (2, LENGTH), generator=generator), folder / "tokens.pt")


SPLIT = [name for name in DECODERS if getattr(PAGES[name], "PARALLEL", None)]
FORMS = {f"{name}.{n}": (name, config) for name in SPLIT for n, config in enumerate(small_configs(name))}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """(folder of checkpoints, {name of one: what each rank found}): all decoders, as configs/ has them."""
    root = tmp_path_factory.mktemp("split")
    for folder, (name, config) in FORMS.items():
        write_checkpoint(root / folder, name, config)
    write_checkpoint(root / "one_kv_head", "llama", small_configs("llama", num_kv_heads=1)[0])
    done = torchrun("-m", "tests.parallel_worker", "split", root)
    assert done.returncode == 0, done.stderr
    return root, torch.load(root / "results.pt", weights_only=False)


def test_every_decoder_has_a_plan():
    """PARALLEL = None says that a model cannot be split."""
    assert [name for name in DECODERS if not hasattr(PAGES[name], "PARALLEL")] == []


@pytest.mark.parametrize("form", FORMS)
def test_logits_and_tokens_are_those_of_one_process(split, form):
    """In a whole pass, a prefill and single steps; the vocabulary and the experts are odd in number."""
    root, results = split
    model = load_model(root / form)
    with torch.inference_mode():
        expected = passes(model, torch.load(root / form / "tokens.pt"))
    made = [token for (token,) in generate(model, [[1, 2, 3]], 10)]
    first, second = results[form]
    assert "error" not in first, first["error"]
    assert_close(first["logits"], expected)
    assert torch.equal(first["logits"], second["logits"])
    assert first["made"] == second["made"] == made


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_reads_its_part_and_no_other(split, form):
    """What all ranks need is read by both, o_proj's and down_proj's biases too; the rest by one of them."""
    root, results = split
    tensors = load_file(root / form / "model.safetensors")
    twice = (
        "norm",
        "embed",
        "router",
        "q_down_proj",
        "kv_down_proj",
        "join_proj",
        "o_proj.bias",
        "down_proj.bias",
    )
    is_expert = [".experts." in name for name in tensors]
    expected = sum(
        tensor.nbytes * (1 + (any(word in name for word in twice) and not expert))
        for (name, tensor), expert in zip(tensors.items(), is_expert)
    )
    read = [rank["read"] for rank in results[form]]
    assert sum(read) == expected and max(read) < sum(tensor.nbytes for tensor in tensors.values())


def test_fewer_key_value_heads_than_ranks_are_refused(split):
    for rank in split[1]["one_kv_head"]:
        assert rank["error"] == (
            "2 ranks cannot share layers.0.attn, whose num_kv_heads is 1; give --nproc-per-node 1"
        )


# Figures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_figures_say_of_each_parameter_whether_ranks_share_it(split, form):
    model_name, config = FORMS[form]
    model = build_model(model_name, config)
    plan = dict(plan_of(model, PAGES[model_name].PARALLEL))
    parameters = dict(model.named_parameters())
    shared = sum(p.nbytes for name, p in parameters.items() if figures.is_split(name, plan))
    whole = sum(p.nbytes for p in parameters.values()) - shared
    assert shared + 2 * whole == sum(rank["read"] for rank in split[1][form])


def test_the_figures_are_those_that_papers_give():
    """671 billion parameters, 37 of them active (DeepSeek-V3, abstract); 405 billion (Llama 3, table 3)."""
    sizes = {name: figures.weigh(name) for name in ("deepseek-v3", "llama-3.1-405b", "llama-3-70b")}
    billions = {name: (s.split["bf16"] + s.whole["bf16"]) / 2e9 for name, s in sizes.items()}
    assert billions == pytest.approx({"deepseek-v3": 671, "llama-3.1-405b": 405, "llama-3-70b": 70}, rel=0.01)
    assert sizes["deepseek-v3"].active / 1e9 == pytest.approx(37, rel=0.02)
    # Keys and values of 8 heads of 128 in 126 layers; a latent of 512 + 64 numbers in 61.
    assert sizes["llama-3.1-405b"].cache == 2 * 8 * 128 * 126 * 2
    assert sizes["deepseek-v3"].cache == (512 + 64) * 61 * 2
    # A ring of 8: each rank sends 7 of 8 parts twice, for two sums of 8,192 numbers.
    assert figures.sent_per_token_and_layer(sizes["llama-3-70b"], 8) == 2 * 14 * 8192 / 8 * 2
    # 141 GB on 8 GPUs of 24 GB leave 21.6 - 19.5 of each, for 320 kB a token on all of them.
    assert figures.tokens_that_fit(sizes["llama-3-70b"], "bf16", 8, 24e9) == pytest.approx(52e3, rel=0.02)
    assert figures.tokens_that_fit(sizes["llama-3-70b"], "bf16", 1, 80e9) == 0


# At the terminal --------------------------------------------------------------------------------------------


def errors_of(done):
    """The lines that we wrote; torchrun adds a report of its own."""
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_run_under_torchrun_writes_what_it_writes_alone():
    """Once, though there are two ranks; the prompt comes through a pipe, which only one of them may read."""
    words = ["run.py", "tiny-llama-python", "--temperature", "0.7", "--seed", "3", "--max-new-tokens", "12"]
    words += ["--dtype", "float32"]
    alone = subprocess.run(
        [sys.executable, *words], input="class Stack:", capture_output=True, text=True, cwd=ROOT
    )
    together = torchrun(*words, stdin="class Stack:")
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout and len(alone.stdout) > 30
    assert "a rank's share of 2) and" in together.stderr


def test_what_is_not_split_is_refused_in_one_line():
    """By one rank, though both read the same command; torchrun's own exit status is 1."""
    done = torchrun("run.py", "tiny-llama-python", "--draft", "tiny-llama-python-draft")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = errors_of(done)
    assert line.startswith("error: --draft: not under torchrun, where a model continues or scores a text; ")


# Training ---------------------------------------------------------------------------------------------------

CONFIG = CONFIGS["language_model"] | {"dropout": 0.0}
MOE = config_to_dict("qwen3_moe", small_configs("qwen3_moe")[0])


class Training:
    """Runs of the language model in a folder of their own: one process, and as many as one is given."""

    def __init__(self, root):
        self.root, self.moe = root, root / "moe.json"
        self.command = small_run("language_model", root, config=CONFIG)
        self.moe.write_text(json.dumps(MOE))

    def arguments(self, folder, *options):
        return [*self.command(folder, "--dtype", "float32"), *options]

    def alone(self, *words):
        main_of("language_model")(self.arguments(*words))

    def ranks(self, task, *runs, ranks=2):
        (self.root / "commands.json").write_text(json.dumps([self.arguments(*words) for words in runs]))
        return torchrun("-m", "tests.parallel_worker", task, self.root, ranks=ranks)

    def progress(self, folder):
        (state,) = (self.root / folder).glob("training/state-*")
        return json.loads((state / "progress.json").read_text())

    def assert_same(self, folder):
        """The losses, what was measured, and the weights of the run of one process."""
        progress, alone = self.progress(folder), state_of(self.root / "alone")
        assert progress["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        figures = [figure for _, figure in progress["evaluations"]]
        assert figures == pytest.approx([figure for _, figure in alone["evaluations"]], rel=1e-5)
        ours, theirs = (load_file(weights_of(self.root / name)) for name in (folder, "alone"))
        for name in theirs:  # rounded to bf16
            torch.testing.assert_close(ours[name], theirs[name], rtol=0.02, atol=1e-3)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Runs that came to their end, alone and on two ranks, and beginnings that did not."""
    train = Training(tmp_path_factory.mktemp("train"))
    of_experts = ["--steps", "3", "--config", str(train.moe)]
    norms, clip = [], TrainingRun.clip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "clip", lambda run: norms.append(clip(run)) or norms[-1])
        train.alone("alone")
    train.alone("experts-alone", *of_experts)
    runs = ["parallel"], ["shard", "--shard", "--gradient-checkpointing"], ["experts", *of_experts]
    train.done = train.ranks("training", *runs, *MISTAKES.values())
    assert train.done.returncode == 0, train.done.stderr
    train.norms = [norms, *(json.loads((train.root / f"norms-{n}").read_text()) for n in (0, 1))]
    told = (train.root / f"error-{n}" for n in range(len(runs) + len(MISTAKES)))
    train.errors = [path.read_text() if path.exists() else None for path in told]
    return train


# A list has a word for each rank.
MISTAKES = {
    "--batch-size 1: 2 ranks share every batch, a row each": ["new", "--batch-size", "1"],
    "option lr is 0.5 on rank 0 and 0.25 on rank 1; start": ["new", "--lr", ["0.5", "0.25"]],
    "state-8: that run was started with lr 0.01, not 0.5": ["parallel", "--lr", "0.5"],
    "holds the run of one process; go on with python -m runs_train": ["alone"],
    "--compile: not under torchrun": ["new", "--compile"],
    "has experts, of which each rank uses others": ["new", "--config", "tiny-moe-python", "--shard"],
    "--data nowhere: no such file": ["new", "--data", "nowhere"],
}


def test_two_ranks_train_as_one_process_does(train):
    """Data parallel and sharded; rank 0 alone is heard."""
    assert train.errors[:3] == [None] * 3
    alone, *together = train.norms
    assert len(alone) == 8 and together == [pytest.approx(alone, rel=1e-4)] * 2
    for folder in "parallel", "shard":
        train.assert_same(folder)
    assert train.done.stdout.count("bits per byte; to see it write") == 3
    readme = (train.root / "shard" / "README.md").read_text()
    assert "torchrun --nproc-per-node 2 -m runs_parallel.language_model --config" in readme


def test_so_they_do_with_experts_but_for_what_keeps_these_busy(train):
    """Which is reckoned from the rows of one rank, and moves the weights a little otherwise."""
    alone, ours = state_of(train.root / "experts-alone")["losses"], train.progress("experts")["losses"]
    assert ours[0] == pytest.approx(alone[0], rel=1e-6) and ours == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("message", MISTAKES)
def test_bad_input_is_told_in_one_line(train, message):
    told = train.errors[3 + list(MISTAKES).index(message)]
    assert message in told and "\n" not in told
    assert not (train.root / "new").exists()


def test_one_process_does_not_go_on_with_the_run_of_several(train):
    with pytest.raises(UserError, match="parallel/training: holds a run of several .*; go on with torchrun"):
        train.alone("parallel")


def test_a_rank_that_dies_is_told_of_and_the_run_goes_on_with_others(train):
    """Killed in step 7, of which step 4 is kept; two go on until one is asked to stop, then one, sharded."""
    start = time.monotonic()
    done = train.ranks("dying", ["killed"])
    assert time.monotonic() - start < 60 and done.returncode == 1
    assert errors_of(done) == [
        "error: rank 0: another rank is gone, or does not answer; start all of them again, and they go "
        "on from what was kept"
    ]
    assert train.progress("killed")["step"] == 4
    assert "go on with: torchrun --nproc-per-node 2 -m runs_par" in unfinished_run(train.root / "killed")
    done = train.ranks("interrupted", ["killed"])
    stopped = {path.name for path in train.root.glob("stopped-*")}
    assert stopped == {"stopped-0-0", "stopped-0-1"}, done.stderr
    assert train.progress("killed")["step"] == 6
    assert train.ranks("training", ["killed", "--shard"], ranks=1).returncode == 0
    train.assert_same("killed")
