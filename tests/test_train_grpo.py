"""Rewards: the loss is the paper's, texts are the model's draws, and what a program likes is written more."""

import json

import pytest
import torch

from conversion.checkpoint import open_checkpoint
from models import load_model
from models.utils.errors import UserError
from models.utils.lora import adapters, switched_off
from runs_train import adapters as adapters_page
from runs_train import rewarded, tuning
from runs_train.grpo import main, parse_options
from runs_train.rewarded import advantages, group_losses
from runs_train.rewards import answer, find_reward, library_prompts, parses, read_prompts
from tests.training_runs import PROMPTS, small_run, state_of

EPSILON, BETA = 0.2, 0.3


def small_options(root, *words):
    options = parse_options(small_run("grpo", root)("run", "--dtype", "float32", *words))
    options.device, options.warmup = torch.device("cpu"), 0
    return options


@pytest.fixture
def run(tmp_path):
    options = small_options(tmp_path, "--epsilon", str(EPSILON), "--beta", str(BETA), "--seed", "5")
    base = tuning.open_base(options)
    return rewarded.Run(load_model(base.folder), base, rewarded.Run.read(options), options, tmp_path)


# The loss ---------------------------------------------------------------------------------------------------


def by_hand(now, old, reference, rewards, counts):
    """Eq. 3 and 4 as they stand in the paper, a token at a time; rewards: of one group."""
    mean = sum(rewards) / len(rewards)
    deviation = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    total = 0
    for row, reward in enumerate(rewards):
        A, places = (reward - mean) / deviation, [t for t in range(counts.shape[1]) if counts[row, t]]
        tokens = 0
        for t in places:
            ratio = now[row, t].exp() / old[row, t].exp()
            clipped = max(min(ratio, 1 + EPSILON), 1 - EPSILON)
            quotient = reference[row, t].exp() / now[row, t].exp()
            kl = quotient - quotient.log() - 1
            tokens += min(ratio * A, clipped * A) - BETA * kl
        total += tokens / len(places)
    return -total / len(rewards)


def test_loss_and_gradient_are_the_formula_s():
    """With ratios on both sides of both clips, and advantages of both signs."""
    torch.manual_seed(0)
    G, T = 6, 9
    now = -torch.rand(G, T, dtype=torch.float64) * 3
    old, reference = now + 0.4 * torch.randn(G, T), now + 0.7 * torch.randn(G, T)
    rewards = torch.tensor([0.0, 1.0, 0.5, 3.0, -1.0, 0.0], dtype=torch.float64)
    counts = (torch.arange(T) >= 2) & (torch.arange(T) < torch.tensor([3, 9, 5, 8, 9, 4])[:, None])
    ratio = (now - old).exp()
    assert (ratio > 1 + EPSILON).any() and (ratio < 1 - EPSILON).any()

    first, second = now.clone().requires_grad_(), now.clone().requires_grad_()
    ours = group_losses(first, old, reference, advantages(rewards[None])[0], counts, EPSILON, BETA).mean()
    theirs = by_hand(second, old, reference, rewards.tolist(), counts)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-3)  # 1e-4 keeps a group of equals from 0 / 0
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-3, atol=1e-6)
    assert (first.grad[~counts] == 0).all()


def test_a_group_of_equals_teaches_nothing():
    assert (advantages(torch.ones(3, 4)) == 0).all()


