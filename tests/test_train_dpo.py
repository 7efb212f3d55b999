"""Preferences: the loss is the paper's and trl's, the reference is asked once, and the better answer wins."""

import json
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.checkpoint import open_checkpoint
from conversion.convert import convert
from models import load_model
from models.utils.errors import UserError
from models.utils.lora import adapters
from models.utils.tokenizer import load_tokenizer
from runs_train import chat_data, preferences, tuning
from runs_train.chat_data import PLAIN_TEMPLATE
from runs_train.dpo import main, parse_options
from runs_train.preference_data import Pair, PairBatches, pairs_within, read_pair, read_pairs
from tests.test_train_sft import some, turns
from tests.training_runs import CONFIGS, PAIRS, small_run, state_of

BETA = 0.3
WIDE = CONFIGS["dpo"] | {"d_model": 32, "head_dim": 16}


@pytest.fixture
def tokenizer():
    tokenizer = load_tokenizer("checkpoints/tiny-llama-python")
    tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


@pytest.fixture
def run(tmp_path):
    """A run whose model has moved away from its reference."""
    options = parse_options(small_run("dpo", tmp_path)("run", "--dtype", "float32", "--beta", str(BETA)))
    options.device, options.warmup = torch.device("cpu"), 0
    base = tuning.open_base(options)
    model = load_model(base.folder)
    run = preferences.Run(model, base, read_pairs(options.data), options, tmp_path)
    run.references = run.write_references()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return run


# The loss ---------------------------------------------------------------------------------------------------


def sums(model, tokens, is_answer):
    """Log-probabilities of answers in fp64, token by token."""
    with torch.no_grad():
        table = model.double()(tokens).log_softmax(-1)
    model.float()
    found = []
    for row, (ids, counts) in enumerate(zip(tokens.tolist(), is_answer.tolist())):
        found.append(sum(table[row, t - 1, ids[t]] for t in range(1, len(ids)) if counts[t]))
    return torch.stack(found)


