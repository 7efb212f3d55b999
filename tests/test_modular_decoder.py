"""The proof of models/modular_decoder.py: Llama, Qwen3 and Mixtral of components, and each of these alone."""

import dataclasses
import json
import re
from contextlib import contextmanager

import confection
import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conversion.convert import convert
from models import CONFIGS_FOLDER, build_model, config_from_dict, load_config, load_model
from models import llama as llama_page
from models import modular_decoder as page
from models import qwen3 as qwen3_page
from models.modular_decoder import (
    LMHead,
    PagedAttention,
    Registry,
    RMSNorm,
    SwiGLU,
    TransformerDecoder,
    TransformerDecoderBuilder,
    VocabEmbedding,
)
from models.utils.errors import UserError
from tests import test_llama, test_qwen3
from tests.decoder_proof import DecoderProof, random_tokens
from tests.model_proof import assert_close
from tests.oracle import redraw
from tests.shape_cases import Case, run_decoder

SCALING, PLAIN = test_llama.SCALING, {"rope_type": "default", "rope_theta": 100.0}


class Proof(DecoderProof):
    """Read where --model asks for this page; some fields are sections, and no checkpoint has norms after."""

    model_name = "modular_decoder"
    no_effect = {"max_seq_len": "the length that training reached; RoPE has no table that could end"}
    sections = []  # further changes of the oracle's config, inside of sections
    twin = None  # the page that reads the same checkpoints

    def convert(self, folder):
        convert(folder, model="modular_decoder", progress=False)

    def test_every_field_has_a_change(self, model):
        fields = {field.name for field in dataclasses.fields(model.config)}
        assert fields == {*self.changes, "prenorm"}

    def test_every_field_of_a_section(self, pair, tmp_path):
        for n, change in enumerate(self.sections):
            oracle = self.oracle(**change)
            model = self.zoo(oracle, tmp_path / str(n))
            assert model.config != pair[1].config, f"{change} did not change the config"
            inputs = self.inputs(model, 2, 29)
            assert_close(self.call(model, *inputs), self.call_oracle(oracle, *inputs))

    def test_logits_equal_those_of_the_page_that_has_no_components(self, pair, tmp_path):
        if self.twin is None:
            return
        oracle, model = pair
        oracle.save_pretrained(tmp_path)
        convert(tmp_path, progress=False)
        twin = load_model(tmp_path)
        assert type(twin) is self.twin.Model
        tokens = random_tokens(model, 2, 23)
        assert torch.equal(model(tokens), twin(tokens))
        assert model.state_dict().keys() == twin.state_dict().keys()


CHANGES = {
    "vocab_size": {"vocab_size": 89},
    "max_seq_len": {"max_position_embeddings": 50},
    "d_model": {"hidden_size": 48},
    "num_layers": {"num_hidden_layers": 1},
    "attention": {"num_attention_heads": 22},
    "feedforward": {"intermediate_size": 72},
    "norm": {"rms_norm_eps": 0.1},
    "tied_head": {"tie_word_embeddings": True},
}


class TestLlama(Proof):
    oracle_config, oracle_model = LlamaConfig, LlamaForCausalLM
    base = test_llama.TestLlama.base
    changes = CHANGES
    sections = [
        {"num_key_value_heads": 3},
        {"head_dim": 16},
        {"attention_bias": False},
        {"mlp_bias": False},
        {"rope_parameters": PLAIN},
        {"rope_parameters": {**SCALING, "rope_theta": 50.0}},
        {"rope_parameters": {**SCALING, "factor": 9.0}},
        {"rope_parameters": {**SCALING, "low_freq_factor": 0.5}},
        {"rope_parameters": {**SCALING, "high_freq_factor": 6.0}},
        {"rope_parameters": {**SCALING, "original_max_position_embeddings": 60}},
    ]
    twin = llama_page


class TestQwen3(Proof):
    oracle_config, oracle_model = Qwen3Config, Qwen3ForCausalLM
    base = {**test_qwen3.TestQwen3.base, "rope_parameters": PLAIN}
    changes = CHANGES
    sections = [
        {"num_key_value_heads": 3},
        {"head_dim": 16},
        {"rope_parameters": {**PLAIN, "rope_theta": 50.0}},
    ]
    twin = qwen3_page

    def test_yarn_is_refused_by_name(self, tmp_path):
        with pytest.raises(UserError, match="rope_type 'yarn'; models/modular_decoder.py implements"):
            self.zoo(self.oracle(rope_parameters=test_qwen3.YARN), tmp_path)


