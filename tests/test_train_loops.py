"""What every training page must do alike: go on exactly, lose nothing, say in a line what is wrong."""

import ctypes
import json
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import kind_of
from models.utils.errors import UserError
from models.utils.training_notes import read_notes, unfinished_run
from runs_train import training_run
from runs_train.training_run import TrainingRun
from tests.training_runs import (
    CONFIGS,
    FRESH_PAGES,
    PAGES,
    ROOT,
    before_the_evaluation,
    goes_on_to_the_bit,
    in_the_gradients,
    in_the_update,
    main_of,
    small_run,
    state_of,
    weights_of,
)

# What is the same for all is tried on the two that are fastest: tokens with a tokenizer, and images.
TWO = ("language_model", "image_classifier")


@pytest.fixture(params=PAGES)
def loop(request, tmp_path):
    """(main, name of the folder and options to the arguments of a small run) of every page."""
    return main_of(request.param), small_run(request.param, tmp_path)


@pytest.fixture(params=TWO)
def either(request, tmp_path):
    return main_of(request.param), small_run(request.param, tmp_path)


@pytest.fixture
def train(tmp_path):
    """train(folder, *options, steps): a small run of the language model."""
    command = small_run("language_model", tmp_path)
    return lambda *words, **steps: main_of("language_model")(command(*words, **steps))


def test_every_page_has_a_small_run():
    assert set(PAGES) == set(CONFIGS)


# Going on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupt", [in_the_gradients, in_the_update])
def test_an_interrupted_run_goes_on_to_the_bit(loop, tmp_path, interrupt, monkeypatch):
    main, command = loop
    goes_on_to_the_bit(lambda folder: main(command(folder)), tmp_path, monkeypatch, interrupt)


def test_so_it_does_with_all_options(loop, tmp_path, monkeypatch):
    main, command = loop
    options = ["--dtype", "float32", "--gradient-checkpointing", "--accumulate", "2"]
    goes_on_to_the_bit(
        lambda folder: main(command(folder, *options)), tmp_path, monkeypatch, before_the_evaluation
    )


def test_a_run_that_is_killed_goes_on_from_its_last_state(loop, tmp_path, monkeypatch):
    main, command = loop
    main(command("whole"))
    train_step = TrainingRun.train_step

    def die_in_step_7(run):
        if run.step == 6:
            raise MemoryError
        train_step(run)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(TrainingRun, "train_step", die_in_step_7)
        main(command("killed"))
    assert state_of(tmp_path / "killed")["step"] == 4
    main(command("killed"))
    assert state_of(tmp_path / "killed")["losses"] == state_of(tmp_path / "whole")["losses"]


def test_a_finished_run_is_only_measured_again(loop, tmp_path, monkeypatch):
    main, command = loop
    main(command("run", steps=3))
    before = weights_of(tmp_path / "run").read_bytes()
    monkeypatch.setattr(TrainingRun, "train_step", None)
    main(command("run", steps=3))
    assert weights_of(tmp_path / "run").read_bytes() == before


@pytest.mark.parametrize("option, value", [("--lr", "0.02"), ("--seed", "3"), ("--accumulate", "3")])
def test_a_run_goes_on_only_as_it_began(loop, tmp_path, option, value):
    main, command = loop
    main(command("run", steps=3))
    kept = (tmp_path / "run" / "training" / "state.pt").read_bytes()
    with pytest.raises(
        UserError, match=f"that run was started with {option[2:]} .*, not {value}; .*--restart"
    ):
        main(command("run", option, value, steps=3))
    assert (tmp_path / "run" / "training" / "state.pt").read_bytes() == kept


def test_what_was_left_open_stays_what_it_was(train, tmp_path, monkeypatch):
    """A run goes on where the machine, or a new default, would choose another dtype."""
    monkeypatch.setattr(training_run, "training_dtype", lambda device: (torch.bfloat16, None))
    train("run", steps=3)
    monkeypatch.setattr(training_run, "training_dtype", lambda device: (torch.float32, None))
    train("run", steps=3)
    assert state_of(tmp_path / "run")["settings"]["dtype"] == "bfloat16"
    with pytest.raises(UserError, match="was started with dtype bfloat16, not float32"):
        train("run", "--dtype", "float32", steps=3)


