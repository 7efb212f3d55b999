"""What show_structure.py captures of a model, against the model itself: tensors, shapes, lines of source."""

import ast
from functools import cache
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import models
from conversion.tables import to_hf_state
from models import MODEL_NAMES, build_model, config_from_dict, config_to_dict, load_config
from models.utils.errors import UserError
from structure.capture.capture import capture
from structure.capture.sizes import Sizes, letters_of_numbers, letters_of_specs
from structure.capture.source import page_of_class, shapes_in
from structure.capture.trace import trace
from structure.facts import evaluate, terms_of, walk
from tests import zoo

PROJECT = Path(__file__).parents[1]
# Every model, and what its config can change in the picture.
SUBJECTS = zoo.affordable_subjects() | {
    "llama": ("tiny-llama-python", {}),
    "llama-biases": ("llama-3.1-8b", {"qkv_bias": True, "d_ff": 1000, "head_dim": 64, "num_layers": 3}),
    "gpt2": ("tiny-gpt2-python", {}),
    "gpt_neox": ("tiny-neox-python", {}),
    "gpt_neox-sequential": ("pythia-70m", {"parallel_residual": False, "attn_bias": False}),
    "transformer_lm": ("transformer-lm-15m", {}),
    "transformer_lm-no-rope": ("transformer-lm-15m", {"rope_base": None, "tied_head": False}),
    "bert": ("tiny-bert-python", {}),
    "bert-pretraining": ("bert-base-cased", {"num_layers": 2}),
    "bert-sequence": ("tiny-bert-python", {"head": "sequence", "pooler": True, "num_labels": 3}),
    "vision_transformer": ("tiny-vit-digits", {}),
    "vision_transformer-pooler": ("tiny-vit-digits", {"pooler": True, "num_labels": None}),
    "transformer": ("tiny-transformer-dates", {}),
    "transformer-rope": ("tiny-transformer-dates", {"positions": "rope", "cross_downsample": 3}),
    "transformer-alibi": ("tiny-transformer-dates", {"positions": "alibi", "window": 5}),
}


def subject(name):
    """(model name, Config)."""
    config, changes = SUBJECTS[name]
    return config_from_dict({**config_to_dict(*load_config(config)), **changes}, name)


@cache
def captured(name):
    return capture(*subject(name))


def boxes(box):
    return [each for each, _ in walk(box)]


def box_called(root, identity):
    return next(box for box in boxes(root) if box.id == identity)


every = pytest.mark.parametrize("name", SUBJECTS)


def test_every_model_is_a_subject():
    assert {subject(name)[0] for name in SUBJECTS} == set(MODEL_NAMES)


# The tensors ------------------------------------------------------------------------------------------------


def tensors_of(box, around=()):
    """(name in the whole model, shape, Hugging Face's names) of all tensors: those of each folded layer."""
    around = (*around, box)
    for ours, shape, theirs in box.weights:
        names = [ours]
        # From the inside: the experts of the layer that was kept, then all layers.
        for folded in (outer for outer in around[::-1] if outer.repeat > 1):
            kept = folded.members[0] + "."
            names = [name.replace(kept, f"{member}.", 1) for name in names for member in folded.members]
        for name in names:
            yield name, shape, theirs
    for child in box.children:
        yield from tensors_of(child, around)


