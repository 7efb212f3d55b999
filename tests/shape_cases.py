"""How a page is run for the check of its shape comments; each page's test says it of its own, as SHAPES."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One model file: its configs, how to run it, and the sizes of the free letters."""

    configs: Callable  # module -> configs
    run: Callable  # (model, recorder, **sizes)
    sizes: dict
    same: set = frozenset()  # products that equal a letter by the architecture
    true_too: set = frozenset()  # (spec, another spec that cannot be told from it)
    by_data: set = frozenset()  # letters whose size no caller knows: the tokens of an expert

    def drive(self, module, recorder):
        torch.manual_seed(0)
        for config in self.configs(module):
            recorder.building(config)
            model = module.Model(config)
            model.init_weights()
            self.run(model, recorder, **self.sizes)


def run_decoder(model, recorder, B, T, S, **free):
    """Every way of calling a decoder: whole pass, prefill, decode, chunks; in training and in evaluation."""
    config, vocab_size = model.config, model.config.vocab_size
    tokens = torch.randint(vocab_size, (B, T))
    slots = torch.arange(S).expand(B, S)

    recorder.running(config, B=B, T=T, S=T, **free)
    model.train()(tokens).sum().backward()
    model.eval()(tokens)
    recorder.running(config, B=1, T=T, S=T, **free)
    model(tokens[:1])

    # The prompt fills a fresh cache, then each row decodes one token at a place of its own.
    recorder.running(config, B=B, T=T, S={T, S}, **free)
    cache = model.new_cache(B, S)
    model(tokens, cache=cache)
    recorder.running(config, B=B, T=1, S=S, **free)
    model(tokens[:, :1], T - torch.arange(B)[:, None] % 2, cache)

    # Chunked prefill: several tokens at given positions.
    recorder.running(config, B=B, T=T, S=S, **free)
    cache = model.new_cache(B, S)
    model.hidden(tokens, slots[:, :T], cache)
    recorder.running(config, B=B, T=S - T, S=S, **free)
    model.hidden(tokens[:, T - S :], slots[:, T:], cache)


class WithExperts:
    """The recorder, told besides what t is, all tokens of a call, and what else a page says of experts."""

    def __init__(self, recorder, letters):
        self.recorder, self.letters = recorder, letters

    def running(self, config, B, T, S):
        widths = {getattr(config, name) for name in ("d_ff", "d_expert") if hasattr(config, name)}
        known = {"t": B * T, "e": set(range(B * T + 1)), "f": widths}
        self.recorder.running(config, B=B, T=T, S=S, **{letter: known[letter] for letter in self.letters})


def run_experts(model, recorder, B, T, S, **letters):
    """run_decoder, for a page that sends the t tokens of a call to experts.

    e: the tokens of one, which the data decide; f: the width of a feed-forward, where experts have another.
    """
    run_decoder(model, WithExperts(recorder, letters), B, T, S)
