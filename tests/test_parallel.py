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
from models import config_to_dict, load_model
from models.utils.errors import UserError
from runs_ar.generate import generate
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


FORMS = {f"{name}.{n}": (name, config) for name in DECODERS for n, config in enumerate(small_configs(name))}


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
    twice = ("norm", "embed", "router", "q_down_proj", "kv_down_proj", "o_proj.bias", "down_proj.bias")
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


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(task, *(folder, options, steps), ranks): runs of the language model, several of one start."""
    root = tmp_path_factory.mktemp("train")
    command = small_run("language_model", root, config=CONFIG)

    def start(task, *runs, ranks=2):
        arguments = [[*command(folder, "--dtype", "float32"), *options] for folder, *options in runs]
        (root / "commands.json").write_text(json.dumps(arguments))
        return torchrun("-m", "tests.parallel_worker", task, root, ranks=ranks)

    start.root, start.command = root, command
    main_of("language_model")(command("alone", "--dtype", "float32"))
    start.alone = state_of(root / "alone")
    return start


def progress_of(folder):
    (state,) = folder.glob("training/state-*")
    return json.loads((state / "progress.json").read_text())


def assert_same_run(train, folder):
    """The losses, what was measured, and the weights of one process."""
    progress = progress_of(train.root / folder)
    assert progress["losses"] == pytest.approx(train.alone["losses"], rel=1e-5)
    figures = [figure for _, figure in progress["evaluations"]]
    assert figures == pytest.approx([figure for _, figure in train.alone["evaluations"]], rel=1e-5)
    ours, theirs = (load_file(weights_of(train.root / name)) for name in (folder, "alone"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.02, atol=1e-3)


def test_two_ranks_train_as_one_process_does(train):
    """Data parallel, sharded, and with all that a run may have besides; in bits per byte too."""
    more = ["--shard", "--gradient-checkpointing"]
    done = train("training", ["data"], ["shard", *more])
    assert done.returncode == 0, done.stderr
    assert not list(train.root.glob("error-*")), [path.read_text() for path in train.root.glob("error-*")]
    for folder in "data", "shard":
        assert_same_run(train, folder)
    # Only rank 0 is heard.
    assert done.stdout.count("bits per byte; to see it write") == 2
    readme = (train.root / "shard" / "README.md").read_text()
    assert "torchrun --nproc-per-node 2 -m runs_parallel.language_model --config" in readme


def test_a_rank_that_dies_is_told_of_and_the_run_goes_on_with_others(train):
    """Killed in step 7, of which step 4 is kept; one rank goes on, then two that share what one kept."""
    start = time.monotonic()
    done = train("dying", ["killed"])
    assert time.monotonic() - start < 60 and done.returncode == 1
    assert errors_of(done) == [
        "error: rank 0: another rank is gone, or does not answer; start all of them again, and they go "
        "on from what was kept"
    ]
    assert progress_of(train.root / "killed")["step"] == 4
    done = train("interrupted", ["killed"])
    assert {path.name for path in train.root.glob("stopped-*")} == {"stopped-0-0", "stopped-0-1"}, done.stderr
    assert progress_of(train.root / "killed")["step"] == 6
    assert train("training", ["killed", "--shard"], ranks=1).returncode == 0
    assert_same_run(train, "killed")


def test_bad_input_is_told_in_one_line(train):
    """Each by one rank; the other ends too."""
    root, moe = train.root, train.root / "moe.json"
    mistakes = {
        "--batch-size 1: 2 ranks share every batch, a row each": ["new", "--batch-size", "1"],
        "option lr is 0.5 on rank 0 and 0.25 on rank 1; start": ["new", "--lr", ["0.5", "0.25"]],
        "state-8: that run was started with lr 0.01, not 0.5": ["data", "--lr", "0.5"],
        "holds the run of one process; go on with python -m runs_train": ["alone"],
        "--compile: not under torchrun": ["new", "--compile"],
        "has experts, of which each rank uses others": ["new", "--config", str(moe), "--shard"],
        "--data nowhere: no such file": ["new", "--data", "nowhere"],
    }
    moe.write_text(json.dumps(MOE))
    train("training", *mistakes.values())
    for number, message in enumerate(mistakes):
        told = (root / f"error-{number}").read_text()
        assert message in told and "\n" not in told
    assert not (root / "new").exists()
    with pytest.raises(
        UserError, match="data/training: holds a run of several processes; go on with torchrun"
    ):
        main_of("language_model")(train.command("data", "--dtype", "float32"))
