"""What every model of the zoo must be able to show, against its oracle in `transformers`.

A test file subclasses ModelProof (a decoder: DecoderProof of decoder_proof.py) with a config in the oracle's
own fields (`base`), and for each field of the zoo's Config a change of the oracle's config that changes that
field (`changes`). Models reach the zoo the way a reader's do: saved by `transformers`, converted, loaded.
"""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from conversion.convert import convert, reverse
from models import build_model, config_from_dict, config_to_dict, load_model
from tests.oracle import redraw


def tolerance(logits):
    """The largest difference that rounding in fp32 explains (relative where the logits are large)."""
    return 1e-5 * max(1.0, logits.std().item())


def assert_close(actual, expected):
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance(expected), f"differs by {difference:.2e}"


def assert_rounded_alike(actual, expected, exact):
    """Two ways of the same sum in bf16 are equally far from the sum in fp32."""
    assert actual.dtype == expected.dtype == torch.bfloat16
    error, usual = ((logits - exact).abs().mean() for logits in (actual, expected))
    assert error < 1.2 * usual, f"off by {error:.2e} on average, where {usual:.2e} is usual"


class ModelProof:
    model_name = None
    oracle_config = None
    oracle_model = None
    base = {}  # the oracle's config: small, every size different, nothing at its default
    changes = {}  # field of our Config -> change of the oracle's config
    # Fields that change no logits, with the reason; for the others the change must show.
    no_effect = {}
    # Parameters that training leaves alone, by the end of their names, with the reason.
    idle = {"k_proj.bias": "shifts all scores of a query alike, which softmax does not see"}

    # How both models are called -----------------------------------------------------------------------------

    def inputs(self, model, batch_size, size, seed=0):
        """What the zoo's model is called with, for texts of `size` tokens (or pictures of that size)."""
        raise NotImplementedError

    def call(self, model, *inputs):
        return model(*inputs)

    def call_oracle(self, oracle, *inputs):
        return oracle(*inputs).logits

    # Fixtures -----------------------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def without_gradients(self):
        with torch.no_grad():
            yield

    def oracle(self, **changes):
        config = self.oracle_config(**{**self.base, **changes}, attn_implementation="eager")
        return redraw(self.oracle_model(config))

    def zoo(self, oracle, folder):
        oracle.save_pretrained(folder)
        self.convert(folder)
        return load_model(folder)

    def convert(self, folder):
        convert(folder, progress=False)

    @pytest.fixture(scope="class")
    def pair(self, tmp_path_factory):
        """(the oracle, our model) with the base config and the same weights; neither is changed by a test."""
        oracle = self.oracle()
        return oracle, self.zoo(oracle, tmp_path_factory.mktemp(self.model_name) / "base")

    @pytest.fixture
    def model(self, pair):
        return pair[1]

    # The oracle's logits ------------------------------------------------------------------------------------

    def test_logits_equal_the_oracle(self, pair):
        oracle, model = pair
        inputs = self.inputs(model, 3, 37)
        expected = self.call_oracle(oracle, *inputs)
        assert 0.5 < expected.std() < 2, "the test needs logits that are neither all alike nor huge"
        assert_close(self.call(model, *inputs), expected)

    def test_every_field_has_a_change(self, model):
        fields = {field.name for field in dataclasses.fields(model.config)}
        assert fields == set(self.changes)

    def test_logits_equal_the_oracle_for_every_field(self, pair, tmp_path):
        for field, change in self.changes.items():
            oracle = self.oracle(**change)
            model = self.zoo(oracle, tmp_path / field)
            assert getattr(model.config, field) != getattr(pair[1].config, field), f"{field} did not change"
            inputs = self.inputs(model, 2, 29)
            assert_close(self.call(model, *inputs), self.call_oracle(oracle, *inputs))

    def test_every_field_moves_the_logits(self, pair, tmp_path):
        """The same weights, one field changed: other logits, or else that field would not be tested."""
        base = pair[1]
        inputs = self.inputs(base, 2, 29)
        expected = self.call(base, *inputs)
        for field, change in self.changes.items():
            changed = self.zoo(self.oracle(**change), tmp_path / field).config
            model = build_model(
                *config_from_dict(config_to_dict(self.model_name, changed), field), device="cpu"
            )
            shapes = {name: tensor.shape for name, tensor in base.state_dict().items()}
            if field in self.no_effect or {n: t.shape for n, t in model.state_dict().items()} != shapes:
                continue  # other weights: parity alone shows that the field is read
            model.load_state_dict(base.state_dict())
            moved = (self.call(model.eval(), *inputs) - expected).abs().max().item()
            assert moved > 100 * tolerance(expected), f"{field} moves the logits by {moved:.2e} only"

    # Checkpoints, training ----------------------------------------------------------------------------------

    def test_to_hugging_face_and_back_is_the_same_to_the_bit(self, pair, tmp_path):
        oracle, _ = pair
        oracle.save_pretrained(tmp_path)
        self.convert(tmp_path)
        reversed_folder = reverse(tmp_path, progress=False)
        before, after = (
            load_file(tmp_path / "model.safetensors"),
            load_file(reversed_folder / "model.safetensors"),
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_every_parameter_is_trained(self, model):
        fresh = build_model(self.model_name, model.config, device="cpu")
        torch.manual_seed(0)
        fresh.init_weights()
        with torch.enable_grad():
            self.call(fresh, *self.inputs(model, 2, 12)).square().mean().backward()
        parameters = dict(fresh.named_parameters())
        idle = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
        # Of experts those that no token chose; of each layer some are chosen.
        experts = {name for name in parameters if ".experts." in name}
        assert [name for name in set(idle) - experts if not name.endswith(tuple(self.idle))] == []
        assert not experts or len(experts & set(idle)) < len(experts) / 2
