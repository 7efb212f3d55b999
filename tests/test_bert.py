"""The proof of models/bert.py, and of how the many forms of published BERTs become it."""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from conversion.convert import convert, inspect, reverse
from conversion.tables import from_hf_config
from models import build_model, create_model, load_config, load_model
from models.utils.errors import UserError
from tests.model_proof import ModelProof, assert_close, tolerance
from tests.shape_cases import Case

BASE = {
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "type_vocab_size": 3,
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 88,
    "layer_norm_eps": 1e-4,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.2,
    "attn_implementation": "eager",
}
HEADS = {
    "BertModel": None,
    "BertForMaskedLM": "masked_lm",
    "BertForPreTraining": "pretraining",
    "BertForNextSentencePrediction": "next_sentence",
    "BertForSequenceClassification": "sequence",
    "BertForTokenClassification": "tokens",
}


def new_oracle(architecture="BertForMaskedLM", **changes):
    """A model of transformers, every parameter drawn so that no mistake hides and the logits are near 1."""
    labels = {} if "id2label" in changes else {"num_labels": 5}
    oracle = getattr(transformers, architecture)(BertConfig(**{**BASE, **labels, **changes})).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in oracle.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            parameter.data = noise * parameter.shape[1] ** -0.5 * (1 if "embeddings" in name else 1.5)
        else:
            parameter.data = 0.3 * noise + (0 if name.endswith("bias") else 1)
    return oracle


def new_inputs(config, batch_size, size, seed=0):
    """Tokens, segments, and a mask that leaves each row another number of them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (batch_size, size), generator=generator)
    segments = torch.randint(config.num_segments, (batch_size, size), generator=generator)
    lengths = size - 7 * torch.arange(batch_size)[:, None]
    return tokens, segments, torch.arange(size) < lengths


def ask(oracle, tokens, segments, mask):
    """The oracle's answers: logits of its head, pooled vector, and so on, in its order."""
    return oracle(tokens, token_type_ids=segments, attention_mask=mask.long())


def zoo(oracle, folder):
    oracle.save_pretrained(folder)
    convert(folder, progress=False)
    return load_model(folder)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


