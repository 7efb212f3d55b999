"""Whether all subjects compute the same, asked before anything is timed.

Two figures for each subject, against fp32:

    error       of the logits behind the prompt: root mean square of the difference / standard deviation
    same        how many of the first greedy tokens are fp32's, until one differs

The error must be below a limit that rounding explains. A token may differ only where fp32 itself is nearly
undecided between the two; from there on the texts are different, and nothing more can be said.

Where a router chooses experts, rounding can tip a choice between two that score alike, and a token then reads
other weights: its logits may differ by more, and a later token by anything. In fp32 nothing is forgiven.
"""

from dataclasses import dataclass

import numpy as np

from models import load_config
from models.utils.errors import UserError

# What rounding may cost. llama.cpp looks GELU up in a table of fp16, and exp too.
LIMITS = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.1, "int4": 0.6}
LLAMA_CPP_FLOAT32 = 0.01
ROUTED = 0.6
# Two logits may each be wrong by a few times the root mean square.
SIGMAS = 8


@dataclass(frozen=True)
class Expected:
    tokens: list  # that fp32 says, greedily
    logits: np.ndarray  # that led to each of them: (tokens, V)
    sizes: dict  # {"llama.cpp int8": bytes that a token reads, ...}, of the peers' files


def check(subject, tokens, logits, expected):
    """The figures as a dict; UserError if they do not do."""
    limit = LIMITS[subject.weights]
    if subject.name == "llama.cpp" and subject.weights == "float32":
        limit = LLAMA_CPP_FLOAT32
    routed = subject.weights != "float32" and hasattr(load_config(subject.config)[1], "num_active_experts")
    if routed:
        limit = ROUTED
    std = expected.logits[0].std()
    error = float(np.sqrt(np.mean((logits - expected.logits[0]) ** 2)) / std)
    where = f"{subject.config}, {subject.weights}, {subject.name}"
    if not error <= limit:
        raise UserError(
            f"{where}: its logits differ from fp32's by {error:.2g} standard deviations, where rounding "
            f"explains {limit:g}; nothing was timed"
        )
    same = next((n for n, pair in enumerate(zip(tokens, expected.tokens)) if pair[0] != pair[1]), len(tokens))
    if same < len(expected.tokens):
        logits = expected.logits[same]
        gap = float(logits[expected.tokens[same]] - logits[tokens[same]])
        if not routed and gap > SIGMAS * limit * std:
            raise UserError(
                f"{where}: token {same + 1} of its text is {tokens[same]}, fp32's is {expected.tokens[same]} "
                f"by a clear margin; nothing was timed"
            )
    return {"logits_error": error, "same_tokens": same, "checked_tokens": len(expected.tokens)}


def check_rows(rows):
    """In fp32 the first tokens of a ragged batch must be the same for all: {Subject: rows of tokens}."""
    firsts = {s: [row[:1] for row in tokens] for s, tokens in rows.items() if s.weights == "float32"}
    for subject, first in firsts.items():
        other = next(iter(firsts))
        if first != firsts[other]:
            raise UserError(
                f"{subject.config}: {subject.name} and {other.name} do not continue a batch of prompts alike "
                "in fp32; nothing more was timed"
            )