class TestMixtral(Proof):
    oracle_config, oracle_model = MixtralConfig, MixtralForCausalLM
    base = {
        **{name: value for name, value in TestLlama.base.items() if not name.endswith("bias")},
        "rope_parameters": PLAIN,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "experts_implementation": "eager",
    }
    changes = CHANGES
    sections = [{"num_local_experts": 4}, {"num_experts_per_tok": 3}]

    def test_a_token_reads_its_active_experts_and_no_others(self, model):
        cache = model.new_cache(1, 9)
        model(random_tokens(model, 1, 8), cache=cache)
        used = set()
        hooks = [
            expert.register_forward_hook(lambda module, inputs, out: used.add(module))
            for layer in model.layers
            for expert in layer.ffn.experts
        ]
        model(random_tokens(model, 1, 1), torch.tensor([[8]]), cache)
        for hook in hooks:
            hook.remove()
        assert len(used) == 2 * len(model.layers)

    def test_more_experts_than_there_are(self, tmp_path):
        oracle = self.oracle()
        oracle.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 6}))
        with pytest.raises(UserError, match="num_experts_per_tok is 6, where there are 5 experts"):
            self.convert(tmp_path)


# Three ways to the same model -------------------------------------------------------------------------------

CFG = """
[model]
@architecture = "TransformerDecoder"
num_layers = 2
max_length = 40
prenorm = "True"

[model.attention]
@attention = "PagedAttention"
in_dim = 24
num_heads = 4
head_dim = 10
num_query_groups = 2
rope_base = 1000
q_bias = "False"

[model.attention.k_norm]
@normalization = "RMSNorm"
in_dim = 10
eps = 0.001

[model.attention.q_norm]
@normalization = "RMSNorm"
in_dim = 10
eps = 0.001

[model.embedding]
@embedding = "VocabEmbedding"
num_embeddings = 61
embedding_dim = 24

[model.feedforward]
@feedforward = "SwiGLU"
in_dim = 24
hidden_dim = 40

[model.head]
@head = "LMHead"
in_dim = 24
out_dim = 61
bias = "False"

[model.norm]
@normalization = "RMSNorm"
in_dim = 24
eps = 0.001
"""


def config_of_cfg():
    norm = {"@normalization": "RMSNorm", "eps": 0.001}
    attention = {"@attention": "PagedAttention", "num_heads": 4, "head_dim": 10, "num_query_groups": 2}
    attention |= {"rope_base": 1000.0, "q_norm": {**norm, "in_dim": 10}, "k_norm": {**norm, "in_dim": 10}}
    fields = {"vocab_size": 61, "max_seq_len": 40, "d_model": 24, "num_layers": 2, "attention": attention}
    fields |= {"feedforward": {"@feedforward": "SwiGLU", "hidden_dim": 40}, "norm": norm}
    return config_from_dict(
        {"model": "modular_decoder", **fields, "prenorm": True, "tied_head": False}, "here"
    )


def by_the_builder():
    builder = TransformerDecoderBuilder(num_layers=2, max_length=40)
    builder.set_embedding(
        config='[embedding]\n@embedding = "VocabEmbedding"\nnum_embeddings = 61\nembedding_dim = 24'
    )
    builder.set_attention(config=CFG, section="model.attention")
    builder.set_feedforward(config='[f]\n@feedforward = "SwiGLU"\nin_dim = 24\nhidden_dim = 40', section="f")
    builder.set_norm(config='[norm]\n@normalization = "RMSNorm"\nin_dim = 24\neps = 0.001')
    builder.set_head(config='[head]\n@head = "LMHead"\nin_dim = 24\nout_dim = 61')
    return builder.build()


def by_constructors():
    norms = {name: RMSNorm(in_dim=10, eps=0.001) for name in ("q_norm", "k_norm")}
    return TransformerDecoder(
        num_layers=2,
        max_length=40,
        embedding=VocabEmbedding(num_embeddings=61, embedding_dim=24),
        attention=PagedAttention(24, num_heads=4, head_dim=10, num_query_groups=2, rope_base=1000.0, **norms),
        feedforward=SwiGLU(in_dim=24, hidden_dim=40),
        norm=RMSNorm(in_dim=24, eps=0.001),
        head=LMHead(in_dim=24, out_dim=61),
    )


