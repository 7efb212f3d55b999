"""What a module, a function or an operation is to a reader, by its name: STYLE.md's words, and torch's."""

from torch import nn

from conversion.config_fields import words

# Operations that weigh: a box of their own, and what stands around them in a statement goes into it.
HEAVY = {"linear", "matmul", "bmm", "einsum", "scaled_dot_product_attention", "softmax", "conv1d", "conv2d"}
ACTIVATIONS = words("relu gelu silu tanh sigmoid softplus elu leaky_relu mish hardswish relu6 exp")
MASKS = words("where masked_fill bitwise_not bitwise_and logical_and eq ne le lt ge gt tril triu")
LABELS = {
    "scaled_dot_product_attention": "attention",
    "mul": "multiply",
    "div": "divide",
    "im2col": "unfold",
    "cat": "concat",
    "nonzero_numpy": "nonzero",
}
ENDINGS = {  # of a module's name or class, the first that fits
    "norm": "norm",
    "pos_embed": "position",
    "position": "position",
    "rotary": "position",
    "embed": "embedding",
    "embedding": "embedding",
    "attn": "attention",
    "attention": "attention",
    "mixer": "recurrence",
    "ssm": "recurrence",
    "recurrence": "recurrence",
    "recurrent": "recurrence",
    "delta": "recurrence",
    "deltanet": "recurrence",
    "ffn": "feed_forward",
    "mlp": "feed_forward",
    "feedforward": "feed_forward",
    "moe": "feed_forward",
    "mixture": "feed_forward",
    "experts": "feed_forward",
    "ahead": "group",  # a layer of its own kind, not a head
    "head": "head",
    "classifier": "head",
    "pooler": "head",
    "token": "embedding",
    "proj": "linear",
    "router": "linear",
    "linear": "linear",
}
FUNCTIONS = {  # what a function's name begins with or holds
    "mask": "mask",
    "allow": "mask",
    "rope": "position",
    "rot": "position",
    "sinusoid": "position",
    "alibi": "position",
    "position": "position",
    "softmax": "attention",
    "attention": "attention",
    "norm": "norm",
    "activat": "activation",
}


def role_of_module(module, name):
    for word in (name.lower(), type(module).__name__.lower()):
        for ending, role in ENDINGS.items():
            if word.endswith(ending):
                return role
    return "activation" if type(module).__name__.lower() in ACTIVATIONS else "group"


def role_of_function(name, ops):
    named = next((role for part, role in FUNCTIONS.items() if part in name.lower()), None)
    if named:
        return named
    if name.lower() in ACTIVATIONS or any(op.target in ACTIVATIONS for op in ops):
        return "activation"
    return role_of_op(ops[-1].target) if len(ops) == 1 else "operation"


def role_of_op(target):
    if target in MASKS:
        return "mask"
    if target in ACTIVATIONS:
        return "activation"
    known = {
        "linear": "linear",
        "einsum": "linear",
        "matmul": "attention",
        "bmm": "attention",
        "softmax": "attention",
        "scaled_dot_product_attention": "attention",
        "add": "add",
        "mul": "multiply",
        "div": "multiply",
        "embedding": "embedding",
        "layer_norm": "norm",
        "rms_norm": "norm",
        "index_put": "cache",
    }
    return known.get(target, "operation")


def label_of_op(target):
    return "mask" if target in MASKS else LABELS.get(target, target)


def title_of_module(module, role):
    """What a module is in a few words, from the settings that it keeps."""
    weight = getattr(module, "weight", None)
    if role == "norm":
        eps = getattr(module, "eps", None)
        return type(module).__name__ + ("" if eps is None else f", eps {eps:g}")
    if isinstance(weight, nn.Parameter) and weight.dim() == 2:
        if "Embedding" in type(module).__name__:
            return f"{weight.shape[0]:,} × {weight.shape[1]:,}"
        bias = " + bias" if getattr(module, "bias", None) is not None else ""
        return f"{weight.shape[1]:,} → {weight.shape[0]:,}{bias}"
    if getattr(module, "num_heads", None):
        return heads_title(module)
    if role == "feed_forward":
        linears = [m.weight for m in module.modules() if type(m).__name__ == "Linear"]
        if linears:
            return " → ".join(
                f"{n:,}" for n in (linears[0].shape[1], linears[0].shape[0], linears[-1].shape[0])
            )
    return ""


def heads_title(module):
    heads, kv_heads = module.num_heads, getattr(module, "num_kv_heads", module.num_heads)
    linears = [m.weight for m in module.modules() if type(m).__name__ == "Linear"]
    width = getattr(module, "head_dim", linears[0].shape[0] // heads if linears else None)
    of = f" of {width}" if width else ""
    if kv_heads != heads:
        return f"{heads} query heads, {kv_heads} key/value heads{of}"
    return f"{heads} heads{of}"
