"""What runs_ar/attention.py hears is what `transformers` says that each head attends to, on every page."""

import math

import pytest
import torch
import transformers

from conversion.convert import convert
from models import DECODER, kind_of, load_model
from models.utils.command_line import CHECKPOINTS
from models.utils.recording import Recording
from runs_ar.attention import heard
from tests import zoo

CLASSES = {
    "bert": "BertForMaskedLM",
    "vision_transformer": "ViTForImageClassification",
    "transformer": "MarianMTModel",
}
LONG = 80  # more than the window of tiny-gemma-python, so that its layers attend in pieces


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return lambda name: convert(CHECKPOINTS / name, out=tmp_path_factory.mktemp("c") / name, progress=False)


def oracle_of(name, model_name):
    cls = getattr(transformers, CLASSES.get(model_name, "AutoModelForCausalLM"))
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    return cls.from_pretrained(CHECKPOINTS / name, **options).eval()


def recorded(model, call):
    with torch.no_grad(), Recording(model) as recording:
        out = call()
    return recording, out


@zoo.every_checkpoint
def test_every_head_attends_to_what_the_oracle_attends_to(checkpoint_name, converted):
    model_name = zoo.model_of_checkpoint(checkpoint_name)
    model = load_model(converted(checkpoint_name), dtype=torch.float32)
    oracle, config = oracle_of(checkpoint_name, model_name), model.config
    tokens = torch.randint(5, getattr(config, "vocab_size", 10), (1, LONG), generator=torch.manual_seed(1))
    with torch.no_grad():
        if model_name == "vision_transformer":
            images = torch.randn(1, config.num_channels, config.image_size, config.image_size)
            recording, _ = recorded(model, lambda: model(images))
            expected = oracle(images, output_attentions=True).attentions
        elif model_name == "transformer":
            source, target = tokens[:, :9], tokens[:, 9:16]
            recording, _ = recorded(model, lambda: model(source, target))
            out = oracle(source, decoder_input_ids=target, output_attentions=True)
            pairs = zip(out.decoder_attentions, out.cross_attentions)
            expected = [*out.encoder_attentions, *(each for pair in pairs for each in pair)]
        elif kind_of(model_name) == DECODER:
            recording, _ = recorded(model, lambda: model(tokens, None, model.new_cache(1, LONG)))
            expected = oracle(tokens, output_attentions=True).attentions
        else:
            recording, _ = recorded(model, lambda: model(tokens))
            expected = oracle(tokens, output_attentions=True).attentions
    found = heard(recording, LONG)
    assert len(found) == len(expected)
    for each, theirs in zip(found, expected):
        torch.testing.assert_close(each.probs, theirs[0], atol=1e-5, rtol=0)
        if (
            each.q is not None
        ):  # the numbers that a page shows of a pair: softmax of scale q . k, what is seen
            scores = each.q @ each.k.repeat_interleave(len(each.q) // len(each.k), dim=0).mT * each.scale
            scores = scores.masked_fill(theirs[0] == 0, -math.inf)
            torch.testing.assert_close(scores.softmax(dim=-1), theirs[0], atol=1e-4, rtol=0)
    assert not any(module._forward_hooks for module in model.modules()), "nothing listens any more"


@zoo.every_decoder
def test_heads_are_heard_on_every_page(model_name):
    """As many as the config says, in every layer; rows add up to 1, but where a sink takes the rest."""
    model = zoo.small_model(model_name)
    tokens = torch.arange(3, 14)[None]
    found = heard(recorded(model, lambda: model(tokens, None, model.new_cache(1, 11)))[0], 11)
    assert len(found) == model.config.num_layers
    for each in found:
        num_heads = getattr(model.config, "num_heads", len(each.probs))  # modular_decoder calls it otherwise
        assert each.probs.shape == (num_heads, 11, 11)
        sums = each.probs.sum(dim=-1)
        has_sink = hasattr(model.get_submodule(each.path), "sinks")
        assert (sums < 0.9999).any() if has_sink else torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
        assert not each.probs.triu(1).any(), "no token sees ahead"


def test_a_step_attends_as_the_whole_text_does():
    """DeepSeek's step is absorbed: its heads are queries of one head, over one key that all share."""
    model = zoo.small_model("deepseek_v3")
    tokens, T = torch.arange(3, 14)[None], 11
    whole = heard(recorded(model, lambda: model(tokens, None, model.new_cache(1, T)))[0], T)
    cache = model.new_cache(1, T)
    with torch.no_grad():
        model(tokens[:, :-1], None, cache)
    step = heard(recorded(model, lambda: model(tokens[:, -1:], torch.tensor([[T - 1]]), cache))[0], 1)
    for each, full in zip(step, whole):
        torch.testing.assert_close(each.probs[:, 0], full.probs[:, -1], atol=1e-5, rtol=0)