def cfg_file(folder, text=CFG):
    (folder / "model.cfg").write_text(text)
    return folder / "model.cfg"


def test_all_ways_lead_to_the_same_model(tmp_path):
    name, config = config_of_cfg()
    model = build_model(name, config, device="cpu")
    model.init_weights()
    ways = {
        "a file": TransformerDecoder.from_config(cfg_file(tmp_path)),
        "its path as text": TransformerDecoder.from_config(str(cfg_file(tmp_path))),
        "a text": TransformerDecoder.form_config(CFG),
        "what was read": TransformerDecoder.from_config(confection.Config().from_str(CFG)),
        "another section": TransformerDecoder.from_config(CFG.replace("[model", "[m"), model_section="m"),
        "what Config writes": TransformerDecoder.from_config({"model": config.sections()}),
        "the builder": by_the_builder(),
        "constructors": by_constructors(),
    }
    tokens = random_tokens(model, 2, 11)
    for way, other in ways.items():
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(tokens), model(tokens)), way
        assert (other.config.vocab_size, other.config.max_seq_len) == (61, 40), way
        assert (other.config.d_model, other.config.num_layers) == (24, 2), way


def test_a_model_of_a_file_has_fresh_weights_or_none():
    model = TransformerDecoder.from_config(CFG)
    first, second = (layer.attn.q_proj.weight for layer in model.layers)
    assert not torch.equal(first, second) and first.std().item() == pytest.approx(0.02, rel=0.2)
    empty = TransformerDecoder.from_config(CFG, empty_init=True)
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_setup_and_compute_logits():
    model = TransformerDecoder.from_config(CFG)
    cache = model.setup(batch_size=3, dtype=torch.bfloat16)
    assert cache[1].k.shape == (3, 2, 40, 10) and cache[1].k.dtype == torch.bfloat16
    assert model.setup(num_slots=7, dtype=torch.float32)[0].v.shape == (1, 2, 7, 10)
    tokens = random_tokens(model, 2, 5)
    assert torch.equal(model.compute_logits(model.hidden(tokens)), model(tokens))


@pytest.mark.parametrize("path", sorted(CONFIGS_FOLDER.glob("*.cfg")), ids=lambda path: path.stem)
def test_the_files_of_configs_are_the_models_that_they_are_called_after(path):
    """The same tensors as those of the JSON of that name, the same epsilon, RoPE and context."""
    model, other = TransformerDecoder.from_config(path, empty_init=True), build_model(*load_config(path.stem))
    shapes, others = ({n: t.shape for n, t in each.state_dict().items()} for each in (model, other))
    assert shapes == others
    assert model.config.max_seq_len == other.config.max_seq_len
    assert (model.lm_head.weight is model.token_embed.weight) == other.config.tied_head
    frequencies = page.rope_frequencies(model.layers[0].attn, "cpu")
    if "modular" in path.stem:
        assert torch.equal(frequencies, page.rope_frequencies(other.layers[0].attn, "cpu"))
    else:
        rope_frequencies = (qwen3_page if "qwen3" in path.stem else llama_page).rope_frequencies
        assert torch.equal(frequencies, rope_frequencies(other.config, torch.device("cpu")))
        assert {norm.eps for norm in model.modules() if isinstance(norm, RMSNorm)} == {other.config.norm_eps}


def test_the_json_of_qwen3_says_what_the_cfg_says():
    config = load_config("modular-qwen3-0.6b")[1]
    cfg = confection.Config().from_disk(CONFIGS_FOLDER / "qwen3-0.6b.cfg")
    assert cfg == {"model": config.sections()}
    sparse = confection.Config().from_disk(CONFIGS_FOLDER / "modular-sparse-experts.cfg")
    assert sparse == {"model": load_config("modular-sparse-experts")[1].sections()}


@pytest.mark.parametrize("path", sorted(CONFIGS_FOLDER.glob("*.cfg")), ids=lambda path: path.stem)
def test_a_cfg_is_a_config_too(path):
    """What the zoo reads of it, written out again, is the file as `confection` reads it."""
    name, config = load_config(path)
    assert {"model": config.sections()} == confection.Config().from_disk(path)
    assert build_model(name, config).lm_head.out_features == config.vocab_size


