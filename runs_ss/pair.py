"""Whether two checkpoints can work as a pair: the same id must mean the same token in both.

A draft is a list of token ids. Two vocabularies of the same size are not enough: if id 17 is " the" in one
and "ing" in the other, every draft is nonsense to the target. It would reject them all and write as it does
alone, only slower, and nobody would know why. So the tokens are compared, one by one.

Proof: tests/test_run_speculate.py.
"""

from models.utils.errors import UserError
from runs_ss.speculate import check_vocabulary_size


def check_pair(config, tokenizer, draft_config, draft_tokenizer):
    """UserError where the draft's vocabulary is not the target's."""
    check_vocabulary_size(config, draft_config.vocab_size)
    where = f"{draft_tokenizer.folder}: its tokenizer is not that of {tokenizer.folder}"
    advice = "draft with a model that has the same"
    if draft_tokenizer.vocab_size != tokenizer.vocab_size:
        sizes = f"{draft_tokenizer.vocab_size} tokens, not {tokenizer.vocab_size}"
        raise UserError(f"{where} ({sizes}); {advice}")
    for id in range(tokenizer.vocab_size):
        ours, theirs = meaning(tokenizer, id), meaning(draft_tokenizer, id)
        if ours != theirs:
            raise UserError(f"{where} (token {id} is {theirs!r}, not {ours!r}); {advice}")


def meaning(tokenizer, id):
    """What a token stands for: its name if it is special, else the bytes that it adds to a text."""
    if id in tokenizer.special_ids:
        return next((name for name, special in tokenizer.special_tokens.items() if special == id), None)
    content = tokenizer.token_bytes(id)
    # Where bytes are not known, the text after another token tells whether there is a space in front.
    return tokenizer.decode([tokenizer.anchor, id]) if content is None else content