@every
def test_every_parameter_is_in_one_box(name):
    model = build_model(*subject(name))
    found = list(tensors_of(captured(name)))
    shapes = {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    assert {ours: shape for ours, shape, _ in found} == shapes
    # The one that stands twice is the table of an encoder-decoder, which each side reads.
    twice = {ours for ours, _, _ in found if sum(ours == other for other, _, _ in found) > 1}
    assert twice == (
        {"token_embed.weight"} if name.startswith("transformer") and "_lm" not in name else set()
    )


@every
def test_parameters_are_counted_once(name):
    root = captured(name)
    assert root.parameters == sum(parameter.numel() for parameter in build_model(*subject(name)).parameters())
    for box in boxes(root):
        inner = sum(child.parameters * child.repeat for child in box.children)
        assert box.parameters >= inner
        assert box.tied_to == "" or box_called(root, box.tied_to).parameters > 0


def test_a_tied_head_says_so():
    assert box_called(captured("gpt2"), "lm_head").tied_to == "token_embed"
    assert box_called(captured("gpt2"), "lm_head").parameters == 0
    assert box_called(captured("gpt_neox-sequential"), "lm_head").tied_to == ""


@pytest.mark.parametrize("name", [name for name in SUBJECTS if name != "transformer_lm-no-rope"])
@pytest.mark.filterwarnings("ignore")
def test_hugging_faces_names_are_those_that_are_written(name):
    """The names of all boxes together are those that --reverse writes."""
    model_name, config = subject(name)
    if name in ("llama-biases", "transformer-rope", "transformer-alibi"):
        pytest.skip("no checkpoint has this")
    model = build_model(model_name, config)
    state = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    written = set(to_hf_state(model_name, config_to_dict(model_name, config), state))
    weights = [weight for box in boxes(captured(name)) for weight in box.weights]
    named = {theirs for _, _, names in weights for theirs in names}
    assert named <= written
    of_first_layers = {
        theirs for theirs in written if not any(part not in "0" for part in numbers_in(theirs))
    }
    assert of_first_layers <= named


def numbers_in(name):
    return [part for part in name.split(".") if part.isdigit()]


# The shapes -------------------------------------------------------------------------------------------------

CALL = {"B": 2, "T": 5, "S": 7, "N": 12}


def run_and_record(model):
    """{path: shapes of the results of each call}, of the model's call with the sizes of CALL."""
    shapes = {}

    def hook(path):
        return lambda module, inputs, output: shapes.setdefault(path, []).append(tuple(output.shape))

    for path, module in model.named_modules():
        module.register_forward_hook(hook(path))
    config = model.config
    tokens = torch.ones(CALL["B"], CALL["T"], dtype=torch.long)
    positions = torch.arange(CALL["T"]).expand_as(tokens)
    with torch.no_grad():
        if hasattr(model, "encode"):
            source = torch.ones(CALL["B"], CALL["N"], dtype=torch.long)
            model.decode(tokens, positions, model.new_cache(model.encode(source), CALL["S"]))
        elif hasattr(model, "new_cache"):
            model(tokens, positions, model.new_cache(CALL["B"], CALL["S"]))
        elif hasattr(config, "image_size"):
            model(torch.zeros(CALL["B"], config.num_channels, config.image_size, config.image_size))
        else:
            model(tokens)
    return shapes


def numbers_of(shape):
    """A shape with the letters of CALL filled in."""
    return tuple(evaluate(terms_of([number]), **CALL) for number in shape.numbers)


@every
def test_shapes_are_those_of_a_run(name):
    """What the boxes of modules put out, in numbers, is what the modules put out when they run.

    Of an expert all but the rows: how many tokens choose it depends on their values.
    """
    if name in ("bert-pretraining", "llama-biases"):
        pytest.skip("the same as a smaller one")
    shapes = run_and_record(build_model(*subject(name), device="cpu").eval())
    compared = 0
    for box in boxes(captured(name)):
        path, _, call = box.id.partition("#")
        if path in shapes and box.output:
            rows = 1 if ".experts." in path else 0
            assert numbers_of(box.output)[rows:] == shapes[path][int(call or 1) - 1][rows:], box.id
            compared += 1
    assert compared > 10


@every
def test_letters_fit_the_numbers(name):
    """Letters of a shape, read as a shape comment, are fulfilled by the numbers of the shape."""
    model_name, config = subject(name)
    page = page_of_class(type(build_model(model_name, config)))
    known = {letter: getattr(config, field) for field, letter in page.letters().items()}
    known = {letter: value for letter, value in known.items() if type(value) is int}
    shapes = [edge.shape for box in boxes(captured(name)) for edge in box.edges]
    shapes += [box.output for box in boxes(captured(name)) if box.output]
    lettered = [shape for shape in shapes if shape.letters]
    # A product, such as B*T, has a letter only where the page gives it one.
    assert len(lettered) > 0.7 * sum("*" not in str(shape.numbers) for shape in shapes)
    for shape in lettered:
        if not shape.numbers:
            assert shape.letters == "()"
            continue
        numbers = numbers_of(shape)
        assert letters_of_specs(shapes_in(shape.letters), numbers, shape.numbers, known), shape
        named = zip(shape.letters.strip("()").split(", "), shape.numbers)
        assert all(letter == number for letter, number in named if number in CALL), shape


def test_grouped_query_attention_shows_its_heads():
    attn = box_called(captured("llama-biases"), "layers.0.attn")
    assert attn.title == "32 query heads, 8 key/value heads of 64"
    shapes = {(edge.source, edge.target): edge.shape for edge in attn.edges}
    assert shapes["layers.0.attn.q_proj", "layers.0.attn:rotate"].letters == "(B, H, T, d)"
    assert shapes["layers.0.attn.k_proj", "layers.0.attn:rotate#2"].numbers == ("B", 8, "T", 64)
    assert shapes["layers.0.attn:cache", "layers.0.attn:attention"].letters == "(B, K, S, d)"
    assert shapes["layers.0.attn.v_proj", "layers.0.attn:cache"].letters == "(B, K, T, d)"


def test_a_letter_without_a_field_goes_where_its_number_is():
    """T of an image, in comments of some lines, is T in the lines without one."""
    root = captured("vision_transformer")
    tokens = box_called(root, "pos_embed").output.numbers[1]
    assert isinstance(tokens, int)
    up = box_called(root, "layers.0.ffn.up_proj").output
    assert (up.letters, up.numbers[1]) == ("(B, T, f)", tokens)


def test_a_number_of_two_letters_has_none():
    assert letters_of_numbers(("B", "T", 8), {"D": 8, "f": 8}) == ""
    assert letters_of_numbers(("B", "T", 8), {"D": 8, "M": 8, "L": 8}) == "(B, T, D)"
    assert letters_of_numbers((8, 4), {"D": 4, "M": 8}) == "(M, D)"


def test_sizes_are_found_again():
    sizes = Sizes(subject("llama")[1], [256, 4096])
    assert sizes.numbers((sizes["B"], sizes["T"], 256)) == ("B", "T", 256)
    assert sizes.numbers((7 * sizes["B"] * sizes["S"],)) == ("7*B*S",)
    assert sizes.numbers((sizes["N"] // 4, 5 * sizes["N"] // 3)) == ("N/4", "5*N/3")
    assert sizes.term(sizes["N"] // 4) == (0.25, "N")
    assert sizes.numbers((sizes["S"] + 1,)) == ("S+1",)
    assert sizes.terms(6 * sizes["B"] * (sizes["S"] + 1)) == [(6, "B*S"), (6, "B")]
    assert sizes["T"] <= 512


# The way through --------------------------------------------------------------------------------------------


def spine(box):
    """The labels of the boxes that the residual stream runs through, in order."""
    after = {edge.source: edge.target for edge in box.edges if edge.residual}
    labels = {child.id: child.label for child in box.children}
    at = next(edge.source for edge in box.edges if edge.residual and edge.source.startswith("in"))
    way = []
    while at != "out":
        at = after[at]
        way.append(labels.get(at, at))
    return way[:-1]


DECODER = ["token_embed", "Layer", "final_norm", "lm_head"]
POST_NORM = ["add", "attn_norm", "add", "ffn_norm"]
SPINES = {
    "llama": (DECODER, ["add", "add"]),
    "llama-biases": (DECODER, ["add", "add"]),
    "gpt2": (["token_embed", "add", *DECODER[1:]], ["add", "add"]),
    "gpt_neox": (DECODER, ["add", "add"]),
    "gpt_neox-sequential": (DECODER, ["add", "add"]),
    "transformer_lm": (DECODER, ["add", "add"]),
    "transformer_lm-no-rope": (DECODER, ["add", "add"]),
    "bert": (["token_embed", "add", "add", "embed_norm", "Layer", "lm_head"], POST_NORM),
    "bert-pretraining": (["token_embed", "add", "add", "embed_norm", "Layer", "lm_head"], POST_NORM),
    "bert-sequence": (
        ["token_embed", "add", "add", "embed_norm", "Layer", "pooler", "classifier"],
        POST_NORM,
    ),
    "vision_transformer": (
        ["unfold", "patch_embed", "concat", "add", "Layer", "final_norm", "classifier"],
        ["add", "add"],
    ),
}


@zoo.every_decoder
def test_the_residual_stream_of_any_decoder(model_name):
    root = captured(model_name)
    whole = spine(root)
    assert whole[0] == "token_embed" and whole[-3:] == ["Layer", "final_norm", "lm_head"]
    for layer in (child for child in root.children if child.label == "Layer"):
        assert set(spine(layer)) == {"add"}


@pytest.mark.parametrize("name", SPINES)
def test_the_residual_stream(name):
    root = captured(name)
    whole, layer = SPINES[name]
    assert spine(root) == whole
    assert spine(next(child for child in root.children if child.repeat > 1)) == layer


@pytest.mark.parametrize("name", ["transformer", "transformer-rope", "transformer-alibi"])
def test_the_residual_streams_of_encoder_and_decoder(name):
    root = captured(name)
    encoder, decoder = root.children
    assert (encoder.label, decoder.label) == ("encoder", "decoder")
    embed = ["token_embed", "multiply"] + ["add"] * (name == "transformer")
    shorter = ["shorten"] if name == "transformer-rope" else []
    assert spine(encoder) == [*embed, "EncoderLayer", *shorter]
    assert spine(decoder) == [*embed, "DecoderLayer", "lm_head"]
    assert spine(next(child for child in encoder.children if child.repeat > 1)) == POST_NORM
    layer = next(child for child in decoder.children if child.repeat > 1)
    assert spine(layer) == ["add", "attn_norm", "add", "cross_norm", "add", "ffn_norm"]
    # The memory goes to cross-attention, whose keys and values are made once.
    cross = next(child for child in layer.children if child.label == "cross_attn")
    assert {edge.target for edge in layer.edges if edge.source == "in:encoder"} == {cross.id}
    assert {box.label for box in boxes(layer) if box.once} == {"k_proj", "v_proj"}


def test_parallel_branches_read_the_same():
    def sources(name):
        layer = box_called(captured(name), "layers.0")
        return {edge.source for edge in layer.edges if edge.target == "layers.0.ffn_norm"}

    assert sources("gpt_neox") == {"in"}
    assert sources("gpt_neox-sequential") == {"layers.0:add"}


@every
def test_edges_join_boxes_that_are_there_and_never_run_in_a_circle(name):
    for box in boxes(captured(name)):
        ids = [child.id for child in box.children]
        for edge in box.edges:
            assert edge.source in ids or edge.source == "in" or edge.source.startswith("in:")
            assert edge.target in ids or edge.target == "out"
        before = {identity: {e.source for e in box.edges if e.target == identity} for identity in ids}
        placed = set()
        while ready := [each for each in ids if each not in placed and not before[each] & set(ids) - placed]:
            placed |= set(ready)
        assert placed == set(ids)


@every
def test_ids_are_unique(name):
    ids = [box.id for box in boxes(captured(name))]
    assert len(ids) == len(set(ids))


def test_what_does_not_run_is_there_without_edges():
    root = captured("bert-pretraining")
    idle = [child for child in root.children if "not run here" in child.title]
    assert [child.id for child in idle] == ["pooler", "next_sentence_head"]
    assert not any(child.id in (edge.source, edge.target) for child in idle for edge in root.edges)


# The source -------------------------------------------------------------------------------------------------


def text_of(source):
    lines = (PROJECT / source.file).read_text().splitlines()
    return "\n".join(lines[source.first - 1 : source.last])


# How an operation is written, where it is not by its name.
WRITTEN = {
    "add": "+",
    "sub": "-",
    "multiply": "*",
    "matmul": "@",
    "divide": "/",
    "floor_divide": "//",
    "index": "[",
    "concat": "cat",
    "kv_up": "k_up|v_up",  # its two halves
    "sinks": "column",  # a view of them
    "pos_embed": "pos",  # through self.positions(), in one
    "relu": "activation",
    "silu": "F.silu|self.activation",
    "token_embed": "self.token_embed",
}


@every
def test_the_lines_of_a_box_have_the_call(name):
    for box in boxes(captured(name)):
        if not box.sources:
            assert box.label == "model" or "not run here" in box.title
            continue
        first = text_of(box.sources[0])
        if box.role == "cache":
            assert "cache.write" in first or "past.write" in first
        elif box.role == "mask":
            assert "mask" in first or "real" in first
        elif box.label == "Layer" or box.repeat > 1:
            assert "layer(" in first or ".experts." in box.id and "expert(" in first
        elif box.label in ("encoder", "decoder"):
            assert f"def {box.label[:-1]}" in text_of(box.definition)
        elif box.definition and text_of(box.definition).startswith("def "):
            assert text_of(box.definition).split("(")[0].removeprefix("def ") in first
        else:
            written = WRITTEN.get(box.label, box.label).split("|")
            assert any(call in first for call in written), (box.id, first)


@every
def test_definitions_begin_with_their_name(name):
    for box in boxes(captured(name)):
        if box.definition:
            assert text_of(box.definition).startswith(("class ", "def ", "    def "))
            ast.parse(dedent(text_of(box.definition)))


def test_equations_come_from_docstrings():
    root = captured("llama")
    assert "eq. 6" in box_called(root, "layers.0.ffn").doc
    assert "Cosine and sine" in box_called(root, "model:rope").doc
    assert root.doc.startswith("Llama 3")


# Any other model --------------------------------------------------------------------------------------------

ODD = '''"""A decoder that no file of the zoo is like: layers of two kinds, norms on q and k, and no tables.

Shapes: B batch, T positions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    vocab_size: int  # V: tokens
    max_seq_len: int  # M: context
    d_model: int  # D: width
    num_layers: int  # L: of both kinds


class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.d_model)
        kinds = [Layer, Layer, Mixer, Layer, Layer, Layer]
        self.layers = nn.ModuleList(kind(config.d_model, 0.5 * (n == 5)) for n, kind in enumerate(kinds))
        self.final_norm = nn.RMSNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size)

    def forward(
        self,
        tokens: Tensor,  # (B, T)
    ) -> Tensor:
        x = self.token_embed(tokens)  # (B, T, D)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.final_norm(x))  # (B, T, V)


class Layer(nn.Module):
    def __init__(self, d_model: int, share: float):
        super().__init__()
        self.share = share
        self.norm = nn.RMSNorm(d_model)
        self.qk_norm = nn.RMSNorm(d_model)
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.gain = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k = self.qk_norm(self.q_proj(y)), self.qk_norm(self.k_proj(y))
        out = F.scaled_dot_product_attention(q, k, self.v_proj(y), is_causal=True)  # (B, T, D)
        return x + self.gain * squash(out) + self.share * y


class Mixer(nn.Module):
    """Each token looks at the one before it."""

    def __init__(self, d_model: int, share: float):
        super().__init__()
        self.conv = nn.Conv1d(d_model, d_model, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.mT).mT[:, : x.shape[1]]


def squash(x: Tensor) -> Tensor:
    return x.tanh() * 0.5 + x.sigmoid()
'''


@pytest.fixture
def odd(tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(ODD)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    monkeypatch.setattr(models, "MODEL_NAMES", [*MODEL_NAMES, "odd"])
    fields = {"model": "odd", "vocab_size": 50, "max_seq_len": 64, "d_model": 24, "num_layers": 6}
    return config_from_dict(fields, "odd")


def test_a_new_model_has_its_diagram(odd):
    root = capture(*odd)
    layers = [
        (child.label, child.repeat, child.members) for child in root.children if child.id.startswith("layers")
    ]
    assert layers == [
        ("Layer", 2, ("layers.0", "layers.1")),
        ("Mixer", 1, ("layers.2",)),
        ("Layer", 2, ("layers.3", "layers.4")),
        # Of the same class and the same shapes, but with another setting.
        ("Layer", 1, ("layers.5",)),
    ]
    assert spine(root) == ["token_embed", "Layer", "Mixer", "Layer", "Layer", "final_norm", "lm_head"]
    assert root.parameters == sum(parameter.numel() for parameter in build_model(*odd).parameters())
    layer = box_called(root, "layers.3")
    labels = [child.label for child in layer.children]
    # A norm that runs twice is two boxes; its weights are those of the first.
    assert labels.count("qk_norm") == 2
    assert "squash" in labels and "gain" in labels and "attention" in labels
    twice = [child for child in layer.children if child.label == "qk_norm"]
    assert [child.parameters for child in twice] == [24, 0]
    conv = box_called(root, "layers.2.conv")
    assert conv.flops and conv.output.numbers[0] == "B"
    assert (layer.repeat, spine(layer)) == (2, ["add", "add"])


@pytest.fixture
def branching(odd, tmp_path):
    """An answer that depends on a weight's value, which nothing on the meta device has."""
    text = ODD.replace("self.lm_head(self.final_norm(x))", "self.lm_head(x if x.sum() > 0 else -x)")
    (tmp_path / "branching.py").write_text(text)
    models.MODEL_NAMES.append("branching")
    return config_from_dict({**config_to_dict(*odd), "model": "branching"}, "branching")


def test_a_model_that_cannot_be_recorded_is_one_line(branching, capfd):
    line = ODD.splitlines().index("        return self.lm_head(self.final_norm(x))  # (B, T, V)") + 1
    with pytest.raises(UserError, match=rf"branching.py, line {line}: torch.export cannot record") as error:
        capture(*branching)
    assert "\n" not in str(error.value) and capfd.readouterr().err == ""


# Masks ------------------------------------------------------------------------------------------------------


def attends(name):
    """{id of a box: its rows} of all masks that say something."""
    return {box.id: box.attends for box in boxes(captured(name)) if box.attends}


CAUSAL = tuple("1" * (n + 1) + "0" * (9 - n) for n in range(6))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "transformer_lm"])
def test_a_mask_says_who_attends_to_whom(name):
    """Six tokens of a prompt to those up to their own, of ten slots; the token after them to seven."""
    assert attends(name) == {"model:mask": (CAUSAL, ("1111111000",))}


def test_the_masks_of_an_encoder_decoder():
    """A source without pads is seen by all; what is laid over scores is no mask of its own."""
    assert attends("transformer") == {
        "encoder:mask": (("111111",), ("111111",)),
        "decoder:mask": (CAUSAL, ("1111111000",)),
    }


def test_a_window_reaches_no_further():
    """Five tokens back and no more: the seventh sees the second, and no longer the first."""
    assert attends("transformer-alibi")["decoder:window_mask"] == (CAUSAL, ("0111111000",))


# The size of the work ---------------------------------------------------------------------------------------


def test_a_huge_model_is_traced_as_one_layer():
    model_name, config = load_config("llama-3.1-405b")
    traced = trace(build_model(model_name, config))
    assert traced.folds.runs["layers.0"].repeat == 126
    assert len(traced.ops) < 200
    assert all(parameter.is_meta for parameter in traced.model.parameters())
