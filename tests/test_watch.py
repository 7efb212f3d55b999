"""What structure/watch finds in a run: stream, lens, parts of a logit, experts, slots, values of boxes."""

import base64
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

import show_structure
from conversion.convert import convert
from models import ENCODER_DECODER, inputs_of, kind_of, load_model
from models.utils.command_line import CHECKPOINTS
from models.utils.errors import UserError
from models.utils.tokenizer import load_tokenizer
from runs_ar.top import token_name
from structure.capture.capture import capture
from structure.page.page import inside
from structure.watch import numbers
from structure.watch.page import KEPT, MOST_BYTES, plan, rest
from structure.watch.stream import frozen_norm
from structure.watch.thought import Text, think
from structure.watch.values import rows_of, values_of
from tests import zoo

ROOT = Path(__file__).parent.parent
TOKENS = list(range(3, 14))


def text_for(model_name, model):
    if "images" in inputs_of(model_name):
        size = model.config.image_size
        return Text([], image=torch.randn(1, model.config.num_channels, size, size))
    return Text(TOKENS, source=TOKENS[:7] if kind_of(model_name) == ENCODER_DECODER else None)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root, done = tmp_path_factory.mktemp("converted"), {}

    def folder(name):
        if name not in done:
            done[name] = convert(CHECKPOINTS / name, out=root / name, progress=False)
        return done[name]

    return folder


# The stream -------------------------------------------------------------------------------------------------


@zoo.every_model
def test_the_parts_of_a_logit_add_up_to_it(model_name):
    """Of the two most probable answers at every place: the sum is the model's own logit."""
    model = zoo.small_model(model_name)
    thought = think(model, text_for(model_name, model))
    adds = [step.path for step in thought.steps if step.kind == "add" and step.layer]
    lists = {n: len(each) for n, each in model.named_children() if isinstance(each, torch.nn.ModuleList)}
    num_layers = sum(count for name, count in lists.items() if not name.startswith("encoder"))
    kinds = 3 if kind_of(model_name) == ENCODER_DECODER else 2
    assert len(adds) == kinds * num_layers == len(set(adds)), adds
    if model_name == "bert" or thought.logits is None:
        assert thought.parts == [], "a head with an activation is no sum"
        return
    scale = max(1.0, thought.logits.std().item())
    for ids, parts in thought.parts:
        expected = thought.logits.gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(sum(parts.values()), expected, atol=1e-4 * scale, rtol=0)
        assert set(adds) <= set(parts)
    assert len(thought.parts) == 2


@zoo.every_model
def test_the_head_is_the_model_s_own(model_name):
    model = zoo.small_model(model_name)
    text = text_for(model_name, model)
    thought = think(model, text)
    if thought.logits is None:
        return
    out = thought.out[0] if thought.out.dim() == 3 else thought.out
    torch.testing.assert_close(thought.logits[: len(out)], out.float(), atol=1e-4, rtol=0)
    layer, ids, probs, final = thought.lens[-1]
    best = thought.logits.softmax(dim=-1).topk(ids.shape[1])
    torch.testing.assert_close(probs, best.values, atol=1e-4, rtol=0)
    torch.testing.assert_close(final, best.values[:, 0], atol=1e-4, rtol=0)
    assert "hidden" not in vars(model), "the page's own hidden is back"


