"""A way to write with drafts in which each round is told: what show_structure.py shows of a drafter.

    write = with_drafts(checkpoint, "tiny-llama-python-draft")      None: the text so far drafts (lookup.py)
    for round in write(model, tokens, num_new, eos_ids): ...        {"tokens", "drafts", "accepted"}

Greedy, so that the text is what the model writes alone. Proof: tests/test_watch.py.
"""

from conversion.checkpoint import open_checkpoint
from models import DECODER
from models.utils.errors import UserError
from runs_ss.lookup import LookupDrafter
from runs_ss.pair import check_pair
from runs_ss.speculate import ModelDrafter, speculate


def with_drafts(checkpoint, draft=None):
    """UserError where the two cannot work as a pair."""
    if checkpoint.kind != DECODER:
        raise UserError("--draft and --lookup guess for a model that continues a text; leave them out")
    other = draft and open_checkpoint(draft, device="cpu")
    if other:
        check_pair(checkpoint.config, checkpoint.tokenizer, other.config, other.tokenizer)

    def write(model, tokens, num_new, eos_ids):
        drafter = ModelDrafter(other.load()) if other else LookupDrafter(model.config.vocab_size, "cpu")
        for (new,), (drafts,), (accepted,) in speculate(model, drafter, [tokens], num_new, eos_ids=eos_ids):
            yield {"tokens": new, "drafts": drafts, "accepted": accepted}

    return write
