"""What must be true of every decoder of the zoo, whatever its architecture (one subclass per model).

A subclass names the oracle's classes, a small config in the oracle's own fields (`base`), and for each field
of the zoo's Config a change of the oracle's config that changes that field (`changes`). Models reach the zoo
the way a reader's do: saved by `transformers`, converted, loaded.
"""

import dataclasses

import pytest
import torch
from convert_hf_checkpoint import convert, reverse
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from models import build_model, config_from_dict, config_to_dict, load_model
from runs_ar.generate import generate
from tests.oracle import redraw


def tolerance(logits):
    """The largest difference that rounding in fp32 explains (relative where the logits are large)."""
    return 1e-5 * max(1.0, logits.std().item())


def assert_close(actual, expected):
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance(expected), f"differs by {difference:.2e}"


def random_tokens(model, batch_size, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch_size, length), generator=generator)


class DecoderProof:
    model_name = None
    oracle_config = None
    oracle_model = None
    base = {}  # the oracle's config: small, every size different, nothing at its default
    changes = {}  # field of our Config -> change of the oracle's config
    # Fields that change no logits, with the reason; for the others the change must show.
    no_effect = {}

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
        convert(folder, progress=False)
        return load_model(folder)

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
        tokens = random_tokens(model, 3, 37)
        expected = oracle(tokens).logits
        assert 0.5 < expected.std() < 2, "the test needs logits that are neither all alike nor huge"
        assert_close(model(tokens), expected)

    def test_every_field_has_a_change(self, model):
        fields = {field.name for field in dataclasses.fields(model.config)}
        assert fields == set(self.changes)

    def test_logits_equal_the_oracle_for_every_field(self, pair, tmp_path):
        for field, change in self.changes.items():
            oracle = self.oracle(**change)
            model = self.zoo(oracle, tmp_path / field)
            assert getattr(model.config, field) != getattr(pair[1].config, field), f"{field} did not change"
            tokens = random_tokens(model, 2, 29)
            assert_close(model(tokens), oracle(tokens).logits)

    def test_every_field_moves_the_logits(self, pair, tmp_path):
        """The same weights, one field changed: other logits, or else that field would not be tested."""
        base = pair[1]
        tokens = random_tokens(base, 2, 29)
        expected = base(tokens)
        for field, change in self.changes.items():
            changed = self.zoo(self.oracle(**change), tmp_path / field).config
            model = build_model(
                *config_from_dict(config_to_dict(self.model_name, changed), field), device="cpu"
            )
            shapes = {name: tensor.shape for name, tensor in base.state_dict().items()}
            if field in self.no_effect or {n: t.shape for n, t in model.state_dict().items()} != shapes:
                continue  # other weights: parity alone shows that the field is read
            model.load_state_dict(base.state_dict())
            moved = (model.eval()(tokens) - expected).abs().max().item()
            assert moved > 100 * tolerance(expected), f"{field} moves the logits by {moved:.2e} only"

    def test_greedy_continuation_equals_the_oracle(self, pair):
        oracle, model = pair
        prompt = random_tokens(model, 1, 9)
        expected = oracle.generate(
            prompt, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        made = [tokens[0] for tokens in generate(model, [prompt[0].tolist()], max_new_tokens=24)]
        assert made == expected[0, 9:].tolist()

    # The cache ----------------------------------------------------------------------------------------------

    def test_cached_equals_full(self, model):
        """A prefill, chunks of several tokens and single tokens give what the whole pass gives."""
        tokens = random_tokens(model, 2, 40)
        cache = model.new_cache(2, 47)
        pieces = [model(tokens[:, :10], cache=cache)]
        for start, end in [(10, 17), (17, 18), (18, 19), (19, 39), (39, 40)]:
            positions = torch.arange(start, end).expand(2, -1)
            pieces.append(model(tokens[:, start:end], positions, cache))
        assert_close(torch.cat(pieces, dim=1), model(tokens))

    def test_a_cache_that_is_just_long_enough(self, model):
        tokens = random_tokens(model, 2, 12)
        cache = model.new_cache(2, 12)
        model(tokens[:, :5], cache=cache)
        positions = torch.arange(5, 12).expand(2, -1)
        assert_close(model(tokens[:, 5:], positions, cache), model(tokens)[:, 5:])
        with pytest.raises(AssertionError, match="slots"):
            model(random_tokens(model, 2, 13), cache=cache)

    def test_going_back_is_calling_with_smaller_positions(self, model):
        """A rejected draft leaves its keys in the cache; they are overwritten before they are attended to."""
        tokens, draft = random_tokens(model, 2, 20), random_tokens(model, 2, 6, seed=1)
        cache = model.new_cache(2, 26)
        model(tokens[:, :10], cache=cache)
        model(draft, torch.arange(10, 16).expand(2, -1), cache)
        again = model(tokens[:, 10:], torch.arange(10, 20).expand(2, -1), cache)
        assert_close(again, model(tokens)[:, 10:])

    def test_ragged_batch_equals_alone(self, model):
        """Rows of different lengths, padded on the right, each at a place of its own, decode as if alone."""
        lengths = torch.tensor([11, 4, 7])
        tokens = random_tokens(model, 3, 20)
        cache = model.new_cache(3, 24)
        first = model(tokens[:, :11], cache=cache)
        steps = []
        for n in range(5):
            positions = (lengths + n)[:, None]
            steps.append(model(tokens.gather(1, positions), positions, cache))
        for row, length in enumerate(lengths.tolist()):
            alone = model(tokens[row : row + 1, : length + 5])[0]
            assert_close(first[row, :length], alone[:length])
            assert_close(torch.stack([step[row, 0] for step in steps]), alone[length:])

    def test_no_look_ahead(self, model):
        tokens = random_tokens(model, 1, 30)
        changed = tokens.clone()
        changed[0, 17] = (changed[0, 17] + 1) % model.config.vocab_size
        before, after = model(tokens), model(changed)
        assert torch.equal(before[:, :17], after[:, :17])
        assert not torch.allclose(before[:, 17:], after[:, 17:])

    def test_a_prefill_does_not_depend_on_the_size_of_the_cache(self, model):
        """Nothing but the cache itself has a dimension of num_slots while a fresh cache is filled."""
        num_slots = 1009
        cache = model.new_cache(1, num_slots)
        with LargestResults() as results:
            model.hidden(random_tokens(model, 1, 16), cache=cache)
        assert not [shape for shape in results.fresh_shapes if num_slots in shape]
        assert (1, 16, model.config.d_model) in results.fresh_shapes, "the recorder saw the pass"

    # Checkpoints, training, export --------------------------------------------------------------------------

    def test_to_hugging_face_and_back_is_the_same_to_the_bit(self, pair, tmp_path):
        oracle, _ = pair
        oracle.save_pretrained(tmp_path)
        convert(tmp_path, progress=False)
        reversed_folder = reverse(tmp_path, progress=False)
        before, after = (
            load_file(tmp_path / "model.safetensors"),
            load_file(reversed_folder / "model.safetensors"),
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_exports_with_its_cache(self, model):
        """torch.export, on which compilation and the diagrams build, takes the cache as it is."""
        cache = model.new_cache(1, 16)
        model(random_tokens(model, 1, 8), cache=cache)
        token, position = random_tokens(model, 1, 1), torch.tensor([[8]])
        program = torch.export.export(model, (token, position, cache), strict=False)
        expected = model(token, position, cache)
        assert_close(program.module()(token, position, cache), expected)

    def test_every_parameter_is_trained(self, model, tmp_path):
        fresh = build_model(self.model_name, model.config, device="cpu")
        fresh.init_weights()
        with torch.enable_grad():
            fresh(random_tokens(model, 2, 12)).square().mean().backward()
        idle = [name for name, p in fresh.named_parameters() if p.grad is None or not p.grad.any()]
        # A bias of the keys shifts all scores of a query alike, which softmax does not see.
        assert [name for name in idle if not name.endswith("k_proj.bias")] == []


class LargestResults(TorchDispatchMode):
    """Records the shape of every tensor that an operation newly makes (an in-place write makes none)."""

    def __init__(self):
        super().__init__()
        self.fresh_shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if isinstance(result, torch.Tensor) and not name.endswith("_"):
            self.fresh_shapes.add(tuple(result.shape))
        return result
