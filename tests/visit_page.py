"""Does with a page all that the project does with one: the other half of tests/test_strange_pages.py.

    python -m tests.visit_page routed_decoder FOLDER        writes into FOLDER

It prints a JSON object: for each of the steps below null where it succeeded, {"refused": one sentence} where
the project says that it cannot, or {"error": traceback}. One process does it all, since torch takes seconds
to come up. The steps are those of a reader: convert, run, draft, quantize, draw, measure, train.
"""

import contextlib
import io
import json
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import run
import show_structure
from benchmarks.zoo import Eager, Speculative
from conversion.convert import convert, reverse
from conversion.tables import to_hf_config, to_hf_state
from models import config_to_dict, load_model
from models.utils.errors import UserError
from models.utils.tokenizer import load_tokenizer
from runs_ar.chat import Conversation
from runs_train import language_model
from tests import zoo
from tests.tiny_checkpoints import CHAT_TEMPLATE, VOCAB_SIZE, sentencepiece_model

STEPS = {}


def step(function):
    STEPS[function.__name__] = function
    return function


class Visit:
    """A page's small checkpoint, and a smaller one that drafts for it."""

    def __init__(self, model_name, folder):
        self.model_name, self.folder = model_name, folder
        self.checkpoint, self.draft = folder / "strange", folder / "strange-draft"
        self.config_name = zoo.configs_of(model_name)[0]

    def run(self, *options):
        """What run.py writes."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            run.main([*map(str, options), "--device", "cpu"])
        return out.getvalue()

    def write(self, *options):
        """The greedy continuation of a prompt by the checkpoint."""
        return self.run(
            self.checkpoint, "--prompt", "def f", "--temperature", 0, "--max-new-tokens", 12, *options
        )


@step
def converts(visit):
    """From the layout of its table to ours, and back to the bit."""
    tokenizer = sentencepiece_model()
    for folder, seed in (visit.checkpoint, 0), (visit.draft, 1):
        model = zoo.small_model(visit.model_name, seed, vocab_size=VOCAB_SIZE)
        folder.mkdir(parents=True)
        fields = config_to_dict(visit.model_name, model.config)
        theirs = to_hf_state(visit.model_name, fields, model.state_dict())
        save_file(theirs, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(to_hf_config(visit.model_name, fields)))
        (folder / "tokenizer.model").write_bytes(tokenizer)
        settings = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        settings |= {"tokenizer_class": "LlamaTokenizer", "chat_template": CHAT_TEMPLATE}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        convert(folder, model=visit.model_name, progress=False)
        loaded = load_model(folder).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
        back = reverse(folder, progress=False)
        again = load_file(back / "model.safetensors")
        assert again.keys() == theirs.keys()
        assert all(torch.equal(again[name], theirs[name]) for name in theirs)


@step
def runs(visit):
    visit.greedy = visit.write()
    assert visit.greedy.startswith("def f") and len(visit.greedy) > len("def f\n")


@step
def scores(visit):
    text = visit.folder / "text.txt"
    text.write_text("for n in range(3): print(n)\n" * 4)
    assert "perplexity" in visit.run(visit.checkpoint, "--score", text)


@step
def chats(visit):
    """An answer is the same whether the cache outlived the turn before, was left in a step, or is new."""
    model, tokenizer = load_model(visit.checkpoint), load_tokenizer(visit.checkpoint)

    def conversation(messages=()):
        chat = Conversation(model, tokenizer)
        chat.messages += messages
        return chat

    def interrupt(token):
        raise KeyboardInterrupt

    chat = conversation()
    for n in range(3):
        before = list(chat.messages)
        answer = "".join(chat.answer(f"say {n}", max_new_tokens=5))
        assert answer == "".join(conversation(before).answer(f"say {n}", max_new_tokens=5))
        if n == 1:
            with contextlib.suppress(KeyboardInterrupt):
                list(chat.answer("stop", max_new_tokens=5, on_token=interrupt))


@step
def drafts_by_lookup(visit):
    assert visit.write("--lookup") == visit.greedy


@step
def drafts_with_a_model(visit):
    assert visit.write("--draft", visit.draft) == visit.greedy
    assert visit.write("--draft", visit.checkpoint, "--num-draft-tokens", 2) == visit.greedy


@step
def quantizes_to_int8(visit):
    visit.write("--quantize", "int8")


@step
def is_drawn(visit):
    show_structure.main([visit.config_name, "--out", str(visit.folder / "picture.png")])
    assert (visit.folder / "picture.svg").stat().st_size > 10_000


@step
def has_a_page(visit):
    show_structure.main([visit.config_name, "--html", "--out", str(visit.folder / "page.html")])
    assert "tests/test_" in (visit.folder / "page.html").read_text(encoding="utf-8")


@step
def thinks(visit):
    """A text runs through it, with what it writes, on a page of its own."""
    page, asked = visit.folder / "thinks.html", ["--prompt", "def f(x)", "--new-tokens", "4", "--html"]
    show_structure.main([str(visit.checkpoint), *asked, "--lookup", "--out", str(page)])
    text = page.read_text(encoding="utf-8")
    assert '"first": false' in text and text.count('"kind": "add"') >= 2


@step
def has_a_table(visit):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        show_structure.main([visit.config_name, "--table"])
    assert "lm_head" in out.getvalue()


@step
def is_compared(visit):
    page = visit.folder / "compared.html"
    show_structure.main(["--compare", "gpt2", visit.config_name, "--html", "--out", str(page)])
    assert page.stat().st_size > 10_000


@step
def stands_in_the_tree(visit):
    show_structure.main(["--tree", "--out", str(visit.folder / "tree.png")])
    assert f"models/{visit.model_name}.py" in (visit.folder / "tree.svg").read_text(encoding="utf-8")


@step
def measures(visit):
    """As benchmark.py does in processes of its own."""
    subject = Eager(visit.checkpoint, None, "cpu", "float32")
    assert subject.load() > 0
    prompt = list(range(3, 10))
    made = subject.run([prompt], 5)
    assert len(made["tokens"][0]) == len(made["times"]) == 5
    assert len(subject.logits(prompt)) == VOCAB_SIZE
    pair = Speculative(
        visit.draft, 2, 0.8, folder=visit.checkpoint, threads=None, device="cpu", dtype="float32"
    )
    pair.load()
    assert pair.run([prompt], 5)["tokens"] == made["tokens"]


@step
def trains(visit):
    """A few steps, from nothing to a checkpoint that runs."""
    config, text = visit.folder / "config.json", visit.folder / "text.py"
    small = zoo.small_config(visit.model_name, vocab_size=VOCAB_SIZE, max_seq_len=32)
    config.write_text(json.dumps(zoo.fields_of(visit.model_name, small)))
    text.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    options = [
        "--config",
        config,
        "--data",
        text,
        "--out",
        visit.folder / "trained",
        "--vocab-size",
        VOCAB_SIZE,
    ]
    options += ["--steps", 4, "--warmup", 1, "--batch-size", 2, "--device", "cpu", "--dtype", "float32"]
    with contextlib.redirect_stdout(io.StringIO()):
        language_model.main([*map(str, options)])


def visit(model_name, folder):
    """{step: what became of it}."""
    seen, results = Visit(model_name, folder), {}
    for name, function in STEPS.items():
        results[name] = None
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                function(seen)
        except UserError as error:
            results[name] = {"refused": str(error)}
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(visit(sys.argv[1], Path(sys.argv[2]))))