def test_what_a_config_cannot_say(tmp_path):
    fields = "", "tied_head = true\nprenorm = false\n"
    texts = [CFG.replace('prenorm = "True"\n', text) for text in fields]
    defaults, told = (load_config(cfg_file(tmp_path, text))[1] for text in texts)
    assert (defaults.tied_head, defaults.prenorm, told.tied_head, told.prenorm) == (False, True, True, False)
    sampler = '\n[model.sampler]\n@sampler = "SimpleSampler"\n'
    for text in (CFG.replace('bias = "False"\n', "bias = true\n"), CFG + sampler):
        with pytest.raises(UserError, match="head or sampler is not the plain one"):
            load_config(cfg_file(tmp_path, text))
    with pytest.raises(UserError, match=r"model.cfg: \[model.norm\] unknown field 'epsilon'"):
        load_config(cfg_file(tmp_path, with_field(CFG, "model.norm", "eps", "epsilon")))
    with pytest.raises(UserError, match="nowhere.cfg: No such file"):
        load_config(tmp_path / "nowhere.cfg")


# A component of the reader's own ----------------------------------------------------------------------------


@contextmanager
def registry_of_this_test():
    before = {kind: dict(vars(Registry)[kind].known) for kind in page.KINDS}
    yield
    for kind, known in before.items():
        vars(Registry)[kind].known = known


def test_a_component_of_ten_lines_is_named_in_a_file():
    with registry_of_this_test():

        @Registry.normalization.register("LayerNorm")
        class LayerNorm(nn.Module):
            def __init__(self, in_dim: int, eps: float = 1e-5):
                super().__init__()
                self.norm = nn.LayerNorm(in_dim, eps)

            def forward(self, x):
                return self.norm(x)

        text = CFG.replace("RMSNorm", "LayerNorm")
        model = TransformerDecoder.from_config(text)
        assert type(model.final_norm) is LayerNorm and type(model.layers[1].attn.k_norm) is LayerNorm
        with pytest.raises(ValueError, match=r"norm has in_dim 23, where 24 features come in"):
            TransformerDecoder.from_config(with_field(text, "model.norm", "in_dim = 24", "in_dim = 23"))
        with pytest.raises(
            ValueError, match=r"\[model.norm\] unknown field 'epps'; LayerNorm has in_dim, eps"
        ):
            TransformerDecoder.from_config(with_field(text, "model.norm", "eps =", "epps ="))
    own, built_in = model, TransformerDecoder.from_config(text)
    assert type(built_in.final_norm) is page.LayerNorm
    built_in.load_state_dict({name.replace("norm.norm", "norm"): t for name, t in own.state_dict().items()})
    tokens = random_tokens(own, 2, 9)
    assert_close(own(tokens), built_in(tokens))


def test_the_component_in_the_readme(tmp_path, monkeypatch):
    readme = (CONFIGS_FOLDER.parent / "models" / "README.md").read_text()
    code = re.search(r"^```python\n(import torch\nfrom models.modular_decoder.*?)^```$", readme, re.M | re.S)[
        1
    ]
    (tmp_path / "mine.cfg").write_text(CFG.replace("RMSNorm", "DyT").replace("eps", "alpha"))
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    with registry_of_this_test():
        exec(compile(code, "models/README.md", "exec"), names)
    model = names["model"]
    assert type(model.layers[1].ffn_norm) is names["DyT"] and model.final_norm.alpha == 0.001
    assert model(random_tokens(model, 2, 5)).shape == (2, 5, 61)


# What is wrong with a file ----------------------------------------------------------------------------------


def with_field(text, section, old, new):
    """The text with something replaced inside one section."""
    start = text.index(f"[{section}]")
    end = text.find("\n[", start) % (len(text) + 1)
    assert text[start:end].count(old) == 1, f"{old} in [{section}]"
    return text[:start] + text[start:end].replace(old, new) + text[end:]