def test_the_dtype_is_what_the_machine_is_fast_at_and_a_line_says_so(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_run, "training_dtype", lambda device: (torch.float32, "float32: an old CPU"))
    seen, autocast = [], training_run.autocast
    monkeypatch.setattr(
        "runs_train.next_token.autocast", lambda options: seen.append(options.dtype) or autocast(options)
    )
    train("slow", steps=3)
    assert set(seen) == {"float32"} and "float32: an old CPU; --dtype" in capsys.readouterr().out
    assert ", in float32 |" in (tmp_path / "slow" / "README.md").read_text()


# A step -----------------------------------------------------------------------------------------------------


class Toy(TrainingRun):
    """A run of two numbers, whose batches are of uneven size and whose gradients are known."""

    def __init__(self, clip, tmp_path):
        options = {
            "steps": 2,
            "accumulate": 2,
            "clip": clip,
            "device": torch.device("cpu"),
            "dtype": "float32",
        }
        model = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        super().__init__(model, optimizer, type("Options", (), options), {}, tmp_path)

    def batch(self, n):
        return torch.tensor([[30.0, 40.0]] if n % 2 == 0 else [[2.0, 0.0], [0.0, 6.0], [4.0, 0.0]])

    def num_predictions(self, batch):
        return len(batch)

    def loss(self, batch):
        return self.model(batch).mean()

    def learning_rate(self):
        return 0.1


def test_each_prediction_counts_the_same_whatever_batch_it_is_in(tmp_path):
    """The mean of the four rows, not of the two batches."""
    run = Toy(1e9, tmp_path)
    run.train_step()
    assert run.model.weight[0].tolist() == pytest.approx([-0.1 * 36 / 4, -0.1 * 46 / 4])
    run.train_step()
    rows = torch.cat([run.batch(0), run.batch(1)])
    first = torch.tensor([[-0.9, -1.15]])
    assert run.losses == [0, pytest.approx((rows @ first.T).mean().item())]
    # The gradient is the same in each step, and counts once.
    assert run.model.weight[0].tolist() == pytest.approx((2 * first[0]).tolist())


def test_gradients_are_clipped_to_a_length(tmp_path):
    """In their direction, and only where they are longer."""
    gradient = torch.tensor([9.0, 11.5])
    for clip, length in (1.0, 1.0), (5.0, 5.0), (100.0, gradient.norm()):
        run = Toy(clip, tmp_path)
        run.train_step()
        step = -run.model.weight[0].detach() / 0.1
        torch.testing.assert_close(step, gradient / gradient.norm() * length, rtol=1e-4, atol=0)


def test_ctrl_c_is_answered_in_the_midst_of_a_backward_pass(tmp_path):
    """The last layer has its gradient, those before it have none yet."""
    layers = [torch.nn.Linear(3, 3) for _ in range(3)]
    model = torch.nn.Sequential(*layers)
    run = TrainingRun(model, None, None, {}, tmp_path)
    # As from another process: a hook in C, behind which no line of Python runs that would notice it.
    press = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("PyErr_SetInterrupt", ctypes.pythonapi))
    layers[2].weight.register_hook(press)
    with run.interrupts, pytest.raises(KeyboardInterrupt):
        model(torch.ones(1, 3)).sum().backward()
    assert layers[0].weight.grad is None


# What is shown ----------------------------------------------------------------------------------------------


def test_without_a_terminal_there_is_a_line_now_and_then(loop, monkeypatch, capsys):
    main, command = loop
    monkeypatch.setattr(training_run, "SECONDS_BETWEEN_LINES", 0)
    main(command("run"))
    shown = capsys.readouterr().err
    assert all(f"\nstep {step:6}   loss " in f"\n{shown}" for step in range(1, 9))
    assert shown.count("_per_s") >= 8 and "held-out" in shown


