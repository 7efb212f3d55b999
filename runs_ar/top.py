"""How probable each new token was, and what else the model might have said: run.py --top K.

The text goes through the model once more, all of it at once: no token sees ahead, so that each place says
what it said when it was the last. These are the model's own probabilities, before temperature, top-k and the
like change them.

Shapes: n new tokens, D features, V vocabulary.
Proof: tests/test_top.py, against `transformers`.
"""

import torch

PIECE = 32  # places whose logits are there at a time


@torch.inference_mode()
def alternatives(model, hidden, tokens, k):
    """[(probability, [(token, probability), the most probable first])] of each new token.

    hidden: (n, D), of the places before them.
    """
    found = []
    for start in range(0, len(tokens), PIECE):
        probs = model.lm_head(hidden[start : start + PIECE]).float().softmax(dim=-1).cpu()  # (n, V)
        best = probs.topk(min(k, probs.shape[-1]), dim=-1)
        for row, token in enumerate(tokens[start : start + PIECE]):
            pairs = zip(best.indices[row].tolist(), best.values[row].tolist())
            found.append((probs[row, token].item(), list(pairs)))
    return found


@torch.inference_mode()
def continuation(model, prompt, tokens, k):
    """alternatives of what a decoder wrote behind a prompt; both are lists of token ids."""
    text = torch.tensor([[*prompt, *tokens[:-1]]], device=model.lm_head.weight.device)
    return alternatives(model, model.hidden(text)[0, len(prompt) - 1 :], tokens, k)


@torch.inference_mode()
def translation(model, source, start_id, tokens, k):
    """The same of a target."""
    device = model.lm_head.weight.device
    cache = model.new_cache(model.encode(torch.tensor([source], device=device)), 0)
    target = torch.tensor([[start_id, *tokens[:-1]]], device=device)
    return alternatives(model, model.hidden(target, None, cache)[0], tokens, k)


def lines(tokenizer, tokens, found):
    """A line for each token: its probability, and what else was probable."""
    for token, (probability, best) in zip(tokens, found):
        others = "  ".join(f"{token_name(tokenizer, id)!r} {p:.1%}" for id, p in best)
        yield f"  {probability:>6.1%}  {token_name(tokenizer, token)!r:<16}  of  {others}"


def token_name(tokenizer, id):
    """A token as text; its bytes, where they are no text by themselves, as <0xE2>."""
    if not 0 <= id < tokenizer.vocab_size:
        return f"<{id}>"
    special = next((name for name, each in tokenizer.special_tokens.items() if each == id), None)
    if special is not None:
        return special
    if hasattr(tokenizer, "token_text"):
        return tokenizer.token_text(id)
    content = tokenizer.token_bytes(id)
    if content is None:
        return f"<{id}>"
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in content)
