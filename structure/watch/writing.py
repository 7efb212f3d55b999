"""The text of a page: what it begins with, what the model writes behind it, and how its tokens are called.

A round is what one pass of the model brought: {"tokens", "drafts", "accepted"}; without a drafter one token.
"""

from conversion.config_fields import stored_labels
from models import DECODER, ENCODER_DECODER
from models.utils.errors import UserError, report
from models.utils.image_processor import load_image_processor, open_image
from runs_ar.generate import NOT_FINITE, check_prompts, check_vocabulary, generate, generation_defaults
from runs_ar.top import token_name
from runs_ar.transformer import check_source, generation_rules
from runs_ar.transformer import generate as translate
from structure.watch.thought import Text

DEFAULT_PROMPT = "def main():"


def prompt_of(checkpoint, prompt):
    """--prompt, or the example that came with the checkpoint, or one of ours."""
    if prompt == "":
        raise UserError("--prompt is empty; give a text")
    if prompt is not None:
        return prompt
    if checkpoint.kind not in (DECODER, ENCODER_DECODER):
        return f"Return the {getattr(checkpoint.tokenizer, 'mask_token', '')} of the list."
    example = checkpoint.example("example.txt")
    return example.read_text(encoding="utf-8") if example else DEFAULT_PROMPT


def cut(tokens, longest, holder="a page of this model"):
    """(the first tokens of a text that is longer than a page holds, what there is to say of it)."""
    if len(tokens) <= longest:
        return tokens, ""
    note = f"The text has {len(tokens)} tokens, {holder} holds {longest}: it is cut there."
    report(note)
    return tokens[:longest], note


def pixels_of(checkpoint, path):
    """(1, C, h, w): an image as the model reads it."""
    path = path or checkpoint.example("example.png")
    if path is None:
        raise UserError("there is nothing to look at; give --image FILE")
    channels = checkpoint.config.num_channels
    return load_image_processor(checkpoint.folder, channels)(open_image(path, channels))


def continued(checkpoint, model, tokens, num_new, write=None):
    """(the tokens with those that the model writes, greedily, and the rounds); write: a drafter's way."""
    if not num_new:
        return tokens, []
    _, eos_ids = generation_defaults(checkpoint.folder, checkpoint.tokenizer)
    check_prompts(model.config, [tokens])
    try:
        rounds = list((write or plain)(model, tokens, num_new, eos_ids))
    except UserError as error:
        if NOT_FINITE not in str(error):
            raise
        report(f"{NOT_FINITE}; nothing is written")
        rounds = []
    return tokens + [token for each in rounds for token in each["tokens"]], rounds


def plain(model, tokens, num_new, eos_ids):
    for (token,) in generate(model, [tokens], num_new, eos_ids=eos_ids):
        yield {"tokens": [token], "drafts": [], "accepted": 0}


def translated(checkpoint, model, source, num_new):
    """(the start token and the target, its rounds): the end token is not read, so it is no place."""
    check_source(model.config, source)
    _, eos_ids = generation_defaults(checkpoint.folder, checkpoint.tokenizer)
    rules, _ = generation_rules(checkpoint.folder, model.config, eos_ids, num_new)
    target = [token for (token,) in translate(model, [source], rules)]
    rounds = [{"tokens": [token], "drafts": [], "accepted": 0} for token in target]
    return [rules.start_id, *target[:-1]], rounds


def answers_of(checkpoint, thought):
    """("token" or "label", {id: text} as a function) of what the head answers with."""
    size = thought.logits.shape[1] if thought.logits is not None else 0
    if size and size == getattr(checkpoint.config, "vocab_size", None):
        return "token", lambda id: token_name(checkpoint.tokenizer, id)
    has_labels = size and getattr(checkpoint.config, "num_labels", 0)
    labels = stored_labels(checkpoint.folder)["labels"] if has_labels else []
    return "label", lambda id: labels[id] if id < len(labels) else str(id)


def text_of(checkpoint, prompt, model, num_new, longest, write=None):
    """(Text, how many of its tokens were given, rounds) of a model that reads text."""
    tokenizer, kind = checkpoint.tokenizer, checkpoint.kind
    prompt = prompt_of(checkpoint, prompt)
    masks = {"masks": True} if getattr(tokenizer, "mask_id", None) is not None else {}
    tokens, note = cut(tokenizer.encode(prompt, **masks), max(1, longest - num_new))
    check_vocabulary(checkpoint.config, tokens or [0])
    if not tokens:
        raise UserError("the text has no token; give another --prompt")
    if kind == ENCODER_DECODER:
        target, rounds = translated(checkpoint, model, tokens, num_new or longest)
        return Text(target[:longest], source=tokens, note=note), 1, rounds
    given, rounds = len(tokens), []
    if kind == DECODER:
        tokens, rounds = continued(checkpoint, model, tokens, num_new, write)
    return Text(tokens, note=note), given, rounds