@pytest.mark.parametrize("name", ["tiny-llama-python", "tiny-gpt2-python", "tiny-neox-python"])
def test_the_logit_lens_is_the_oracle_s(name, converted):
    """transformers keeps the stream after each layer; norm and head on it are the lens."""
    model = load_model(converted(name), dtype=torch.float32, arranged=False)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32).eval()
    with torch.no_grad():
        states = oracle(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states[:-1]
        base = getattr(oracle, oracle.base_model_prefix)
        norm = next(each for n, each in base.named_children() if n in ("norm", "ln_f", "final_layer_norm"))
        expected = [oracle.get_output_embeddings()(norm(state))[0].softmax(dim=-1) for state in states]
    lens = think(model, Text(TOKENS)).lens
    with torch.no_grad():
        answers = oracle(torch.tensor([TOKENS])).logits[0].argmax(dim=-1, keepdim=True)
    assert [layer for layer, *_ in lens] == ["embedding", *(f"layers.{n}" for n in range(len(states)))]
    for (_, ids, probs, final), theirs in zip(lens, expected):
        torch.testing.assert_close(final, theirs.gather(1, answers)[:, 0], atol=1e-4, rtol=0)
        torch.testing.assert_close(probs, theirs.gather(1, ids), atol=1e-4, rtol=0)
        torch.testing.assert_close(probs, theirs.topk(5).values, atol=1e-4, rtol=0)


def test_what_is_no_norm_is_not_taken_for_one():
    x = torch.randn(5, 8)
    for norm in (torch.nn.LayerNorm(8), torch.nn.RMSNorm(8, eps=1e-6), torch.nn.LayerNorm(7)):
        x = torch.randn(5, norm.normalized_shape[0])
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
        with torch.no_grad():
            frozen = frozen_norm(norm, x, norm(x))
            torch.testing.assert_close(frozen.linear(x) + frozen.bias, norm(x), atol=1e-4, rtol=0)
    with torch.no_grad():
        assert frozen_norm(torch.nn.GELU(), x, torch.nn.GELU()(x)) is None
        assert frozen_norm(torch.nn.Linear(7, 7), x, torch.nn.Linear(7, 7)(x)) is None


def test_experts_are_the_oracle_s(converted):
    name = "tiny-moe-python"
    model = load_model(converted(name), dtype=torch.float32, arranged=False)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = oracle(torch.tensor([TOKENS]), output_router_logits=True).router_logits
    found = think(model, Text(TOKENS)).experts
    assert [each.path for each in found] == ["layers.0.ffn", "layers.1.ffn"]
    for each, theirs in zip(found, logits):
        probs = theirs.float().softmax(dim=-1).topk(each.chosen.shape[1])
        assert torch.equal(each.chosen, probs.indices)
        weights = probs.values / (
            probs.values.sum(dim=-1, keepdim=True) if model.config.normalize_weights else 1
        )
        torch.testing.assert_close(each.weights, weights, atol=1e-5, rtol=0)


@zoo.every_decoder
def test_slots_of_the_cache_fill_one_by_one(model_name):
    model = zoo.small_model(model_name)
    found = think(model, Text(TOKENS)).caches
    assert len(found) == model.config.num_layers
    window = getattr(model.config, "window", 99)
    rings = [each for each in found if each.num_slots < len(TOKENS)]
    assert bool(rings) == (model_name == "gemma3")
    for each in found:
        assert each.places == [n % each.num_slots for n in range(len(TOKENS))]
        assert each.num_slots >= min(window, len(TOKENS))


def strange_page(name):
    """A page that is no part of the zoo, loaded from its file."""
    path = ROOT / "tests" / "strange_pages" / "models" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"models.{name}", path)
    page = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    torch.manual_seed(0)
    config = page.Config(vocab_size=40, max_seq_len=32, d_model=16, num_layers=2, d_state=4, norm_eps=1e-5)
    model = page.Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return model


def test_how_far_a_state_reaches():
    """A state that forgets at once reaches no further than the token itself, one that keeps, back to all."""
    model = strange_page("recurrence")
    for bias, reaches_back in ((-30.0, False), (30.0, True)):
        for layer in model.layers:
            torch.nn.init.zeros_(layer.mixer.keep_proj.weight)
            torch.nn.init.constant_(layer.mixer.keep_proj.bias, bias)
        thought = think(model, Text(TOKENS))
        assert thought.attention == [] and thought.caches == []
        if not reaches_back:
            assert thought.reach == []
            continue
        assert [path for path, _ in thought.reach] == ["layers.0.mixer", "layers.1.mixer"]
        for _, reach in thought.reach:
            assert not reach.triu(1).any() and (reach[-1] > 0).all()
            assert reach.amax(dim=1).tolist() == [1.0] * len(TOKENS)
    zoo_model = zoo.small_model("llama")
    assert think(zoo_model, Text(TOKENS)).reach == [], "a feed-forward mixes no tokens"