def test_loss_and_gradient_are_the_paper_s(run, tmp_path):
    """Eq. 7, and the gradient of the text below it: each pair weighs as much as it is wrong."""
    tokens, is_answer, _ = batch = run.batch(0)
    B = run.num_predictions(batch)
    policy = sums(run.model, tokens, is_answer)
    reference = sums(load_model(run.base.folder), tokens, is_answer)
    rewards = BETA * (policy - reference)
    weight = torch.sigmoid(rewards[B:] - rewards[:B])
    expected = -torch.log(1 - weight).mean()
    loss = run.loss(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and abs(expected - 0.693) > 1e-3
    loss.backward()
    ours = run.model.final_norm.weight.grad.clone()

    run.model.zero_grad()
    log_probs = run.model(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    difference = (log_probs * is_answer[:, 1:]).sum(1)
    (-BETA * (weight * (difference[:B] - difference[B:])).mean()).backward()
    torch.testing.assert_close(ours, run.model.final_norm.weight.grad, rtol=1e-3, atol=1e-5)


def test_loss_and_figures_are_trl_s(run):
    """Where trl is installed; the tests do not ask for it."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer", exc_type=ImportError)
    tokens, is_answer, reference = batch = run.batch(0)
    table = run.model(tokens)[:, :-1].log_softmax(-1)
    log_probs = table.gather(-1, tokens[:, 1:, None])[..., 0] * is_answer[:, 1:]
    # Of the model it sees what it takes from one, and of the statistics that it keeps we look at three.
    rest = dict.fromkeys(("entropy", "mean_logits"), log_probs) | {"is_top1": log_probs > 0}
    metrics = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        model=torch.nn.Linear(1, 1).train(), aux_loss_enabled=False, ld_alpha=None, beta=BETA,
        use_weighting=False,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0],
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
        _metrics=metrics, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "completion_mask": is_answer}
    inputs |= {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    model = lambda **inputs: SimpleNamespace(log_probs=log_probs, **rest)  # noqa: E731
    theirs = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
    assert run.loss(batch).item() == pytest.approx(theirs.item(), rel=1e-5)
    _, accuracy, margin = run.latest
    assert accuracy == metrics["train"]["rewards/accuracies"][0]
    assert margin == pytest.approx(metrics["train"]["rewards/margins"][0], rel=1e-4)


def test_without_a_step_the_loss_is_log_2(tmp_path):
    """The reference is the model, whatever dropout it has."""
    config = CONFIGS["sft"] | {"dropout": 0.5}
    main(small_run("dpo", tmp_path, config=config)("run", "--dtype", "float32", "--lr", "1e-9", steps=3))
    assert state_of(tmp_path / "run")["losses"] == pytest.approx([0.6931] * 3, abs=1e-3)


# Pairs ------------------------------------------------------------------------------------------------------


def test_only_the_last_answer_counts(tokenizer):
    before = turns("Hi", "Hello!", "x")[:3]
    pair = read_pair({"prompt": before, "chosen": "yes", "rejected": "no, no"}, "line 1", "line 1")
    batches = PairBatches([pair], tokenizer, 64, 200, seed=0)
    tokens, is_answer, _ = batches.batch(0)
    said = [tokens[row][is_answer[row].bool()].tolist() for row in (0, 1)]
    end = [tokenizer.eos_id]
    assert said == [tokenizer.encode(text, bos=False) + end for text in ("yes", "no, no")]


def test_each_pair_stays_together_and_is_read_once(tokenizer):
    pairs = []
    for talk in some(40):
        other = [*talk.messages[:-1], {"role": "assistant", "content": "not " + talk.messages[-1]["content"]}]
        pairs.append(Pair(talk.messages, other, talk.where))
    batches = PairBatches(pairs, tokenizer, 64, 300, seed=1)
    seen = []
    for n in range(batches.per_pass):
        tokens, is_answer, numbers = batches.batch(n)
        assert tokens.numel() <= 300 and len(tokens) == 2 * len(numbers)
        for row, number in enumerate(numbers):
            for half, messages in enumerate((pairs[number].messages, pairs[number].rejected)):
                place = row + half * len(numbers)
                said = tokenizer.decode(tokens[place][is_answer[place].bool()].tolist())
                assert said == messages[-1]["content"]
        seen += numbers.tolist()
    assert sorted(seen) == list(range(40)) and 0 <= batches.share_of_pads() < 0.3


def test_what_is_longer_than_the_context_is_left_out(tokenizer):
    pairs = [
        Pair(turns("x", "y"), turns("x", "z"), "line 1"),
        Pair(turns("x", "y"), turns("x", "z " * 50), "line 2"),
    ]
    batches = PairBatches(pairs, tokenizer, 32, 200, seed=0)
    assert len(batches.lengths) == batches.num_left_out == 1
    assert batches.what_was_lost("training", 32) == "1 training pairs of more than 32 tokens are left out"
    with pytest.raises(UserError, match="no pair fits within 32 tokens"):
        PairBatches(pairs[1:], tokenizer, 32, 200, seed=0)


def test_pairs_of_the_standard_library():
    """The rejected answer is a neighbour's, and never the same text."""
    talks = [("a.f", "1"), ("a.g", "1"), ("a.h", "2"), ("b.f", "3")]
    talks = [chat_data.Conversation(turns(f"What does {name} do?", said), name) for name, said in talks]
    pairs = list(pairs_within(talks))
    assert [pair.where for pair in pairs] == ["a.f", "a.g", "a.h"]  # b has one function
    assert [(pair.messages[-1]["content"], pair.rejected[-1]["content"]) for pair in pairs] == [
        ("1", "2"), ("1", "2"), ("2", "1"),
    ]  # fmt: skip
    assert all(pair.messages[:-1] == pair.rejected[:-1] for pair in pairs)


FORMS = {
    "texts": {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
    "answers as messages": {
        "prompt": "Hi", "chosen": turns("", "Hello!")[1:], "rejected": turns("", "What?")[1:],
    },
    "whole conversations": {
        "prompt": "Hi", "chosen": turns("Hi", "Hello!"), "rejected": turns("Hi", "What?"),
    },
    "no prompt beside them": {"chosen": turns("Hi", "Hello!"), "rejected": turns("Hi", "What?")},
    "a prompt of messages": {"prompt": turns("Hi", "x")[:1], "chosen": "Hello!", "rejected": "What?"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_line(tmp_path, form):
    (tmp_path / "data").write_text(PAIRS + json.dumps(FORMS[form]) + "\n")
    corpus = read_pairs(tmp_path / "data")
    expected = (turns("Hi", "Hello!"), turns("Hi", "What?"), "line 31")
    assert expected in corpus.train + corpus.held_out and len(corpus.train + corpus.held_out) == 31


BAD_LINES = {
    "no JSON": ("{", "data, line 31: is no JSON"),
    "no object": ("[1]", "line 31: has not both chosen and rejected"),
    "one side": ({"prompt": "x", "chosen": "y"}, "line 31: has not both chosen and rejected"),
    "no prompt": ({"chosen": "x", "rejected": "y"}, "line 31: .* no two answers to the same question"),
    "an empty prompt": ({"prompt": " ", "chosen": "x", "rejected": "y"}, "line 31: prompt: message 1 has no"),
    "a number": ({"prompt": "x", "chosen": 3, "rejected": "y"}, "line 31: chosen is neither a text nor"),
    "nothing": ({"prompt": "x", "chosen": [], "rejected": "y"}, "line 31: chosen is neither a text nor"),
    "an unknown role": (
        {"chosen": [{"role": "bot", "content": "x"}], "rejected": "y"},
        "line 31: chosen: message 1 has the role 'bot'; known: system,",
    ),
    "other questions": (
        {"chosen": turns("x", "y"), "rejected": turns("z", "y")}, "line 31: .* no two answers to the same",
    ),
    "no answer": (
        {"chosen": turns("x", "y", "z")[:3], "rejected": turns("x", "y", "v")[:3]}, "line 31: .* no two",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_wrong_is_named(tmp_path, name):
    line, message = BAD_LINES[name]
    (tmp_path / "data").write_text(PAIRS + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(UserError, match=message) as error:
        read_pairs(tmp_path / "data")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rejected", ["2.", " 2.\n"])
def test_a_pair_without_a_difference_is_named(tmp_path, rejected):
    """Also where only the template makes them equal."""
    line = json.dumps({"prompt": "What comes after 1?", "chosen": "2.", "rejected": rejected})
    (tmp_path / "trim").write_text(PLAIN_TEMPLATE.replace("message.content", "message.content | trim"))
    command = small_run("dpo", tmp_path, data=PAIRS + line + "\n")
    with pytest.raises(
        UserError, match="data, line 31: chosen and rejected are the same answer; a pair"
    ) as error:
        main(command("run", "--template", tmp_path / "trim"))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


# Runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=[[], ["--lora", "--rank", "8", "--lr", "0.02"]], ids=["all weights", "lora"]
)
def finished(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    lines = "".join(
        json.dumps({"prompt": f"Say it, {n}.", "chosen": "Good day.", "rejected": "Go away."}) + "\n"
        for n in range(60)
    )
    arguments = small_run("dpo", root, config=WIDE, data=lines)
    main(arguments("run", "--dtype", "float32", "--eval-every", "15", *request.param, steps=30))
    return root / "run"


def test_the_better_answer_wins(finished):
    (_, *before), *_, (_, loss, accuracy, margin) = state_of(finished)["evaluations"]
    assert before == pytest.approx([0.6931, 0, 0], abs=1e-3)
    # Adapters leave the head as it is, random here, and go less far.
    assert loss < 0.6 and accuracy == 1 and margin > 0.3
    readme = (finished / "README.md").read_text()
    assert "| pairs | " in readme and "accuracy 100.0%, margin" in readme
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_result_runs(finished):
    """As a model of its own, or beside the one that it was trained beside."""
    is_adapter = (finished / "adapter_config.json").exists()
    assert is_adapter != (finished / "config.json").exists()
    if is_adapter:
        model = open_checkpoint(finished.parent / "base", device="cpu", adapter=finished).load()
    else:
        convert(finished)
        model = load_model(finished, dtype=torch.float32)
    base = load_model(finished.parent / "base")
    tokenizer = load_tokenizer(finished.parent / "base")
    tokenizer.chat_template = PLAIN_TEMPLATE
    batch = PairBatches(
        [Pair(turns("Say it, 99.", "Good day."), turns("Say it, 99.", "Go away."), "")], tokenizer, 64, 99, 0
    )
    tokens, is_answer, _ = batch.batch(0)
    gained = [sums(each, tokens, is_answer) for each in (model, base)]
    good, bad = gained[0] - gained[1]
    assert good > bad + 3 and not adapters(model)


def test_the_reference_is_asked_once(tmp_path, monkeypatch):
    command = small_run("dpo", tmp_path)
    main(command("run", steps=3))
    path = tmp_path / "run" / "training" / "reference.safetensors"
    stored = load_file(path)
    assert stored["train"].shape[1] == 2 and (stored["train"] < 0).all()
    monkeypatch.setattr(preferences.Run, "reference_log_probs", None)
    main(command("run", "--restart", steps=3))  # the same numbers, whatever the steps are
    path.unlink()
    with pytest.raises(UserError, match="reference.safetensors: is missing, or of another run; .*--restart"):
        main(command("run", steps=3))
    path.write_bytes(b"x" * 99)
    with pytest.raises(UserError, match="reference.safetensors: is missing, or of another run; .*--restart"):
        main(command("run", steps=3))
    monkeypatch.undo()
    save_file(
        {name: torch.ones_like(numbers) for name, numbers in stored.items()}, path, {"of": "another run"}
    )
    main(command("run", "--restart", steps=3))
    assert torch.equal(load_file(path)["train"], stored["train"])


MISTAKES = {
    "no beta": (["--beta", "0"], "--beta: '0' is not a number above 0"),
    "an image model": (["--checkpoint", "tiny-vit-digits"], "a one-pass model; dpo trains a decoder"),
    "no such layer": (["--lora", "--targets", "query"], "no linear layer is called 'query'; this model has"),
    "adapters without --lora": (["--rank", "4"], "--rank, --alpha, .* go with --lora"),
    "quantized without --lora": (["--quantize", "int4"], "go with --lora"),
    "no data": (["--data", "nowhere"], "nowhere: cannot be read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(tmp_path, mistake):
    options, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as error:
        main(small_run("dpo", tmp_path)("run", *options))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