def test_few_steps_have_a_short_warm_up(train, tmp_path):
    """As is said nowhere: --warmup and --eval-every follow --steps."""
    options = ["--config", tmp_path / "config.json", "--data", tmp_path / "data", "--vocab-size", "400"]
    options += ["--out", tmp_path / "run", "--steps", "5", "--device", "cpu", "--batch-size", "2"]
    main_of("language_model")([str(option) for option in options])
    state = state_of(tmp_path / "run")
    assert state["settings"]["warmup"] == 0 and [step for step, _ in state["evaluations"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("page", FRESH_PAGES)
def test_the_usual_number_of_steps_has_the_usual_warm_up(page):
    """Those of the checkpoints that come with the project."""
    parse_options = sys.modules[main_of(page).__module__].parse_options
    expected = {"seq2seq": 800}.get(page, 200)
    for steps in [], ["--steps", "9000"]:
        options = parse_options(["--config", "x", "--data", "x", *steps])
        assert options.default_warmup == expected and options.eval_every == 250
    assert parse_options(["--config", "x", "--data", "x", "--steps", "1"]).default_warmup <= 1


def test_a_model_that_is_not_what_its_config_s_name_promises_says_so(train, tmp_path, capsys):
    train("run", steps=3)
    first, second = (
        line for line in capsys.readouterr().out.splitlines() if "parameters" in line or "itself" in line
    )
    # d_model 24: a vocabulary of 100 more makes 2,400 more.
    ours, theirs = (
        int(line.split()[place].replace(",", "").strip(":")) for line, place in ((first, 0), (second, 3))
    )
    assert ours - theirs == 2400 and "with these data vocab_size is 400, not 300" in second


# The folder -------------------------------------------------------------------------------------------------


def test_an_interrupted_run_says_what_it_is(either, tmp_path, monkeypatch):
    main, command = either
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        in_the_update(patch)
        main(command("a run"))
    said = unfinished_run(tmp_path / "a run")
    start = f"{tmp_path / 'a run'}: an unfinished training run, not a model yet; go on with: "
    start += "python -m runs_train."
    assert said.startswith(start)
    main(shlex.split(said.removeprefix(start))[1:])
    assert state_of(tmp_path / "a run")["step"] == 8
    assert unfinished_run(tmp_path / "a run") is None and unfinished_run(tmp_path) is None


def test_notes_of_others_bring_no_escape_sequences(tmp_path):
    (tmp_path / "training").mkdir()
    notes = {"page": "x\x1b[2J", "arguments": ["a\nb"], "written": {}}
    (tmp_path / "training" / "run.json").write_text(json.dumps(notes))
    assert unfinished_run(tmp_path).isprintable()
    for broken in {"page": 3}, [], {"page": "x", "arguments": [1], "written": {}}:
        (tmp_path / "training" / "run.json").write_text(json.dumps(broken))
        assert unfinished_run(tmp_path) is None


@pytest.mark.parametrize(
    "name", ["README.md", "loss.png", "model.safetensors", "config.json", "training/notes"]
)
@pytest.mark.parametrize("restart", [[], ["--restart"]])
def test_what_it_did_not_write_it_does_not_replace(train, tmp_path, name, restart):
    own = tmp_path / "run" / name
    own.parent.mkdir(parents=True)
    own.write_text("my own")
    with pytest.raises(UserError, match="move it away, or give another --out"):
        train("run", *restart)
    assert own.read_text() == "my own"
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [own]


def test_nor_what_was_changed_since(train, tmp_path, monkeypatch):
    train("run", steps=3)
    readme = tmp_path / "run" / "README.md"
    readme.write_text(readme.read_text() + "my own notes")
    with pytest.raises(UserError, match=r"run has a README.md, or .* changed since; move it away"):
        train("run", "--restart", steps=3)
    assert "my own notes" in readme.read_text()

    # Written while it trains, it is met at the end; what was trained is kept.
    readme.rename(tmp_path / "mine.md")
    update = TrainingRun.update
    monkeypatch.setattr(
        TrainingRun, "update", lambda run, loss: readme.write_text("new") and update(run, loss)
    )
    with pytest.raises(UserError, match=r"run has a README.md"):
        train("run", "--restart", "--seed", "1", steps=3)
    assert readme.read_text() == "new" and state_of(tmp_path / "run")["settings"]["seed"] == 1


def test_a_new_run_takes_the_place_of_the_old_only_when_it_can(train, tmp_path):
    train("run", steps=3)
    state = tmp_path / "run" / "training" / "state.pt"
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for mistake in (
        ["--vocab-size", "60000"],
        ["--config", "nowhere"],
        ["--vocab-size", "350", "--context", "64"],
        ["--batch-size", "1e9"],
    ):
        with pytest.raises(UserError):
            train("run", "--restart", *mistake, steps=3)
        assert before == {path: path.read_bytes() for path in before}
    train("run", "--restart", "--vocab-size", "350", steps=3)
    assert len(list(state.parent.glob("tokens-*"))) == 1
    assert state.read_bytes() != before[state] and state_of(tmp_path / "run")["step"] == 3
    assert "--restart" not in (tmp_path / "run" / "README.md").read_text()


def test_another_kind_of_run_leaves_nothing_of_the_first(tmp_path):
    """The tokenizer of a BERT beside that of a GPT-2 would be taken for its own."""
    bert, gpt2 = (small_run(page, tmp_path) for page in ("masked_language_model", "language_model"))
    small_run("masked_language_model", tmp_path)
    main_of("masked_language_model")(bert("run", steps=3))
    (tmp_path / "run" / "mine.txt").write_text("mine")
    small_run("language_model", tmp_path)
    with pytest.raises(UserError, match="was started with page masked_language_model, not language_model"):
        main_of("language_model")(gpt2("run", steps=3))
    main_of("language_model")(gpt2("run", "--restart", steps=3))
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert "vocab.txt" not in there and {"tokenizer.model", "mine.txt"} <= there


def test_two_runs_do_not_share_a_folder(train, tmp_path, monkeypatch):
    evaluate, seen = TrainingRun.evaluate_if_due, []

    def try_another(run):
        if not seen:
            seen.append(run.step)
            with pytest.raises(UserError, match="run: another training run is at work in this folder"):
                train("run", "--seed", "1")
        evaluate(run)

    monkeypatch.setattr(TrainingRun, "evaluate_if_due", try_another)
    train("run", steps=3)
    assert seen and state_of(tmp_path / "run")["settings"]["seed"] == 0
    # A lock without its process is none.
    assert (tmp_path / "run" / "training" / "lock").exists()
    train("run", steps=3)


def test_a_run_that_was_killed_in_its_first_moment_is_no_stranger(train, tmp_path):
    (tmp_path / "run" / "training").mkdir(parents=True)
    (tmp_path / "run" / "training" / "lock").write_text("")
    train("run", steps=3)
    assert state_of(tmp_path / "run")["step"] == 3


def test_a_command_that_comes_to_nothing_leaves_nothing(either, tmp_path):
    main, command = either
    with pytest.raises(UserError):
        main(command("run", "--data", "nowhere"))
    assert not (tmp_path / "run").exists()


# Accidents --------------------------------------------------------------------------------------------------


def states():
    """name -> (what becomes of a good state, or what stands in its place)"""
    keep = lambda change: lambda state: change(state) or state  # noqa: E731
    return {
        "half a file": None,
        "a list": lambda state: [1, 2],
        "no settings": keep(lambda state: state.pop("settings")),
        "settings that are none": keep(lambda state: state.update(settings=3)),
        "of another model": keep(lambda state: state["model"].popitem()),
        "a step that is a word": keep(lambda state: state.update(step="3")),
        "seconds that are a word": keep(lambda state: state.update(seconds="3")),
        "more steps than losses": keep(lambda state: state.update(step=5)),
        "means of other shapes": keep(
            lambda state: (
                [m.update(exp_avg=torch.ones(7)) for m in state["optimizer"]["state"].values()] and None
            )
        ),
        "no random state": keep(lambda state: state.update(random={"cpu": torch.ones(3)})),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(main, arguments, the path of its state) of a run that is done."""
    root = tmp_path_factory.mktemp("finished")
    arguments = small_run("language_model", root)("run", steps=3)
    main_of("language_model")(arguments)
    return arguments, root / "run" / "training" / "state.pt"


@pytest.mark.parametrize("name", states())
def test_a_state_of_another_form(finished, name):
    arguments, path = finished
    good = path.read_bytes()
    change = states()[name]
    if change:
        torch.save(change(torch.load(path, weights_only=True)), path)
    else:
        path.write_bytes(good[:1000])
    with pytest.raises(UserError, match=r"state.pt: (cannot be read|is no state of this run) .*--restart"):
        main_of("language_model")(arguments)
    path.write_bytes(good)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff\xff" * 40])
@pytest.mark.parametrize("page", ["language_model", "masked_language_model"])
def test_damaged_tokens(tmp_path, page, content):
    """None, half of one, and some that the vocabulary does not have."""
    command = small_run(page, tmp_path)
    main_of(page)(command("run", steps=3))
    (path,) = (tmp_path / "run" / "training").glob("tokens-*/train.bin")
    path.write_bytes(content)
    with pytest.raises(UserError, match="train.bin: is damaged; remove .*, and it is made again"):
        main_of(page)(command("run", steps=3))


def test_a_loss_that_explodes_keeps_the_last_good_state(loop, tmp_path, monkeypatch):
    main, command = loop
    find_gradients = TrainingRun.find_gradients

    def poisoned(run):
        if run.step == 6:
            next(run.model.parameters()).data.fill_(torch.nan)
        return find_gradients(run)

    monkeypatch.setattr(TrainingRun, "find_gradients", poisoned)
    with pytest.raises(
        UserError, match="step 7: the loss is nan, .*--lr .*state.pt has an earlier step"
    ) as error:
        main(command("run"))
    assert "\n" not in str(error.value)
    state = state_of(tmp_path / "run")
    weights = state.get("model") or state["trained"]  # of lora: the adapters
    assert state["step"] == 4 and all(value.isfinite().all() for value in weights.values())


def test_a_rate_that_is_too_high(train):
    with pytest.raises(UserError, match=r"the loss is .*, the gradient's length (nan|inf)"):
        train("run", "--lr", 1e30)


@pytest.mark.parametrize("what", ["tokens-", "state.pt", "model.safetensors"])
def test_a_full_disk(train, tmp_path, what):
    """As far as the system goes: no file may grow beyond so many bytes. The same command goes on later."""
    if what == "model.safetensors":
        train("run", steps=3)
        (tmp_path / "run" / what).unlink()
    largest, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({"tokens-": 3000}.get(what, 30_000), hard))
    try:
        with pytest.raises(UserError, match=rf"{what}.*: cannot be written \(.*; make room") as error:
            train("run", steps=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.partial*"))
    train("run", steps=3)
    assert state_of(tmp_path / "run")["step"] == 3


# Mistakes ---------------------------------------------------------------------------------------------------

HUGE = 10**30
MISTAKES = {
    "negative steps": (["--steps", "-5"], "--steps: '-5' is not a whole number from 1 up"),
    "half a step": (["--steps", "1.5"], "--steps: '1.5' is not a whole number"),
    "no end of steps": (["--steps", str(HUGE)], "is not a whole number"),
    "very many digits": (["--seed", "9" * 6000], "is not a whole number"),
    "not a number": (["--lr", "nan"], "--lr: 'nan' is not a number above 0"),
    "infinite": (["--clip", "inf"], "--clip: 'inf' is not a number above 0"),
    "negative": (["--weight-decay", "-1"], "--weight-decay: '-1' is not a number from 0 up"),
    "all warm-up": (["--warmup", "8"], "--warmup 8 leaves nothing of --steps 8"),
    "no such device": (["--device", "quantum"], "device 'quantum' is not on this machine"),
    "no such dtype": (["--dtype", "float16"], "--dtype: invalid choice: 'float16'"),
    "misspelt": (["--stesp", "5"], "unrecognized arguments: --stesp 5"),
    "half an option": (["--step", "5"], "unrecognized arguments: --step 5"),
    "no data": (["--data", ""], "--data is empty"),
    "no folder": (["--out", ""], "--out is empty"),
    "a file for a folder": (["--out", "file"], "--out file: file is a file; give a folder"),
    "below a file": (["--out", "file/run"], "--out file/run: file is a file; give a folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(loop, tmp_path, mistake, monkeypatch):
    main, command = loop
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file")
    options, message = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        main(command("run", *options))
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 7000
    assert not (tmp_path / "run").exists() and Path("file").read_text() == "a file"


@pytest.mark.parametrize("page", FRESH_PAGES)
@pytest.mark.parametrize(
    "config, message", [("", "--config is empty"), ("tiny-lama", "no config named 'tiny-lama'")]
)
def test_a_config_that_is_none(tmp_path, page, config, message):
    command = small_run(page, tmp_path)
    with pytest.raises(UserError, match=message):
        main_of(page)(command("run", "--config", config))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("other", FRESH_PAGES)
def test_a_config_of_another_kind(tmp_path, page, other):
    """A BERT among them, which would see the token that it predicts."""
    kinds = {(kind_of(CONFIGS[name]["model"]), CONFIGS[name]["model"] == "bert") for name in (page, other)}
    if len(kinds) == 1:
        return
    command = small_run(page, tmp_path, config=CONFIGS[other])
    with pytest.raises(UserError, match=f"a {CONFIGS[other]['model']} is a .*{page} trains a") as error:
        main_of(page)(command("run"))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [10**9, HUGE])
@pytest.mark.parametrize("page", FRESH_PAGES)
def test_sizes_that_no_machine_holds(tmp_path, page, value):
    """Every number of a config: refused before memory is taken, but for those that take none."""
    taken = set()
    for name in [name for name, old in CONFIGS[page].items() if type(old) is int]:
        command = small_run(page, tmp_path, config=CONFIGS[page] | {name: value})
        try:
            main_of(page)(command("run", "--restart", steps=3))
            taken.add(name)
        except UserError as error:
            assert "\n" not in str(error) and "--warmup" not in str(error)
    # The data have a say in these; a table of positions is none in the Transformer, which has sinusoids.
    assert taken <= {"vocab_size", "num_labels", "pad_id", "max_seq_len", "cross_downsample", "num_segments"}


def test_a_batch_that_no_machine_holds(train):
    with pytest.raises(UserError, match=r"--batch-size 100000000: the logits of a batch take .* free"):
        train("run", "--batch-size", 10**8)


# The command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, "dates_data"])
def test_started_as_a_file_it_says_how_to_start_it(page):
    result = subprocess.run(
        [sys.executable, ROOT / "runs_train" / f"{page}.py"], capture_output=True, text=True, cwd="/"
    )
    expected = f"error: start it as: python -m runs_train.{page}, in the project's folder\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_wrong_with_a_command_is_said_before_torch_is_imported(page):
    program = f"import sys; from runs_train.{page} import main\ntry:\n    main(['--stesp', '5'])\n"
    program += "except BaseException as error:\n    print(error, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert "are required: --c" in result.stdout and result.stdout.endswith("False\n"), result.stderr


def test_the_exit_status_is_2():
    command = [sys.executable, "-m", "runs_train.language_model", "--config", "gpt2", "--data", "nowhere"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: --data nowhere") and result.stderr.count("\n") == 1


def test_the_notes_are_of_the_run_that_is_kept(train, tmp_path):
    train("run", steps=3)
    with pytest.raises(UserError, match="--restart"):
        train("run", "--seed", "5", steps=3)
    assert read_notes(tmp_path / "run")["arguments"][-1] != "5"
    train("run", "--restart", "--seed", "5", steps=3)
    assert read_notes(tmp_path / "run")["arguments"][-1] == "5"