class TestBert(ModelProof):
    model_name = "bert"
    changes = {
        "vocab_size": {"vocab_size": 89},
        "max_seq_len": {"max_position_embeddings": 50},
        "num_segments": {"type_vocab_size": 2},
        "d_model": {"hidden_size": 48},
        "num_layers": {"num_hidden_layers": 1},
        "num_heads": {"num_attention_heads": 5},
        "d_ff": {"intermediate_size": 70},
        "norm_eps": {"layer_norm_eps": 0.1},
        "activation": {"hidden_act": "relu"},
        "dropout": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "pooler": {"architecture": "BertForPreTraining"},
        "head": {"architecture": "BertForNextSentencePrediction"},
        "num_labels": {"architecture": "BertForTokenClassification", "num_labels": 4},
    }
    no_effect = {"dropout": "acts in training only, where test_dropout compares it with the oracle"}

    def oracle(self, **changes):
        return new_oracle(**changes)

    def inputs(self, model, batch_size, size, seed=0):
        return new_inputs(model.config, batch_size, size, seed)

    def call_oracle(self, oracle, *inputs):
        return ask(oracle, *inputs)[0]

    # The other activation -----------------------------------------------------------------------------------

    def test_gelu_new_is_neither_gelu_nor_relu(self, pair, tmp_path):
        oracle = new_oracle(hidden_act="gelu_new")
        model = zoo(oracle, tmp_path)
        inputs = self.inputs(model, 2, 29)
        assert_close(model(*inputs), ask(oracle, *inputs).logits)
        assert (model(*inputs) - pair[1](*inputs)).abs().max() > 10 * tolerance(model(*inputs))

    # Padding, segments, both sides --------------------------------------------------------------------------

    def test_a_padded_batch_equals_each_text_alone(self, model):
        """Rows of 37, 30 and 23 tokens: what stands behind them changes nothing, whatever it is."""
        tokens, segments, mask = self.inputs(model, 3, 37)
        batch = model(tokens, segments, mask)
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = model(tokens[row : row + 1, :length], segments[row : row + 1, :length])[0]
            assert_close(batch[row, :length], alone)
        tokens[~mask] = (tokens[~mask] + 1) % model.config.vocab_size
        assert_close(model(tokens, segments, mask)[mask], batch[mask])
        assert (model(tokens, segments)[1] - batch[1]).abs().max() > 100 * tolerance(batch), "the mask counts"

    def test_what_is_left_out_has_a_default(self, model):
        tokens, segments, mask = self.inputs(model, 2, 20)
        everything = torch.ones_like(mask)
        assert_close(model(tokens, segments), model(tokens, segments, everything))
        assert_close(model(tokens), model(tokens, torch.zeros_like(segments), everything))
        assert (model(tokens) - model(tokens, segments)).abs().max() > 0.1

    def test_every_token_sees_both_sides(self, model):
        tokens, _, _ = self.inputs(model, 1, 30)
        changed = tokens.clone()
        changed[0, 17] = (changed[0, 17] + 1) % model.config.vocab_size
        moved = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
        assert (moved > 0.01).all()

    def test_positions_end_with_the_table(self, model):
        model(self.inputs(model, 1, 64)[0])
        with pytest.raises(ValueError, match="65 tokens are more than the 64 of the position table"):
            model(self.inputs(model, 1, 65)[0])

    def test_the_logits_of_some_tokens_only(self, model):
        """lm_head takes any choice of hidden states; training picks the masked ones."""
        inputs = self.inputs(model, 2, 20)
        picked = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) < 0.15
        assert 0 < picked.sum() < 20
        assert_close(model.lm_head(model.hidden(*inputs)[picked]), model(*inputs)[picked])

    # Training, export ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize("architecture", HEADS)
    def test_dropout_stands_where_the_oracle_has_it(self, architecture, tmp_path):
        """In training mode the same seed drops the same features, since both draw in the same order."""
        oracle = new_oracle(architecture)
        model = zoo(oracle, tmp_path)
        inputs = self.inputs(model, 2, 20)
        oracle.train(), model.train()
        torch.manual_seed(7)
        expected = ask(oracle, *inputs)[0]
        torch.manual_seed(7)
        actual = model(*inputs)
        assert_close(actual, expected)
        assert not torch.allclose(actual, model(*inputs), atol=0.1)

    def test_exports(self, model):
        inputs = self.inputs(model, 2, 12)
        program = torch.export.export(model, inputs, strict=False)
        assert_close(program.module()(*inputs), model(*inputs))
        program = torch.export.export(model, inputs[:1], strict=False)
        assert_close(program.module()(inputs[0]), model(inputs[0]))

    def test_every_parameter_of_pretraining_is_trained(self):
        """Both answers, since forward gives the first of them only."""
        model = create_model(
            "bert-base-uncased", num_layers=1, d_model=12, num_heads=3, d_ff=20, vocab_size=30
        )
        with torch.enable_grad():
            hidden = model.hidden(*self.inputs(model, 2, 9))
            answers = model.lm_head(hidden), model.next_sentence_head(model.pooler(hidden))
            sum(answer.square().mean() for answer in answers).backward()
        idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert [name for name in idle if not name.endswith("k_proj.bias")] == []


# The heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", HEADS)
def test_every_head_has_the_oracles_answers(architecture, tmp_path):
    oracle = new_oracle(architecture)
    model = zoo(oracle, tmp_path)
    inputs = new_inputs(model.config, 3, 31)
    expected = ask(oracle, *inputs)
    assert model.config.head == HEADS[architecture]
    assert_close(model(*inputs), expected[0])
    hidden = model.hidden(*inputs)
    if architecture == "BertModel":
        assert_close(model.pooler(hidden), expected.pooler_output)
    if architecture == "BertForPreTraining":
        assert_close(model.next_sentence_head(model.pooler(hidden)), expected.seq_relationship_logits)