# Values -----------------------------------------------------------------------------------------------------


@zoo.every_model
def test_every_box_has_the_tensor_that_it_stands_for(model_name):
    model = zoo.small_model(model_name)
    thought = think(model, text_for(model_name, model))
    box = capture(model_name, model.config)
    values = values_of(box, thought.recording)
    outputs = thought.recording.outputs
    for each in inside(box):
        for path, matrix in values.get(each.id, []):
            assert matrix.isfinite().any() and matrix.dim() == 2
            if each.members:  # a module: what its forward returned
                assert matrix.numel() == outputs[path][0][1].numel()
    expected = [
        each for each in inside(box) if rows_of(each.output) and each.role in ("linear", "norm", "attention")
    ]
    missing = [each.id for each in expected if each.id not in values and ".experts." not in each.id]
    assert len(missing) <= len(expected) // 4, missing


def test_values_of_operations(converted):
    """What the boxes of rotate and attention hold is what the heads were heard with."""
    model = load_model(converted("tiny-llama-python"), dtype=torch.float32, arranged=False)
    thought = think(model, Text(TOKENS))
    values = values_of(capture("llama", model.config), thought.recording)
    for n, heads in enumerate(thought.attention):
        q, k = (values[f"layers.0.attn:rotate{which}"][n] for which in ("", "#2"))
        assert q[0] == heads.path
        torch.testing.assert_close(q[1], heads.q.transpose(0, 1).flatten(1))
        torch.testing.assert_close(k[1], heads.k.transpose(0, 1).flatten(1))
        added = values["layers.0.attn"][n][1]
        torch.testing.assert_close(added, thought.steps[1 + 2 * n].added)


# As text ----------------------------------------------------------------------------------------------------


def codes(text):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).float()


def test_numbers_in_8_bits():
    probs = torch.rand(3, 7)
    found = (codes(numbers.probabilities(probs)) / 255) ** 2
    torch.testing.assert_close(found, probs.flatten(), atol=0.004, rtol=0)
    causal = torch.rand(2, 4, 4).tril()
    assert len(codes(numbers.triangle(causal))) == 2 * 10
    values = torch.tensor([-5.0, 0.0, 0.02, 3.0, float("nan"), float("inf")])
    said = numbers.signed(values)
    found = codes(said["data"])
    assert found[-2:].tolist() == [0, 0] and (said["least"], said["largest"]) == (-5, 3)
    scaled = (found[:4] - 128) / 127
    torch.testing.assert_close(scaled.sign() * scaled**2 * said["most"], values[:4], atol=0.03, rtol=0)


def test_the_rest_of_the_logits_serves_any_temperature():
    logits = 3 * torch.randn(4, 3000, generator=torch.manual_seed(0))
    best = logits.topk(KEPT).values
    counts, means = rest(logits, KEPT)
    assert counts.sum(dim=1).tolist() == [3000 - KEPT] * 4
    for temperature in (0.3, 1.0, 2.0):
        others = (counts * (means / temperature).exp()).sum(dim=1)
        found = (best[:, 0] / temperature).exp() / ((best / temperature).exp().sum(dim=1) + others)
        expected = (logits / temperature).softmax(dim=1).amax(dim=1)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_what_a_page_holds():
    small = plan(30, heads=48, numbers=2000, matrices=130)
    assert small == (30, 64, True)
    # SmolLM2-135M: 30 layers of 9 heads over 3 key heads of 64.
    assert plan(30, heads=270, numbers=30 * 12 * 64, matrices=30 * 22) == (30, 64, True)
    long = plan(10_000, heads=270, numbers=30 * 12 * 64, matrices=30 * 22)
    assert long.num_tokens < 200 and long.columns == 0 and not long.keeps_q_k
    assert 270 * long.num_tokens**2 * 4 / 3 <= MOST_BYTES


def test_tokens_that_are_no_text(converted):
    tokenizer = load_tokenizer(converted("tiny-llama-python"))
    names = [token_name(tokenizer, id) for id in range(tokenizer.vocab_size + 2)]
    assert "<s>" in names and "<0xE2>" in names and names[-1] == f"<{tokenizer.vocab_size + 1}>"
    assert all(names)