WRONG = [
    (
        "model.attention",
        "PagedAttention",
        "PagedAttn",
        "no attention is called 'PagedAttn'; registered: Paged",
    ),
    (
        "model.norm",
        "RMSNorm",
        "RMSNrom",
        "[model.norm] no normalization is called 'RMSNrom'; registered: RMSN",
    ),
    (
        "model.attention.k_norm",
        "RMSNorm",
        "Norm",
        "[model.attention.k_norm] no normalization is called 'Norm'",
    ),
    (
        "model",
        "TransformerDecoder",
        "Decoder",
        "no architecture is called 'Decoder'; registered: Transformer",
    ),
    ("model.head", "LMHead", "LMHaed", "[model.head] no head is called 'LMHaed'; registered: LMHead"),
    (
        "model.feedforward",
        "hidden_dim",
        "hiden_dim",
        "[model.feedforward] unknown field 'hiden_dim'; SwiGLU has",
    ),
    (
        "model.feedforward",
        "hidden_dim = 40",
        "",
        "[model.feedforward] hidden_dim is missing; SwiGLU needs it",
    ),
    ("model", "num_layers = 2", "", "[model] num_layers is missing"),
    ("model.embedding", "num_embeddings", "num_embedings", "unknown field 'num_embedings'"),
    (
        "model.attention",
        "num_heads = 4",
        'num_heads = "four"',
        "[model.attention] num_heads is 'four', where int",
    ),
    ("model.attention", "num_heads = 4", "num_heads = 4.0", "num_heads is 4.0, where int is expected"),
    ("model.attention", "num_heads = 4", "num_heads = true", "num_heads is True, where int is expected"),
    (
        "model.attention",
        "num_heads = 4",
        "num_heads = 0",
        "num_heads is 0, where a number above 0 is expected",
    ),
    ("model.attention", "rope_base = 1000", "rope_base = NaN", "rope_base is nan, where a number above 0"),
    (
        "model.attention",
        "head_dim = 10",
        "head_dim = [10]",
        "head_dim is [10], where NoneType or int is expected",
    ),
    ("model", 'prenorm = "True"', "prenorm = 1", "[model] prenorm is 1, where bool is expected"),
    ("model.norm", "eps = 0.001", "eps = -1", "[model.norm] eps is -1, where a number above 0 is expected"),
    (
        "model.norm",
        '@normalization = "RMSNorm"',
        "",
        "[model.norm] names no component, where @normalization is",
    ),
    ("model.norm", "@normalization", "@norm", "[model.norm] names norm, where @normalization is expected"),
    (
        "model.norm",
        '@normalization = "RMSNorm"',
        '@feedforward = "GELU"',
        "names feedforward, where @normaliz",
    ),
    ("model.norm", "eps = 0.001", "eps = ${x.y}", "the .cfg cannot be read"),
    ("model", "[model]", "[modle]", "the .cfg"),
    # What does not fit: an attention between 24 and 26 features, ...
    (
        "model.attention",
        "in_dim = 24",
        "in_dim = 26",
        "[model] attention has in_dim 26, where 24 features come in",
    ),
    (
        "model.feedforward",
        "in_dim = 24",
        "in_dim = 26",
        "[model] feedforward has in_dim 26, where 24 features",
    ),
    ("model.norm", "in_dim = 24", "in_dim = 26", "[model] norm has in_dim 26, where 24 features come in"),
    ("model.head", "in_dim = 24", "in_dim = 26", "[model] head is (61, 26), where embedding is (61, 24)"),
    ("model.head", "out_dim = 61", "out_dim = 60", "[model] head is (60, 24), where embedding is (61, 24)"),
    (
        "model.embedding",
        "embedding_dim = 24",
        "embedding_dim = 26",
        "has in_dim 24, where 26 features come in",
    ),
    (
        "model.attention.q_norm",
        "in_dim = 10",
        "in_dim = 12",
        "[model.attention] q_norm has in_dim 12, where 10",
    ),
    ("model.attention", "head_dim = 10", "head_dim = 9", "head_dim 9 be even"),
    (
        "model.attention",
        "num_query_groups = 2",
        "num_query_groups = 3",
        "num_query_groups 3 must divide num_heads",
    ),
]


@pytest.mark.parametrize(
    "section, old, new, message", WRONG, ids=[f"{new or 'no ' + old}" for _, old, new, _ in WRONG]
)
def test_what_is_wrong_with_a_file_is_said_in_a_line(section, old, new, message):
    for empty_init in (True, False):
        with pytest.raises(ValueError) as error:
            TransformerDecoder.from_config(with_field(CFG, section, old, new), empty_init=empty_init)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_or_a_section_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.cfg"):
        TransformerDecoder.from_config("nowhere.cfg")
    with pytest.raises(ValueError, match=r"no section \[decoder\]; there are: model"):
        TransformerDecoder.from_config(CFG, model_section="decoder")
    with pytest.raises(ValueError, match="the .cfg cannot be read: .*line"):
        TransformerDecoder.from_config(cfg_file(tmp_path, "num_layers = 2\n"))