@pytest.mark.parametrize("architecture", HEADS)
def test_back_at_hugging_face_it_is_the_same_to_the_bit(architecture, tmp_path):
    """transformers finds every tensor that it wants and none that it does not, and gives the same answers."""
    oracle = new_oracle(
        architecture, id2label={0: "no", 1: "yes", 2: "so"}, label2id={"no": 0, "yes": 1, "so": 2}
    )
    zoo(oracle, tmp_path)
    folder = reverse(tmp_path, progress=False)
    assert_same_tensors(load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors"))

    again, loading = type(oracle).from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    inputs = new_inputs(load_model(tmp_path).config, 2, 16)
    for actual, expected in zip(ask(again, *inputs).values(), ask(oracle, *inputs).values(), strict=True):
        assert torch.equal(actual, expected)
    if load_model(tmp_path).config.num_labels:
        assert again.config.id2label == oracle.config.id2label and again.config.label2id["so"] == 2
    converted = (tmp_path / "converted/config.json").read_text()
    assert (convert(folder, progress=False) / "config.json").read_text() == converted


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(
    "problem", ["single_label_classification", "multi_label_classification", "regression", None]
)
def test_labels_come_along(problem, tmp_path):
    names = ["NEGATIVE", "NEUTRAL", "POSITIVE"] if problem != "regression" else ["score"]
    oracle = new_oracle(
        "BertForSequenceClassification",
        id2label=dict(enumerate(names)),
        label2id={name: n for n, name in enumerate(names)},
        problem_type=problem,
    )
    model = zoo(oracle, tmp_path)
    inputs = new_inputs(model.config, 2, 16)
    assert_close(model(*inputs), ask(oracle, *inputs).logits)
    labels = json.loads((tmp_path / "converted/labels.json").read_text())
    assert labels == {"labels": names, "problem_type": problem}
    theirs = BertConfig.from_pretrained(reverse(tmp_path, progress=False))
    assert (theirs.id2label, theirs.problem_type) == (oracle.config.id2label, problem)


def test_labels_without_names(tmp_path):
    """Ten labels, named by transformers, in the order of their numbers and not of their spelling."""
    write(tmp_path, new_oracle("BertForTokenClassification", num_labels=11), id2label=None, num_labels=11)
    labels = json.loads((convert(tmp_path, progress=False) / "labels.json").read_text())["labels"]
    assert labels == [f"LABEL_{n}" for n in range(11)]
    write(tmp_path, new_oracle("BertForTokenClassification", num_labels=11))
    assert json.loads((convert(tmp_path, progress=False) / "labels.json").read_text())["labels"] == labels
    write(tmp_path, new_oracle("BertForSequenceClassification", num_labels=2), id2label=None, num_labels=None)
    labels = json.loads((convert(tmp_path, progress=False) / "labels.json").read_text())["labels"]
    assert labels == ["LABEL_0", "LABEL_1"]


# As published -----------------------------------------------------------------------------------------------


def state_of(oracle):
    """All that old versions stored: tied tensors too, and the positions."""
    state = {name: tensor.clone() for name, tensor in oracle.state_dict().items()}
    prefix = "" if isinstance(oracle, BertModel) else "bert."
    state[f"{prefix}embeddings.position_ids"] = torch.arange(64)[None]
    return state


def write(folder, oracle, state=None, **fields):
    """A checkpoint with other tensors and other config fields than the oracle's; None leaves a field out."""
    theirs = json.loads(oracle.config.to_json_string())
    theirs = {**theirs, "architectures": [type(oracle).__name__], **fields}
    theirs = {name: value for name, value in theirs.items() if fields.get(name, "") is not None}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(theirs))
    save_file(state or dict(oracle.named_parameters()), folder / "model.safetensors")
    return folder


