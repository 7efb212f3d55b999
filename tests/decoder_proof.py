"""What every decoder of the zoo must be able to show: the proof of every model, and that of its cache."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runs_ar.generate import generate, keeps_states
from tests.model_proof import ModelProof, assert_close, assert_rounded_alike


def random_tokens(model, batch_size, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch_size, length), generator=generator)


def new_cache(model, batch_size, num_slots, num_undo):
    """The model's own; one that forgets is told how many tokens earlier than the last a call may begin."""
    if keeps_states(model):
        return model.new_cache(batch_size, num_slots, num_undo=num_undo)
    return model.new_cache(batch_size, num_slots)


class DecoderProof(ModelProof):
    def inputs(self, model, batch_size, size, seed=0):
        return (random_tokens(model, batch_size, size, seed),)

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

    def test_the_cache_is_as_exact_in_bf16_as_the_whole_pass(self, model):
        tokens, half = random_tokens(model, 2, 40), copy.deepcopy(model).bfloat16()
        cache = half.new_cache(2, 40)
        pieces = [half(tokens[:, :30], cache=cache)]
        for n in range(30, 40):
            pieces.append(half(tokens[:, n : n + 1], torch.full((2, 1), n), cache))
        assert_rounded_alike(torch.cat(pieces, dim=1), half(tokens), model(tokens))

    def test_a_cache_that_is_just_long_enough(self, model):
        tokens = random_tokens(model, 2, 12)
        cache = model.new_cache(2, 12)
        model(tokens[:, :5], cache=cache)
        positions = torch.arange(5, 12).expand(2, -1)
        assert_close(model(tokens[:, 5:], positions, cache), model(tokens)[:, 5:])
        assert_close(model(tokens, cache=cache), model(tokens))
        with pytest.raises(AssertionError, match="slots"):
            model(random_tokens(model, 2, 13), cache=cache)

    def test_going_back_is_calling_with_smaller_positions(self, model):
        """A rejected draft leaves its keys in the cache; they are overwritten before they are attended to."""
        tokens, draft = random_tokens(model, 2, 20), random_tokens(model, 2, 6, seed=1)
        cache = new_cache(model, 2, 26, num_undo=6)
        model(tokens[:, :10], cache=cache)
        model(draft, torch.arange(10, 16).expand(2, -1), cache)
        again = model(tokens[:, 10:], torch.arange(10, 20).expand(2, -1), cache)
        assert_close(again, model(tokens)[:, 10:])

    def test_ragged_batch_equals_alone(self, model):
        """Rows of different lengths, padded on the right, each at a place of its own, decode as if alone."""
        lengths = torch.tensor([11, 4, 7])
        tokens = random_tokens(model, 3, 20)
        cache = model.new_cache(3, 24)
        positions = None
        if keeps_states(model):
            positions = torch.arange(11).expand(3, -1)
            positions = positions.where(positions < lengths[:, None], -1)
        first = model(tokens[:, :11], positions, cache)
        steps = []
        for n in range(5):
            positions = (lengths + n)[:, None]
            steps.append(model(tokens.gather(1, positions), positions, cache))
        for row, length in enumerate(lengths.tolist()):
            alone = model(tokens[row : row + 1, : length + 5])[0]
            assert_close(first[row, :length], alone[:length])
            assert_close(torch.stack([step[row, 0] for step in steps]), alone[length:])

    def test_positions_without_a_cache_are_refused(self, model):
        with pytest.raises(ValueError, match="positions are slots of a cache: give the cache too"):
            model(random_tokens(model, 1, 3), torch.tensor([[4, 5, 6]]))

    def test_no_look_ahead(self, model):
        tokens = random_tokens(model, 1, 30)
        changed = tokens.clone()
        changed[0, 17] = (changed[0, 17] + 1) % model.config.vocab_size
        before, after = model(tokens), model(changed)
        # Not to the last digit: an expert that reads another number of tokens may multiply in another order.
        assert_close(before[:, :17], after[:, :17])
        assert not torch.allclose(before[:, 17:], after[:, 17:], atol=1e-3)

    def test_a_prefill_does_not_depend_on_the_size_of_the_cache(self, model):
        """Nothing but the cache itself has a dimension of num_slots while a fresh cache is filled."""
        num_slots = 1009
        cache = model.new_cache(1, num_slots)
        with LargestResults() as results:
            model.hidden(random_tokens(model, 1, 16), cache=cache)
        assert not [shape for shape in results.fresh_shapes if num_slots in shape]
        assert (1, 16, model.config.d_model) in results.fresh_shapes, "the recorder saw the pass"

    # Export -------------------------------------------------------------------------------------------------

    def test_exports_with_its_cache(self, model):
        """torch.export, on which compilation and the diagrams build, takes the cache as it is."""
        cache = model.new_cache(1, 16)
        model(random_tokens(model, 1, 8), cache=cache)
        token, position = random_tokens(model, 1, 1), torch.tensor([[8]])
        program = torch.export.export(model, (token, position, cache), strict=False)
        expected = model(token, position, cache)
        assert_close(program.module()(token, position, cache), expected)


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
