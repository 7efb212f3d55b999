"""The fine-tuning of decoders: what counts is what the template says, and only that is learned."""

import json
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from conversion.checkpoint import open_checkpoint
from conversion.convert import convert
from models import config_to_dict, load_model
from models.utils.errors import UserError
from models.utils.tokenizer import load_tokenizer
from runs_ar.chat import Conversation
from runs_train import chat_data, fine_tuning, tuning
from runs_train.chat_data import PLAIN_TEMPLATE, Batches, lay_out, read_corpus
from runs_train.expert_balance import Routers
from runs_train.sft import main
from runs_train.training_run import TrainingRun
from tests.training_runs import CHATS, CONFIGS, TEXT, main_of, small_base, small_run, state_of
from tests.zoo import every_decoder, small_config, small_model

# Templates that mark what the assistant says, for transformers to tell us; ours does not look at the marks.
CHATML = """{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
INST = """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
{% generation %}{{ ' ' + m.content | trim + eos_token }}{% endgeneration %}
{% else %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}{% endif %}{% endfor %}"""
ONE_LINE = """{{- bos_token }}{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}
{%- generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
SYSTEM_FIRST = (
    """{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"""
)
TEMPLATES = {
    "chatml": CHATML,
    "inst": INST,
    "one line": ONE_LINE,
    "a system of its own": SYSTEM_FIRST + CHATML,
}


def turns(*contents, system=None):
    roles = [role for _ in contents for role in ("user", "assistant")]
    begin = [{"role": "system", "content": system}] if system else []
    return begin + [{"role": role, "content": content} for role, content in zip(roles, contents)]


TALKS = {
    "one answer": turns("Hi", "Hello!"),
    "two answers": turns("What is 2 + 2?", "4", "And é 日本?", "I do not know.\n\nAsk again!"),
    "a question behind": turns("Hi", "Hello!", "What now?"),
    "spaces at its ends": turns(" What ? ", "  So\n", "\tx\n\n", " y "),
    "the same three times": turns("a", "a", "a", "a", "a", "a"),
    "with a system": turns("Hi", "user", "assistant", "assistant: user", system="Be brief."),
    "two answers in a row": [*turns("Hi", "Hello!"), {"role": "assistant", "content": "And more."}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small tokenizer of the kind that most chat models have."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    core.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


# Which tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_that_count_are_those_that_transformers_marks(folder, name, talk):
    ours, oracle = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ours.chat_template = TEMPLATES[name]
    marked = oracle.apply_chat_template(
        TALKS[talk], chat_template=TEMPLATES[name], return_dict=True, return_assistant_tokens_mask=True
    )
    ids, is_answer = lay_out(ours, TALKS[talk])
    assert ids == marked["input_ids"]
    assert [int(each) for each in is_answer] == marked["assistant_masks"] and 1 in marked["assistant_masks"]


def test_the_plain_template_counts_the_answer_and_its_end():
    tokenizer = load_tokenizer("checkpoints/tiny-llama-python")
    tokenizer.chat_template = PLAIN_TEMPLATE
    ids, is_answer = lay_out(tokenizer, turns("Hi", "Hello!", "x", "y"))
    said = [id for id, each in zip(ids, is_answer) if each]
    end = [tokenizer.eos_id]
    assert said == tokenizer.encode("Hello!", bos=False) + end + tokenizer.encode("y", bos=False) + end
    assert tokenizer.decode(ids).startswith("### user\nHi\n### assistant\nHello!\n### user\nx")


def test_without_a_token_that_ends_a_turn_its_last_text_counts(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ids, is_answer = lay_out(tokenizer, turns("Hi", "Hello!", "x"))
    said = [id for id, each in zip(ids, is_answer) if each]
    assert tokenizer.decode(said) == "Hello!\n"


def test_a_template_that_writes_early_answers_otherwise_names_the_message(folder):
    """As those do that leave out earlier thoughts; of the last answer they are there."""
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = CHATML.replace(
        "m.content + '<|im_end|>' }}{% endgen",
        "(m.content if loop.last else 'cut') + '<|im_end|>' }}{% endgen",
    )
    assert any(lay_out(tokenizer, turns("Hi", "Hello!"))[1])
    with pytest.raises(
        UserError, match="^message 2: the chat template writes .* otherwise once more messages follow"
    ):
        lay_out(tokenizer, turns("Hi", "Hello!", "x", "y"))


# Batches ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer():
    tokenizer = load_tokenizer("checkpoints/tiny-llama-python")
    tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def some(count):
    talks = [turns("x" * (n % 7 + 1), f"{n} and " * (n % 5 + 1)) for n in range(count)]
    return [chat_data.Conversation(messages, f"line {n}") for n, messages in enumerate(talks, 1)]


def test_every_conversation_is_read_once_in_a_pass(tokenizer):
    conversations = some(60)
    batches = Batches(conversations, tokenizer, 64, 200, seed=3)
    expected = sorted(
        (ids, [int(x) for x in mask]) for ids, mask in (lay_out(tokenizer, c.messages) for c in conversations)
    )
    orders = []
    for number in range(3):
        read = []
        for n in range(number * batches.per_pass, (number + 1) * batches.per_pass):
            tokens, is_answer = batches.batch(n)
            assert tokens.numel() <= 200
            lengths = is_answer.flip(1).cumsum(1).flip(1).bool().sum(1) + 1  # up to the last answer's "\n"
            read += [(t[:k].tolist(), a[:k].tolist()) for t, a, k in zip(tokens, is_answer, lengths.tolist())]
        orders.append(read)
        assert sorted(read) == expected
    assert orders[0] != orders[1] != orders[2]
    # A batch is a function of its number: asked for out of turn it is the same.
    again = Batches(conversations, tokenizer, 64, 200, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(again.batch(4), batches.batch(4)))
    assert 0 <= batches.share_of_pads() < 0.1


@every_decoder
def test_no_conversation_sees_another_nor_a_pad(tokenizer, model_name):
    """In its batch it has the logits that it has alone."""
    model = small_model(model_name, vocab_size=4096)
    batches = Batches(some(12), tokenizer, 64, 300, seed=0)
    for n in range(batches.per_pass):
        tokens, is_answer = batches.batch(n)
        with torch.no_grad():
            together = model(tokens)
            for row, said in enumerate(is_answer):
                length = said.nonzero().max() + 1
                alone = model(tokens[row : row + 1, :length])[0]
                torch.testing.assert_close(
                    together[row, :length], alone, atol=1e-5 * max(1, alone.std().item()), rtol=0
                )


def test_what_truncation_takes_is_counted(tokenizer):
    long = chat_data.Conversation(turns("x", "y " * 50), "line 1")
    lost = chat_data.Conversation(turns("x " * 50, "y"), "line 2")
    short = chat_data.Conversation(turns("x", "y"), "line 3")
    batches = Batches([long, lost, short], tokenizer, 32, 200, seed=0)
    whole = [sum(lay_out(tokenizer, talk.messages)[1]) for talk in (long, lost, short)]
    kept = sum(batches.batch(n)[1].sum().item() for n in range(batches.per_pass))
    assert (batches.num_cut, batches.num_left_out) == (2, 1)
    assert batches.num_lost == sum(whole) - kept and len(batches.ids) == 2
    with pytest.raises(UserError, match="no answer of the assistant's begins within 32 tokens"):
        Batches([lost], tokenizer, 32, 200, seed=0)


# Runs -------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_transformers(tokenizer, tmp_path):
    """Which leaves out the labels that are -100."""
    options = fine_tuning_options(tmp_path)
    base = tuning.open_base(options)
    run = fine_tuning.Run(load_model(base.folder), base, read_corpus(options.data), options, tmp_path)
    run.model.eval()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=4096, n_positions=64, n_embd=16, n_layer=2, n_head=2, n_inner=32)
    ).eval()
    theirs.load_state_dict({f"{name}": tensor for name, tensor in hf_state(run).items()}, strict=False)
    for n in range(2):
        tokens, is_answer = batch = run.batch(n)
        labels = tokens.masked_fill(~is_answer.bool(), -100)
        with torch.no_grad():
            ours, expected = run.loss(batch), theirs(tokens, labels=labels).loss
        assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
        assert run.num_predictions(batch) == (labels[:, 1:] >= 0).sum()


def hf_state(run):
    from conversion.tables import to_hf_state

    return to_hf_state("gpt2", run.base.fields, run.model.state_dict())


def fine_tuning_options(root):
    from runs_train.sft import parse_options

    options = parse_options(small_run("sft", root)("run", "--dtype", "float32"))
    options.device = torch.device("cpu")
    return options


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that learned to say one thing, and what it printed."""
    root = tmp_path_factory.mktemp("finished")
    lines = "".join(
        json.dumps({"prompt": f"Say it, {n}.", "completion": "Good day."}) + "\n" for n in range(40)
    )
    config = CONFIGS["sft"] | {"dropout": 0.0, "d_model": 32}
    arguments = small_run("sft", root, config=config, data=lines)
    main(arguments("run", "--dtype", "float32", "--eval-every", "30", "--lr", "0.01", steps=90))
    return root / "run"


def test_it_learns_what_is_said(finished):
    state = state_of(finished)
    (_, before), *_, (_, after) = state["evaluations"]
    assert before == pytest.approx(8.3, abs=0.3) and after < 0.1
    # The questions are held out; the answers before the first step are kept.
    assert set(state["answers"][1]) == {"Good day."} != set(state["answers"][0])
    readme = (finished / "README.md").read_text()
    assert "| Good day. | Good day. |" in readme and "truncation | none, at 64 tokens" in readme
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_result_chats(finished):
    """In its own format, which is now the checkpoint's; transformers lays it out alike."""
    convert(finished)
    base = open_checkpoint(finished, dtype=torch.float32)
    talk = Conversation(base.load(), base.tokenizer)
    assert "".join(talk.answer("Say it, 1234.", max_new_tokens=30)) == "Good day."
    oracle = transformers.AutoTokenizer.from_pretrained(finished)
    messages = turns("Hi", "Hello!", "x")
    theirs = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert theirs == base.tokenizer.render_chat(messages)
    config = transformers.GenerationConfig.from_pretrained(finished)
    assert config.eos_token_id == [2] and not config.do_sample


def test_the_base_is_left_as_it_is(tmp_path):
    """Its weights are mapped from the file where they are fp32 already."""
    command = small_run("sft", tmp_path)
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    main(command("run", steps=3))
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


def test_another_template_is_another_run(tmp_path):
    command = small_run("sft", tmp_path)
    main(command("run", steps=3))
    (tmp_path / "own.jinja").write_text(PLAIN_TEMPLATE.replace("###", "%%%"))
    with pytest.raises(UserError, match="that run was started with template_sha256"):
        main(command("run", "--template", tmp_path / "own.jinja", steps=3))
    main(command("run", "--restart", "--template", tmp_path / "own.jinja", steps=3))
    assert "%%%" in (tmp_path / "run" / "chat_template.jinja").read_text()
    (tmp_path / "base" / "model.safetensors").unlink()
    small_base(tmp_path / "base", CONFIGS["sft"] | {"d_ff": 48})
    with pytest.raises(UserError, match="that run was started with base_sha256"):
        main(command("run", "--template", tmp_path / "own.jinja", steps=3))


@pytest.mark.parametrize("page", ["sft", "dpo", "grpo"])
def test_experts_are_kept_busy(tmp_path, page, monkeypatch):
    """As in pretraining: a term that moves routers, and leaves the loss what it is."""
    config = small_config("qwen3_moe", vocab_size=4096)
    command = small_run(page, tmp_path, config=config_to_dict("qwen3_moe", config))
    seen = {}

    def look(run):
        found = []
        hooks = [
            layer.ffn.router.register_forward_hook(lambda router, inputs, logits: found.append(logits))
            for layer in run.model.layers
        ]
        run.model.train()
        batch = run.batch(0)
        losses = []
        for number in range(2):
            found.clear()
            losses.append(run.loss(batch))
            weights = [layer.ffn.router.weight for layer in run.model.layers]
            grads = torch.autograd.grad(losses[-1], weights, retain_graph=True)
            if number == 0:
                expected = sum(load_balancing_loss_func((each,), 5, 2) for each in found) / len(found)
                with_term, expected = grads, torch.autograd.grad(expected, weights)
                monkeypatch.setattr(Routers, "gradient", lambda routers: 0.0)
        assert losses[0].item() == losses[1].item() and hooks
        for ours, plain, term in zip(with_term, grads, expected):
            torch.testing.assert_close(ours - plain, 0.01 * term, atol=1e-7, rtol=1e-3)
        seen["it"] = True
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingRun, "train_step", look)
    with pytest.raises(KeyboardInterrupt):
        main_of(page)(command("run", "--dtype", "float32"))
    assert seen


# The data ---------------------------------------------------------------------------------------------------


def test_the_standard_library_is_asked_about(monkeypatch):
    """Every question once; the answer is the function's own."""
    modules = [
        chat_data.Document(f"{m.__name__}.py", Path(m.__file__).read_text()) for m in (shutil, textwrap)
    ]
    modules.append(chat_data.Document("json/__init__.py", Path(json.__file__).read_text()))
    monkeypatch.setattr(chat_data, "split_documents", lambda data: (modules[:2], [modules[0], modules[2]]))
    corpus = read_corpus("stdlib")
    asked = {m[0]["content"]: m[1]["content"] for m, _ in corpus.train + corpus.held_out}
    line = shutil.copytree.__doc__.partition("\n")[0]
    assert asked["What does shutil.copytree do?"] == line and "What does json.dumps do?" in asked
    assert asked["What does textwrap.TextWrapper.fill do?"] == "fill(text : string) -> string"
    assert len(asked) == len(corpus.train) + len(corpus.held_out)
    assert not [question for question in asked if "._" in question]


def test_both_forms_of_a_line(tmp_path):
    messages = json.dumps({"messages": turns("Hi 1", "Hello!"), "source": "somewhere"})
    pair = json.dumps({"prompt": "Hi 2", "completion": "Hello!"})
    (tmp_path / "data").write_text(CHATS + messages + "\n\n" + pair + "\n")
    corpus = read_corpus(tmp_path / "data")
    found = [c.messages for c in corpus.train + corpus.held_out]
    assert turns("Hi 1", "Hello!") in found and turns("Hi 2", "Hello!") in found and len(found) == 32


CALL = {"role": "user", "content": "x"}
BAD_LINES = {
    "no JSON": ("{", "data, line 31: is no JSON"),
    "no object": ("[1]", "line 31: has neither messages"),
    "other fields": ('{"text": "x"}', "line 31: has neither messages"),
    "a prompt alone": ('{"prompt": "x"}', "line 31: has neither messages"),
    "messages that are none": ('{"messages": "x"}', "line 31: has neither messages"),
    "a message that is none": ('{"messages": ["x"]}', "line 31: message 1 has the role None; known: system,"),
    "an unknown role": (
        json.dumps({"messages": [CALL, {"role": "bot", "content": "x"}]}),
        "line 31: message 2 has the role 'bot'; known: system,",
    ),
    "no content": (
        json.dumps({"messages": [CALL, {"role": "assistant"}]}), "line 31: message 2 has no content, which",
    ),
    "a content that is empty": ('{"prompt": "x", "completion": " "}', "line 31: message 2 has no content"),
    "a number": ('{"prompt": "x", "completion": 3}', "line 31: message 2 has no content"),
    "no answer": (json.dumps({"messages": [CALL]}), "line 31: is no question with an answer"),
    "no question": (json.dumps({"messages": turns("x", "y")[1:]}), "line 31: is no question with an answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_wrong_is_named(tmp_path, name):
    line, message = BAD_LINES[name]
    (tmp_path / "data").write_text(CHATS + line + "\n")
    with pytest.raises(UserError, match=message.replace("(", "\\(")) as error:
        read_corpus(tmp_path / "data")
    assert "\n" not in str(error.value)


MISTAKES = {
    "no checkpoint": (["--checkpoint", ""], "--checkpoint is empty"),
    "an unknown checkpoint": (["--checkpoint", "tiny-lama"], "tiny-lama: no such checkpoint"),
    "a BERT": (["--checkpoint", "tiny-bert-python"], "a bert is a one-pass model; sft trains a decoder"),
    "no data": (["--data", "nowhere"], "nowhere: cannot be read"),
    "an empty file": (["--data", "empty"], "empty: is empty; --data takes"),
    "blank lines": (["--data", "blank"], "--data blank: 0 conversations, too few"),
    "too long a context": (["--context", "65"], "--context 65 is longer than the model's max_seq_len, 64"),
    "too short a one": (["--context", "4"], "no answer of the assistant's begins within 4 tokens"),
    "no template": (["--template", "nowhere"], "nowhere: cannot be read"),
    "a template that needs a field": (
        ["--template", "needs"], "line 1: the chat template refuses these messages: .* 'name'",
    ),
    "a broken template": (["--template", "broken"], "the chat template is broken at line 1"),
    "too large a batch": (["--batch-tokens", "100000000000"], "the logits of a batch take .* free"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(tmp_path, mistake, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("")
    (tmp_path / "blank").write_text("\n \n")
    (tmp_path / "needs").write_text("{% for m in messages %}{{ m.name.upper() + m.content }}{% endfor %}")
    (tmp_path / "broken").write_text("{% for %}")
    options, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as error:
        main(small_run("sft", tmp_path)("run", *options))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