def test_what_a_builder_lacks():
    builder = TransformerDecoderBuilder(num_layers=2, max_length=40).set_norm(CFG, "model.norm")
    with pytest.raises(ValueError, match=r"\[model\] embedding is missing; TransformerDecoder needs it"):
        builder.build()
    with pytest.raises(
        ValueError, match=r"\[model.norm\] names feedforward, where @normalization is expected"
    ):
        builder.set_norm(CFG, "model.feedforward").build()


def test_constructors_check_widths_too():
    parts = {
        "embedding": VocabEmbedding(61, 24),
        "attention": PagedAttention(24, num_heads=4),
        "head": LMHead(24, 61),
    }
    for norm, feedforward, message in [
        (page.LayerNorm(20), SwiGLU(24, 40), "norm has in_dim 20"),
        (RMSNorm(24), page.GELU(20, 40), "feedforward has in_dim 20"),
    ]:
        with pytest.raises(ValueError, match=message):
            TransformerDecoder(2, 40, **parts, norm=norm, feedforward=feedforward)
    with pytest.raises(ValueError, match="expert has in_dim 20, where 24"):
        page.MixtureOfExperts(24, SwiGLU(20, 40), 4, 2)
    with pytest.raises(ValueError, match="num_active_experts is 5, of num_experts 4"):
        page.MixtureOfExperts(24, SwiGLU(24, 40), 4, 5)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"attention": {"@attention": "Paged"}},
            "no attention is called 'Paged'; registered: PagedAttention",
        ),
        ({"attention": {}}, r"\[model.attention\] names no component"),
        ({"norm": {"@normalization": "RMSNorm", "epss": 1e-6}}, r"\[model.norm\] unknown field 'epss'"),
        ({"attention": {"@attention": "PagedAttention", "num_heads": 2**40}}, "num_heads is 1099511627776"),
        ({"attention": "PagedAttention"}, "'attention' is 'PagedAttention', where dict is expected"),
    ],
)
def test_a_config_in_json_that_is_wrong(change, message):
    fields = {"model": "modular_decoder", **vars(config_of_cfg()[1]), **change}
    with pytest.raises(UserError, match=message):
        build_model(*config_from_dict(fields, "here"))


# The components, against torch and transformers -------------------------------------------------------------