def old_names(state):
    ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in ends.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    return state


def test_the_published_bert(tmp_path):
    """bert-base-uncased: names of 2018, both heads, the tied matrix twice; its config has BertForMaskedLM."""
    oracle = new_oracle("BertForPreTraining")
    state = old_names(state_of(oracle))
    assert {"bert.embeddings.LayerNorm.gamma", "cls.predictions.transform.LayerNorm.beta"} < set(state)
    assert {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"} < set(state)
    write(tmp_path, oracle, state, architectures=["BertForMaskedLM"])
    convert(tmp_path, progress=False)
    model = load_model(tmp_path)
    assert (model.config.head, model.config.pooler) == ("pretraining", True)
    inputs = new_inputs(model.config, 3, 31)
    expected = ask(oracle, *inputs)
    assert_close(model(*inputs), expected.prediction_logits)
    pooled = model.pooler(model.hidden(*inputs))
    assert_close(model.next_sentence_head(pooled), expected.seq_relationship_logits)

    # Neither stored twice nor lost on the way back.
    back = load_file(reverse(tmp_path, progress=False) / "model.safetensors")
    assert_same_tensors(back, {name: tensor.data for name, tensor in oracle.named_parameters()})


@pytest.mark.parametrize("tied", ["decoder.weight", "decoder.bias"])
def test_what_is_stored_twice_must_be_equal(tied, tmp_path):
    oracle = new_oracle()
    state = state_of(oracle)
    state[f"cls.predictions.{tied}"].view(-1)[7] += 0.001
    with pytest.raises(UserError, match=f"cls.predictions.{tied} differs from .*tied"):
        convert(write(tmp_path, oracle, state), progress=False)
    del state[f"cls.predictions.{tied}"]
    convert(write(tmp_path, oracle, state), progress=False)
    inputs = new_inputs(load_model(tmp_path).config, 2, 16)
    assert_close(load_model(tmp_path)(*inputs), ask(oracle, *inputs).logits)


@pytest.mark.parametrize("pooler", [True, False])
@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_sentence_encoder(prefix, pooler, tmp_path):
    """all-MiniLM-L6-v2 and its kin: BertModel, mostly without prefix, and how to pool in files of its own."""
    oracle = new_oracle("BertModel", hidden_act="gelu")
    state = {prefix + name: t for name, t in state_of(oracle).items() if pooler or "pooler" not in name}
    write(tmp_path, oracle, state)
    files = {
        "modules.json": '[{"type": "..."}]',
        "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    }
    files |= {"sentence_bert_config.json": "{}", "config_sentence_transformers.json": "{}"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    folder = convert(tmp_path, progress=False)
    model = load_model(folder)
    inputs = new_inputs(model.config, 2, 16)
    assert (model.config.head, model.config.pooler) == (None, pooler)
    assert_close(model(*inputs), ask(oracle, *inputs).last_hidden_state)
    assert {name: (folder / name).read_text() for name in files} == files

    back = load_file(reverse(tmp_path, progress=False) / "model.safetensors")
    state = {
        name.removeprefix("bert."): tensor for name, tensor in state.items() if "position_ids" not in name
    }
    assert_same_tensors(back, state)


def test_a_token_classifier_with_a_pooler(tmp_path):
    """Before transformers 4, every class stored a pooler; what no head reads is kept all the same."""
    oracle = new_oracle("BertForTokenClassification")
    state = dict(oracle.named_parameters())
    pooler = {
        f"bert.pooler.dense.{name}": t for name, t in new_oracle("BertModel").pooler.dense.named_parameters()
    }
    convert(write(tmp_path, oracle, {**state, **pooler}), progress=False)
    model = load_model(tmp_path)
    inputs = new_inputs(model.config, 2, 16)
    assert model.config.pooler
    assert_close(model(*inputs), ask(oracle, *inputs).logits)
    back = load_file(reverse(tmp_path, progress=False) / "model.safetensors")
    assert_same_tensors(back, {**state, **pooler})


def test_inspect_shows_what_becomes_of_everything(tmp_path, capsys):
    oracle = new_oracle("BertForPreTraining")
    inspect(write(tmp_path, oracle, old_names(state_of(oracle))))
    shown = capsys.readouterr().out
    assert "skipped: the numbers 0, 1, 2" in shown
    assert "cls.predictions.decoder.weight" in shown and "tied: equal to bert.embeddings" in shown
    assert "missing" not in shown and "?" not in shown


# Checkpoints that are something else ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture, fields, message",
    [
        ("BertForQuestionAnswering", {}, "does not have BertForQuestionAnswering's head"),
        ("BertForMultipleChoice", {}, "does not have BertForMultipleChoice's head"),
        ("BertForSequenceClassification", {"architectures": ["BertModel"]}, "architectures should name"),
        ("BertForSequenceClassification", {"architectures": None}, "architectures should name"),
        (
            "BertModel",
            {"architectures": ["BertForTokenClassification"]},
            "classifier.weight .5, 60. is missing",
        ),
        ("BertModel", {"architectures": ["BertForMaskedLM"]}, "cls.predictions.bias .101,. is missing"),
        ("BertForTokenClassification", {"id2label": {"0": "A", "1": "B"}}, "shape .5, 60., where .* .2, 60."),
        (
            "BertForTokenClassification",
            {"id2label": {"0": "A", "2": "B"}},
            "id2label does not name the labels 0 to 1",
        ),
        ("BertForTokenClassification", {"id2label": ["A", "B"]}, "id2label does not name the labels"),
        (
            "BertForTokenClassification",
            {"id2label": None, "num_labels": "5"},
            "num_labels is '5', where a posi",
        ),
        ("BertModel", {"is_decoder": True}, "is_decoder is True; models/bert.py implements False"),
        ("BertModel", {"add_cross_attention": True}, "add_cross_attention is True"),
        (
            "BertModel",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type is 'relative_key'",
        ),
        ("BertModel", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("BertModel", {"hidden_act": "silu"}, "hidden_act is 'silu'; models/bert.py implements gelu,"),
        ("BertModel", {"hidden_act": 3}, "hidden_act is 3, where a word was expected"),
        ("BertModel", {"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0, where a number from 0"),
        ("BertModel", {"embedding_size": 128}, "does not know embedding_size"),
        ("BertModel", {"intermediate_size": 90}, "where the config asks for"),
    ],
)
def test_what_is_no_such_bert_is_refused(architecture, fields, message, tmp_path):
    write(tmp_path, new_oracle(architecture), **fields)
    with pytest.raises(UserError, match=message) as error:
        convert(tmp_path, progress=False)
    assert str(error.value).startswith(str(tmp_path))
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head": "masked"}, "head is None, masked_lm, "),
        ({"head": "sequence"}, "num_labels goes with"),
        ({"num_labels": 3}, "num_labels goes with"),
        ({"head": "next_sentence", "pooler": False}, "needs the pooler"),
        ({"activation": "silu"}, "activation is gelu, gelu_new or relu"),
        ({"num_heads": 7}, "num_heads must divide"),
    ],
)
def test_a_config_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message):
        create_model("bert-base-cased", **change)


# Configs ----------------------------------------------------------------------------------------------------


def published(**fields):
    """Fields as in the published files of BERT base."""
    return {
        "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
        "transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
        **fields,
    }  # fmt: skip


def test_published_configs_are_read():
    multilingual = published(
        directionality="bidi", pooler_fc_size=768, pooler_num_attention_heads=12, pooler_num_fc_layers=3,
        pooler_size_per_head=128, pooler_type="first_token_transform", vocab_size=119547,
    )  # fmt: skip
    entities = published(
        architectures=["BertForTokenClassification"], _num_labels=9, output_past=True, vocab_size=28996,
        id2label={str(n): f"B-{n}" for n in range(9)}, label2id={f"B-{n}": n for n in range(9)},
        max_length=512,
    )  # fmt: skip
    assert from_hf_config(published())[1]["head"] == "masked_lm"
    assert from_hf_config(multilingual)[1]["vocab_size"] == 119547
    assert from_hf_config(entities)[1]["num_labels"] == 9
    assert from_hf_config(published(classifier_dropout=None)) == from_hf_config(published())


def test_a_silent_config_means_what_transformers_takes():
    """Each field left out, one at a time: ours then equals what transformers fills in."""
    complete = json.loads(BertConfig(**BASE, architectures=["BertForMaskedLM"]).to_json_string())
    for name in set(BASE) - {"attn_implementation"}:
        silent = {field: value for field, value in complete.items() if field != name}
        if name == "attention_probs_dropout_prob" or name == "hidden_dropout_prob":
            silent |= {field: 0.1 for field in silent if field.endswith("dropout_prob")}
        filled = json.loads(BertConfig(**silent).to_json_string())
        assert from_hf_config(silent) == from_hf_config(filled), name


# Devlin et al. 2019, section 3, give 110M and 340M; these are the counts of the released weights: the encoder
# with its pooler, and the same with the heads of pre-training.
COUNTS = {
    "bert-base-uncased": (109_482_240, 110_106_428),
    "bert-base-cased": (108_310_272, 108_932_934),
    "bert-large-uncased": (335_141_888, 336_226_108),
    "bert-large-cased": (333_579_264, 334_661_958),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    model_name, config = load_config(name)
    counts = [
        sum(parameter.numel() for parameter in build_model(model_name, each).parameters())
        for each in (dataclasses.replace(config, head=None), config)
    ]
    assert tuple(counts) == COUNTS[name]


def test_fresh_weights():
    """A normal distribution cut at two standard deviations has 0.88 of its standard deviation."""
    model = create_model("bert-base-uncased", num_layers=2, vocab_size=300, d_model=300, num_heads=10)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.abs().max() <= 0.04
            expected = pytest.approx(0.02 * 0.8796, rel=0.03 if parameter.numel() > 1000 else 0.1)
            assert parameter.std().item() == expected, name


# Shapes -----------------------------------------------------------------------------------------------------


def shape_configs(module):
    """A model for each head, and one that has none."""
    for head in None, "masked_lm", "next_sentence", "pretraining", "sequence", "tokens":
        yield module.Config(
            vocab_size=43,
            max_seq_len=31,
            num_segments=3,
            d_model=15,
            num_layers=4,
            num_heads=3,
            d_ff=29,
            norm_eps=1e-12,
            activation="relu" if head == "tokens" else "gelu",
            dropout=0.1,
            pooler=head not in ("masked_lm", "tokens"),
            head=head,
            num_labels=23 if head in ("sequence", "tokens") else None,
        )


def run_shapes(model, recorder, B, T, **free):
    """With padding and without, in training and in evaluation; the head of some tokens; the pooler."""
    config = model.config
    tokens, segments = torch.randint(config.vocab_size, (B, T)), torch.randint(config.num_segments, (B, T))
    mask = torch.arange(T) < T - torch.arange(B)[:, None]
    recorder.running(config, B=B, T=T, **free)
    model.train()(tokens, segments, mask).sum().backward()
    model.eval()(tokens)
    recorder.running(config, B=1, T=T, **free)
    hidden = model.hidden(tokens[:1])
    if config.pooler:
        model.pooler(hidden)


SHAPES = Case(shape_configs, run_shapes, {"B": 7, "T": 11, "d": 5, "Y": 23}, same={("H", "d")})