# The command ------------------------------------------------------------------------------------------------


def written(tmp_path, *options):
    path = tmp_path / "page.html"
    show_structure.main([*map(str, options), "--html", "--out", str(path)])
    text = path.read_text(encoding="utf-8")
    data = text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return text, json.loads(data)[0]["watch"]


def test_what_is_written_is_what_run_py_writes(tmp_path, converted, capsys):
    """The whole text at once says at each place what generation said there, with drafts and without."""
    options = [converted("tiny-llama-python"), "--prompt", "class Stack:", "--new-tokens", 8]
    _, plain = written(tmp_path, *options)
    _, looked_up = written(tmp_path, *options, "--lookup")
    assert plain["tokens"] == looked_up["tokens"] and len(plain["tokens"]) == plain["given"] + 8
    ids = torch.frombuffer(bytearray(base64.b64decode(plain["logits"]["ids"])), dtype=torch.int32)
    best = ids.view(len(plain["tokens"]), -1)[:, 0].tolist()
    assert best[plain["given"] - 1 : -1] == plain["tokens"][plain["given"] :]
    assert [token for each in looked_up["rounds"] for token in each["tokens"]] == plain["tokens"][
        plain["given"] :
    ]


def test_a_text_is_cut_and_html_stays_text(tmp_path, converted, capsys, monkeypatch):
    monkeypatch.setattr("structure.watch.page.MOST_TOKENS", 12)
    prompt = "</script><script>window.broken = 1</script>" * 20
    text, data = written(tmp_path, converted("tiny-gpt2-python"), "--prompt", prompt)
    assert len(data["rows"]) == 12 and "holds 12: it is cut there" in capsys.readouterr().err
    assert "holds 12: it is cut there" in data["dropped"][0]
    assert "<script>window" not in text
    assert "".join(data["rows"]).removeprefix("<s>").lstrip() in prompt


def test_nan_is_shown_as_such(tmp_path, converted, monkeypatch, capsys):
    folder, load = converted("tiny-llama-python"), load_model

    def broken(*args, **kwargs):
        model = load(*args, **kwargs)
        with torch.no_grad():
            model.layers[2].ffn.down_proj.weight[0, 0] = float("nan")
        return model

    monkeypatch.setattr("structure.watch.command.load_model", broken)
    _, data = written(tmp_path, folder, "--prompt", "def f", "--new-tokens", 3)
    assert data["broken"] == "layers.2.ffn" and data["rounds"] == [] and data["parts"] == []
    assert "nothing is written" in capsys.readouterr().err
    assert data["values"]["layers.0.ffn"]["of"]["layers.2.ffn"]["broken"] > 0
    assert data["values"]["layers.0.ffn"]["of"]["layers.1.ffn"]["broken"] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["tiny-llama-python", "--prompt", "x"], "goes with CHECKPOINT and --html"),
        (["--prompt", "x", "--html"], "goes with CHECKPOINT and --html"),
        (["tiny-llama-python", "--prompt", "", "--html"], "--prompt is empty"),
        (["tiny-llama-python", "--new-tokens", "0", "--html"], "give 1 or more"),
        (["tiny-llama-python", "--prompt", "x", "--lookup", "--html"], "give --new-tokens N too"),
        (["tiny-llama-python", "--prompt", "x", "--new-tokens", "900", "--html"], "give fewer"),
        (
            ["tiny-transformer-dates", "--prompt", "x", "--new-tokens", "3", "--lookup", "--html"],
            "leave them out",
        ),
        (["tiny-vit-digits", "--prompt", "x", "--html"], "reads images"),
        (["tiny-bert-python", "--prompt", "x", "--new-tokens", "3", "--html"], "does not write"),
        (["tiny-llama-python", "--image", "x.png", "--html"], "reads text"),
        (["llama-3-8b", "--prompt", "x", "--html"], "llama-3-8b"),
    ],
)
def test_what_makes_no_sense(options, message, tmp_path, capsys):
    with pytest.raises(UserError, match=message):
        show_structure.main([*options, "--out", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()