@pytest.mark.parametrize("prenorm", [True, False])
def test_layer_norm_gelu_and_biases_are_torchs_own_encoder(prenorm):
    """nn.TransformerEncoder under a causal mask, with biases everywhere and its norms before or after."""
    torch.manual_seed(0)
    D, H, f = 24, 4, 37
    layer = nn.TransformerEncoderLayer(D, H, f, 0.0, "gelu", 1e-3, batch_first=True, norm_first=prenorm)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(D, 1e-3) if prenorm else None, False)
    biases = dict.fromkeys(("q_bias", "k_bias", "v_bias", "o_bias"), True)
    ours = TransformerDecoder(
        num_layers=2,
        max_length=40,
        embedding=VocabEmbedding(61, D),
        attention=PagedAttention(D, H, rope_base=None, **biases),
        feedforward=page.GELU(D, f, up_bias=True, down_bias=True),
        norm=page.LayerNorm(D, 1e-3),
        head=LMHead(D, 61, bias=True),
        prenorm=prenorm,
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    names = {"norm1": "attn_norm", "norm2": "ffn_norm", "self_attn.out_proj": "attn.o_proj"}
    names |= {"linear1": "ffn.up_proj", "linear2": "ffn.down_proj"}
    state = dict(ours.state_dict())
    for name, tensor in theirs.state_dict().items():
        if "in_proj" in name:
            layer, ending = name.split("self_attn.in_proj_")
            state |= {f"{layer}attn.{x}_proj.{ending}": part for x, part in zip("qkv", tensor.chunk(3))}
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        state[f"final_{name}" if name.startswith("norm.") else name] = tensor
    ours.load_state_dict(state)
    tokens = random_tokens(ours, 3, 17)
    mask = nn.Transformer.generate_square_subsequent_mask(17)
    expected = ours.lm_head(theirs(ours.token_embed(tokens), mask=mask, is_causal=True))
    assert_close(ours(tokens), expected)
    cache = ours.new_cache(3, 17)
    ours(tokens[:, :9], cache=cache)
    assert_close(ours(tokens[:, 9:], torch.arange(9, 17).expand(3, -1), cache), expected[:, 9:])


def sparse(config, **pattern):
    attention = {"@attention": "SparseAttention", **pattern, "attention": config.attention}
    return page.Model(dataclasses.replace(config, attention=attention)).eval()


class TestSparse:
    """A window is Mistral's; with a cache and without, the same tokens are seen."""

    inputs, no_effect = DecoderProof.inputs, {}

    @pytest.fixture(scope="class")
    def mistral(self, tmp_path_factory):
        fields = {name: value for name, value in TestLlama.base.items() if not name.endswith("bias")}
        config = MistralConfig(
            **{**fields, "rope_parameters": PLAIN}, sliding_window=5, attn_implementation="eager"
        )
        return redraw(MistralForCausalLM(config))

    @pytest.fixture(scope="class")
    def model(self, mistral, tmp_path_factory):
        folder = tmp_path_factory.mktemp("mistral")
        mistral.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config = {**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        del config["sliding_window"]
        (folder / "config.json").write_text(json.dumps(config))
        convert(folder, model="modular_decoder", progress=False)
        whole = load_model(folder)
        model = sparse(whole.config, window=5)
        model.load_state_dict(whole.state_dict())
        with torch.no_grad():
            yield model

    def test_a_window_is_that_of_mistral(self, mistral, model):
        tokens = random_tokens(model, 2, 37)
        with torch.no_grad():
            assert_close(model(tokens), mistral(tokens).logits)

    test_cached_equals_full = DecoderProof.test_cached_equals_full
    test_going_back = DecoderProof.test_going_back_is_calling_with_smaller_positions
    test_ragged_batch_equals_alone = DecoderProof.test_ragged_batch_equals_alone
    test_no_look_ahead = DecoderProof.test_no_look_ahead
    test_exports_with_its_cache = DecoderProof.test_exports_with_its_cache


@pytest.mark.parametrize(
    "window, stride, num_global", [(1, None, None), (3, 4, None), (2, None, 3), (2, 5, 1)]
)
def test_sparse_masks_by_the_definition(window, stride, num_global):
    """Child et al. 2019, section 4.2 (strided), and Beltagy et al. 2020, section 3.1, token by token."""
    places = torch.tensor([[0, 1, 7, 8], [11, 2, 3, 19]])
    mask = page.causal_mask(places, 20, window, stride, num_global)
    assert mask.shape == (2, 1, 4, 20)
    for row, query in [(row, query) for row in range(2) for query in range(4)]:
        place = places[row, query].item()
        near = range(max(place - window + 1, 0), place + 1)
        far = range(place, -1, -stride) if stride else ()
        first = range(min(num_global or 0, place + 1))
        assert set(mask[row, 0, query].nonzero().flatten().tolist()) == {*near, *far, *first}


def test_without_options_the_mask_is_llamas():
    places = torch.tensor([[0, 5], [3, 9]])
    assert torch.equal(page.causal_mask(places, 12), llama_page.causal_mask(places, 12))


def test_a_strided_model_attends_by_its_mask():
    """The whole pass of one layer, against softmax over the scores that the mask leaves."""
    torch.manual_seed(0)
    config = config_of_cfg()[1]
    model = sparse(config, window=2, stride=3, num_global=1)
    attn, T = model.layers[0].attn, 11
    x, positions = torch.randn(2, T, 24), torch.arange(T).expand(2, T)
    context = attn.prepare(positions, None)
    q, k, v = (proj(x).view(2, T, -1, 10).transpose(1, 2) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    q, k = (page.rotated(part, context.cos, context.sin) for part in (attn.q_norm(q), attn.k_norm(k)))
    k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
    scores = (q @ k.mT / 10**0.5).masked_fill(~page.causal_mask(positions, T, 2, 3, 1), -torch.inf)
    expected = attn.o_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x, context, None), expected, rtol=1e-5, atol=1e-5)


def test_the_sampler_follows_the_softmax():
    torch.manual_seed(0)
    logits, count = torch.tensor([[1.0, 0.0, 2.0, -1.0, 1.5]]), 40_000
    sampler = Registry.sampler.get("SimpleSampler")()
    assert sampler(logits).tolist() == [2] and sampler(torch.randn(3, 7)).shape == (3,)
    drawn = torch.bincount(sampler(logits.expand(count, -1), temperature=0.7), minlength=5) / count
    probs = (logits[0] / 0.7).softmax(dim=-1)
    assert (drawn - probs).abs().max() < 5 * (probs.max() / count) ** 0.5
    best = torch.bincount(page.SimpleSampler(top_k=2)(logits.expand(999, -1), temperature=2.0), minlength=5)
    assert (best > 0).tolist() == [False, False, True, False, True]


def test_a_sampler_named_in_a_file():
    model = TransformerDecoder.from_config(CFG + '\n[model.sampler]\n@sampler = "SimpleSampler"\ntop_k = 3\n')
    assert model.sampler.top_k == 3
    with pytest.raises(ValueError, match=r"\[model.sampler\] top_k is 0"):
        TransformerDecoder.from_config(CFG + '\n[model.sampler]\n@sampler = "SimpleSampler"\ntop_k = 0\n')


# To Hugging Face --------------------------------------------------------------------------------------------


def test_a_decoder_that_hugging_face_does_not_have_is_not_written(tmp_path):
    from conversion.tables import to_hf_config

    config = {"model": "modular_decoder", **vars(config_of_cfg()[1])}
    assert to_hf_config("modular_decoder", config)["model_type"] == "qwen3"
    for change in (
        {"prenorm": False},
        {"norm": {"@normalization": "LayerNorm"}},
        {"feedforward": {"@feedforward": "GELU", "hidden_dim": 40}},
        {"attention": {"@attention": "SparseAttention", "window": 4, "attention": config["attention"]}},
        {"attention": {"@attention": "PagedAttention", "num_heads": 4, "q_bias": True}},
        {"attention": {"@attention": "PagedAttention", "num_heads": 4, "rope_base": None}},
    ):
        with pytest.raises(UserError, match="Hugging Face has no model_type for a decoder of"):
            to_hf_config("modular_decoder", {**config, **change})
    short = {"@attention": "PagedAttention", "num_heads": 4}
    assert to_hf_config("modular_decoder", {**config, "attention": short})["head_dim"] == 6


# Shapes -----------------------------------------------------------------------------------------------------


def shape_configs(module):
    norm = {"@normalization": "RMSNorm", "eps": 1e-5}
    attention = {"@attention": "PagedAttention", "num_heads": 78, "head_dim": 20, "num_query_groups": 13}
    normed = attention | {name: {**norm, "in_dim": 20} for name in ("q_norm", "k_norm")}
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 64}
    few = {"@attention": "SparseAttention", "window": 3, "stride": 4, "num_global": 1}
    gated = {"@feedforward": "SwiGLU", "hidden_dim": 56}
    experts = {"@feedforward": "MixtureOfExperts", "num_experts": 5, "num_active_experts": 3, "expert": gated}
    plain = {"@feedforward": "GELU", "hidden_dim": 56}
    layer_norm = {"@normalization": "LayerNorm"}
    for parts in (
        (normed, gated, norm),
        (attention | {"rope_scaling": scaling}, experts, norm),
        (few | {"attention": attention}, plain, layer_norm),
        (attention | {"rope_base": None}, plain, layer_norm),
    ):
        yield module.Config(63, 97, 31, 2, *parts, prenorm=parts[2] is norm, tied_head=parts[0] is normed)


def run_shapes(model, recorder, B, T, S, t, **letters):
    class WithLetters:
        def running(self, config, B, T, S):
            recorder.running(config, B=B, T=T, S=S, t=B * T, **letters)

    run_decoder(model, WithLetters(), B, T, S)
    model.sampler(torch.rand(B, model.config.vocab_size), temperature=1.0)
    type(model.sampler)(top_k=4)(torch.rand(B, model.config.vocab_size))


SIZES = {"B": 7, "T": 11, "S": 17, "H": 78, "K": 13, "d": 20, "f": 56, "E": 5, "A": 3, "t": 77}
# forward meets positions with T = 1 alone, where B is t.
TRUE_TOO = {("(B, T) or None", "(t, T) or None")}
SHAPES = Case(shape_configs, run_shapes, SIZES, same={("B", "T")}, true_too=TRUE_TOO)
