"""What fits where, and what splitting a model costs: the tables of this room's README, from sizes alone.

A rank's bytes are those of tensor_parallel.py: its part of what is split, all of what is not. The bytes of
weights are structure/facts.py's, so that int8 and int4 are those of models/utils/quantize.py.

What is sent: twice a layer R ranks add up vectors of D numbers, one for each token. In a ring each rank
sends, and receives, 2 (R - 1) / R times their bytes (Patarasuk and Yuan 2009): first every rank comes to have
a part of the sum, then every part comes to every rank. That must take less time than splitting saves. With N
weights that work for a token, in bf16:

    a decoded token          reads them; each of R devices a part:    saves 2 N / bandwidth (1 - 1 / R)
    a token of a prompt      multiplies by them, 2 FLOPs each:        saves 2 N / FLOPs (1 - 1 / R)

A prompt has many tokens, whose sums travel together, so that the link's speed counts; both sides grow with
(R - 1) / R, so how many ranks there are does not. A decoded token's sums are small, and what counts is how
long an exchange takes, whatever it carries.

Proof: tests/test_parallel.py.
"""

from dataclasses import dataclass, replace
from functools import cache

from conversion.checkpoint import tensors_of
from conversion.tables import PAGES
from models import build_model, load_config
from runs_parallel.tensor_parallel import COUNTS, plan_of
from structure.facts import DTYPES, stored_bytes

RESERVE = 0.1  # of a GPU's memory, for what a step computes and for the libraries
# A second of a GPU with 80 GB (H100 SXM, its data sheet, without sparsity): FLOPs in bf16, bytes of memory.
FLOPS, BANDWIDTH = 989e12, 3.35e12
NUMBER = 2  # bytes of an activation and of a number in the cache, in bf16


@dataclass
class Size:
    """A model, weighed; bytes by dtype."""

    config: object
    split: dict  # bytes that ranks share
    whole: dict  # bytes that each rank has
    active: int  # parameters that work for a token
    cache: float  # bytes a token, of all ranks together

    @property
    def cache_is_split(self):
        """Not where all heads read the same vector of a token, as in latent attention."""
        return hasattr(self.config, COUNTS[1])


@cache
def weigh(name, alike=5):
    """The Size of a config of configs/, whose layers from number `alike` on are alike, and not all built."""
    _, config = load_config(name)
    less, more = (numbers_of(name, num_layers=n) for n in (alike, alike + 1))
    times = config.num_layers - alike
    total = {key: less[key] + times * (more[key] - less[key]) for key in less}
    split, whole = ({dtype: total[place, dtype] for dtype in DTYPES} for place in ("split", "whole"))
    return Size(config, split, whole, total["active"], total["cache"])


def numbers_of(name, num_layers, kept_tokens=64):
    """{("split", dtype): bytes, ("whole", dtype): bytes, "active": parameters, "cache": bytes a token}.

    Without a layer that looks ahead, which is read by those who draft with it.
    """
    model_name, config = load_config(name)
    model = build_model(model_name, replace(config, num_layers=num_layers))
    model.ahead = None
    plan, parameters = dict(plan_of(model, PAGES[model_name].PARALLEL)), dict(model.named_parameters())
    numbers = {(place, dtype): 0 for place in ("split", "whole") for dtype in DTYPES}
    for parameter, sizes in stored_bytes(model).items():
        if parameter in parameters:  # a tied one counts once
            place = "split" if is_split(parameter, plan) else "whole"
            for dtype in DTYPES:
                numbers[place, dtype] += sizes[dtype]
    kept = sum(tensor.nbytes for tensor in tensors_of(model.bfloat16().new_cache(1, kept_tokens)))
    return {**numbers, "active": active_parameters(model), "cache": kept / kept_tokens}


def is_split(parameter, plan):
    """Whether ranks share a parameter, as the styles of tensor_parallel.py split what they are given."""
    module, _, name = parameter.rpartition(".")
    style = plan.get(module)
    if ".experts." in parameter or style in ("columns", "vocabulary", "heads"):
        return True
    return style in ("rows", "part") and name == "weight"


def active_parameters(model):
    """Those that work for a token: of experts the active ones."""
    count = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if hasattr(module, "experts") and hasattr(module, "router"):
            one = sum(parameter.numel() for parameter in module.experts[0].parameters())
            count -= (len(module.experts) - module.num_active) * one
    return count


def tokens_that_fit(size, dtype, ranks, memory, machines=1):
    """How many tokens of cache fit beside the weights; 0 where the weights do not.

    ranks: of a machine, with `memory` bytes each. Several machines have some of the layers each.
    """
    free = memory * (1 - RESERVE) - (size.split[dtype] / ranks + size.whole[dtype]) / machines
    of_a_rank = size.cache / machines / (ranks if size.cache_is_split else 1)
    return max(0, int(free / of_a_rank))


def sent_per_token_and_layer(size, ranks):
    """Bytes that each rank sends for a token and layer: two sums of D numbers."""
    return 2 * 2 * (ranks - 1) / ranks * size.config.d_model * NUMBER


def longest_exchange(size, ranks):
    """Seconds that each of the 2 L sums of a decoded token may take, and splitting still saves time."""
    saved = size.active * NUMBER / BANDWIDTH * (1 - 1 / ranks)
    return saved / (2 * size.config.num_layers)


def slowest_link(size):
    """Bytes a second that each device must send, for a prompt to gain from being split among however many."""
    saved = 2 * size.active / FLOPS
    return 2 * 2 * size.config.d_model * NUMBER * size.config.num_layers / saved