def test_a_batch_s_loss_is_that_of_the_model_s_own_probabilities(run):
    """All the way from tokens: the prompt is read, the continuation counts to its end."""
    with torch.no_grad():
        for parameter in run.reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tokens, counts, old, reference, _, rewards = batch = run.batch(0)
    with torch.no_grad():
        table = [model.double()(tokens).log_softmax(-1) for model in (run.model, run.reference)]
        run.model.float(), run.reference.float()
    found = [each[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0] for each in table]
    counted = counts[:, 1:].bool()
    for ours, theirs in zip((old, reference), found):
        torch.testing.assert_close(ours[counted].double(), theirs[counted], rtol=1e-4, atol=1e-4)
    groups = [slice(n, n + 4) for n in (0, 4)]
    expected = [
        by_hand(found[0][g], found[0][g], found[1][g], rewards[g].tolist(), counted[g]) for g in groups
    ]
    assert run.loss(batch).item() == pytest.approx(sum(expected).item() / 2, rel=1e-2, abs=1e-4)
    assert run.num_predictions(batch) == 8


# What is written --------------------------------------------------------------------------------------------


def test_groups_are_drawn_and_judged(run):
    tokens, counts, _, _, advantage, rewards = run.batch(0)
    asked = run.prompts.ask(0, 2, 5)
    assert len(asked) == 2 and len(tokens) == 8
    for row, (ids, said) in enumerate(zip(tokens.tolist(), counts.tolist())):
        _, prompt = asked[row // 4]
        stop = len(said) - said[::-1].index(1)
        assert ids[: len(prompt)] == prompt and said == [0] * len(prompt) + [1] * (stop - len(prompt)) + [
            0
        ] * (len(said) - stop)
        text = run.tokenizer.decode(ids[:stop])
        assert rewards[row] == pytest.approx(text.count("e") / len(text))
        ends = [n for n in range(len(prompt), stop) if ids[n] in run.ends]
        assert ends in ([], [stop - 1]) and (ends or stop - len(prompt) == 8)
    for group in advantage.view(2, 4):
        assert group.mean() == pytest.approx(0, abs=1e-5)
    # The same draw serves all four updates, though the model would say something else by then.
    with torch.no_grad():
        run.model.lm_head.weight.mul_(-1)
    assert torch.equal(run.batch(3)[0], tokens)
    assert not torch.equal(run.batch(4)[0], tokens)


def test_every_prompt_is_asked_once_in_a_pass(run):
    asked = [prompt.where for n in range(len(run.prompts)) for prompt, _ in run.prompts.ask(n, 2, seed=0)]
    first, second = asked[: len(run.prompts)], asked[len(run.prompts) :]
    assert sorted(first) == sorted(second) == sorted(prompt.where for prompt, _ in run.prompts.found)
    assert first != second


def test_draws_follow_the_model_s_probabilities(run):
    """Of the first token, which is drawn often enough to count."""
    with torch.no_grad():
        run.model.lm_head.weight.mul_(60)  # some tokens are frequent then
        asked = [run.prompts.found[0]] * 600
        run.options.new_tokens = 1
        written, _, _ = run.judged(asked, 7)
        probs = run.model(torch.tensor([asked[0][1]]))[0, -1].softmax(-1)
    drawn = torch.bincount(torch.tensor([new[0] for new in written]), minlength=4096) / 600
    likely = probs.topk(5).indices
    torch.testing.assert_close(drawn[likely], probs[likely], atol=0.07, rtol=0)
    assert probs.max() > 0.05


# Rewards ----------------------------------------------------------------------------------------------------


def test_parses():
    assert parses("def f():\n    pass\n", {}, True) == 1 and parses("def f():\n", {}, True) == 0
    assert parses("x = 1\ny = (", {}, False) == 1 and parses("x = 1\ny = (", {}, True) == 0
    # What the parser itself cannot stand is no Python either.
    assert parses("x = '\0'", {}, True) == 0 and parses("(" * 1000 + ")" * 1000, {}, True) == 0


def test_answers():
    row = {"prompt": "3 and 4 are", "answer": 7}
    assert answer("3 and 4 are 7.", row, True) == 1 and answer("3 and 4 are 8", row, True) == 0
    assert answer("3 and 4 are", {**row, "answer": 4}, True) == 0  # the prompt's own numbers do not count
    assert answer("It is 1,000, or -7", {"prompt": [], "answer": "-7.0"}, True) == 1


def test_prompts_of_the_standard_library():
    train, held_out = library_prompts()
    assert len(train) > 500 and len(held_out) > 30
    for prompt in held_out:
        line = prompt.row["prompt"]
        assert line.startswith("def ") and line.endswith(":\n") and parses(f"{line}    pass\n", {}, True) == 1
    assert not {prompt.row["prompt"] for prompt in train} & {prompt.row["prompt"] for prompt in held_out}


BAD_LINES = {
    "no prompt": ({"answer": 3}, "data, line 31: has no prompt"),
    "no object": ([1], "line 31: has no prompt"),
    "a number": ({"prompt": 3, "answer": 3}, "line 31: prompt is neither a text nor a list of messages"),
    "no answer": ({"prompt": "x"}, "line 31: answer is None; --reward answer expects a number"),
    "an answer of words": (
        {"prompt": "x", "answer": "seven"},
        "line 31: answer is 'seven'; --reward answer exp",
    ),
    "no content": ({"prompt": [{"role": "user"}], "answer": 3}, "line 31: prompt: message 1 has no content"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_wrong_is_named(tmp_path, name):
    line, message = BAD_LINES[name]
    (tmp_path / "data").write_text(PROMPTS + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=message) as error:
        read_prompts(tmp_path / "data", "answer")
    assert "\n" not in str(error.value)


BAD_REWARDS = {
    "not a number": ("return float('nan')", r"step \d+: the reward of .* is nan; it has to be a finite"),
    "infinite": ("return 1e999", "is inf; it has to be a finite number"),
    "a word": ("return 'good'", "reward.py: ValueError: could not convert"),
    "nothing": ("return None", "reward.py: TypeError: float"),
    "an accident": ("return 1 / 0", "reward.py: ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_a_reward_that_is_none_stops_with_a_line(tmp_path, name):
    """After some steps; what was reached before is kept."""
    body, message = BAD_REWARDS[name]
    calls = "global calls\n    calls += 1\n    if calls < 40:\n        return calls\n    "
    (tmp_path / "reward.py").write_text(f"calls = 0\ndef reward(text, row, is_whole):\n    {calls}{body}\n")
    command = small_run("grpo", tmp_path)
    own = ["--reward", str(tmp_path / "reward.py"), "--updates", "1", "--save-every", "1"]
    with pytest.raises(UserError, match=message) as error:
        main(command("run", *own, "--eval-every", "9"))
    assert "\n" not in str(error.value) and "state.pt has an earlier step" in str(error.value)
    assert state_of(tmp_path / "run")["step"] > 0


MISTAKES = {
    "an unknown reward": (["--reward", "beauty"], "--reward beauty: is none of parses, answer, and no file"),
    "no file": (["--reward", "nowhere.py"], "nowhere.py: cannot be read"),
    "no function": (["--reward", "empty.py"], "empty.py: has no function reward"),
    "no Python": (["--reward", "broken.py"], "--reward broken.py: SyntaxError"),
    "a group of one": (["--group", "1"], "--group: '1' is not a whole number from 2"),
    "no room": (["--new-tokens", "63"], "--new-tokens leaves no prompt room; 1 tokens are left"),
    "a clip of more than all": (["--epsilon", "2"], "--epsilon: '2' is not a number"),
    "an image model": (["--checkpoint", "tiny-vit-digits"], "a one-pass model; grpo trains a decoder"),
    "a batch that no machine holds": (["--questions", "100000000"], "the logits of a batch take .* free"),
    "messages without a template": (
        ["--data", "chats"],
        "line 1: prompt is a list of messages, but the check",
    ),
    "adapters without --lora": (["--rank", "4"], "go with --lora"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(tmp_path, mistake, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("def reward(:\n")
    chat = [{"role": "user", "content": "Hi"}]
    (tmp_path / "chats").write_text(
        "".join(json.dumps({"prompt": chat, "n": n}) + "\n" for n in range(3)) + PROMPTS
    )
    options, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as error:
        main(small_run("grpo", tmp_path)("run", *options))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


# Runs -------------------------------------------------------------------------------------------------------


def test_rewards_rise(tmp_path):
    """A model with random weights learns to write the letter e."""
    how = ["--dtype", "float32", "--group", "32", "--beta", "0.001", "--updates", "2", "--lr", "0.05"]
    main(small_run("grpo", tmp_path)("run", *how, "--eval-every", "60", steps=60))
    state = state_of(tmp_path / "run")
    (_, before), *_, (_, after) = state["evaluations"]
    assert after > 2.5 * before and sum(state["rewards"][-5:]) > 2.5 * sum(state["rewards"][:5])
    readme = (tmp_path / "run" / "README.md").read_text()
    assert f"| before | held-out reward {before:.3f} |" in readme and "    after:\n" in readme
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_adapters_are_trained_by_rewards(tmp_path):
    main(small_run("grpo", tmp_path)("run", "--dtype", "float32", "--lora", "--rank", "4", steps=6))
    trained = state_of(tmp_path / "run")["trained"]
    assert all(tensor.abs().max() > 0 for name, tensor in trained.items() if name.endswith("B"))
    base = {"device": "cpu", "dtype": torch.float32}
    model = open_checkpoint(tmp_path / "base", **base, adapter=tmp_path / "run").load()
    plain = open_checkpoint(tmp_path / "base", **base).load()
    tokens = torch.arange(12)[None]
    assert not adapters(model) and (model(tokens) - plain(tokens)).abs().max() > 1e-3


def test_without_its_adapters_a_model_is_its_reference(tmp_path):
    options = small_options(tmp_path, "--lora")
    base = tuning.open_base(options)
    model = load_model(base.folder)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        plain = model(tokens)
        adapters_page.attach(model, 4, 8.0)
        for layer in adapters(model).values():
            layer.B.data.normal_()
        changed = model(tokens)
        with switched_off(model):
            assert torch.equal(model(tokens), plain) and not torch.equal(changed, plain)
        assert torch.equal(model(tokens), changed)


def test_the_reference_of_adapters_is_without_them(tmp_path):
    options = small_options(tmp_path, "--lora")
    base = tuning.open_base(options)
    model = load_model(base.folder)
    adapters_page.attach(model, 4, 8.0)
    for layer in adapters(model).values():
        layer.B.data.normal_()
    run = rewarded.AdapterRun(model, base, rewarded.Run.read(options), options, tmp_path)
    tokens, counts, old, reference, _, _ = run.batch(0)
    counted = counts[:, 1:].bool()
    with torch.no_grad():
        table = load_model(base.folder)(tokens)[:, :-1].log_softmax(-1)
    expected = table.gather(-1, tokens[:, 1:, None])[..., 0][counted]
    torch.testing.assert_close(reference[counted], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(old[counted], expected, atol=1e-2)


def test_a_chat_model_is_asked_and_judged_by_its_answer(tmp_path):
    """Where there is a template, the prompt is a question."""
    command = small_run("grpo", tmp_path)
    (tmp_path / "base" / "chat_template.jinja").write_text(
        "{% for m in messages %}Q: {{ m.content }} A:{% endfor %}"
    )
    options = parse_options(command("run"))
    options.device, options.dtype = torch.device("cpu"), "float32"
    base = tuning.open_base(options)
    run = rewarded.Run(load_model(base.folder), base, rewarded.Run.read(options), options, tmp_path)
    prompt, ids = run.prompts.found[0]
    assert run.tokenizer.decode(ids) == f"Q: {prompt.row['prompt']} A:"
    written, _, texts = run.judged([run.prompts.found[0]], 0)
    assert texts == [run.tokenizer.decode(written[0])]
    assert find_reward("parses") is parses
