"""The residual stream of a run: what each sublayer adds to it, and what of that makes a logit.

    steps = stream_of(recording, hidden)        hidden: what the head reads, (1, T, D)
    contributions(steps, direction)             what each step adds to a logit: their sum is the logit

Found backward from the head's input, without a name: an addition of two tensors of one shape goes on with the
operand that the other was made from (x in x + attn(norm(x))), a norm with what it norms. A norm is a module
that behaves like one: for each token, y = w (x - m) / s + b, with m the mean of x or 0. With its s held fixed
that is linear, so that the sum which x is can be taken apart behind it as well (direct logit attribution;
Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").

Shapes: T tokens, D features, V vocabulary.
Proof: tests/test_watch.py.
"""

import re
from dataclasses import dataclass

import torch

BIASES = "biases of the norms"


@dataclass
class Step:
    kind: str  # "start", "add", "norm"
    path: str  # of the module that made what is added, or of the norm; "" at the start
    layer: str  # "layers.3", or "" outside of a layer
    after: torch.Tensor  # (T, D): the stream after it
    added: torch.Tensor | None = None  # (T, D), of an addition
    norm: "Frozen | None" = None


@dataclass
class Frozen:
    """A norm with its scale held: x -> weight (x - mean) scale + bias."""

    weight: torch.Tensor  # (D,)
    bias: torch.Tensor  # (D,)
    scale: torch.Tensor  # (T, 1)
    centred: bool

    def linear(self, x):
        """What becomes of a part of x: (T, D) -> (T, D)."""
        x = x - x.mean(dim=-1, keepdim=True) if self.centred else x
        return self.weight * x * self.scale


def stream_of(recording, hidden):
    """The Steps from the embedding to the head, the first one "start"."""
    steps, tensor, before = [], hidden, None
    while True:
        module = norm_around(recording, tensor)
        call = recording.maker(tensor, before)
        if module:
            path, x, frozen = module
            steps.append(Step("norm", path, layer_of(path), rows(tensor), norm=frozen))
            tensor, before = x, None
        elif call is not None and is_sum(call):
            stream, other = operands(recording, call)
            if stream is None:
                break
            path = name_of(recording, other, call.path)
            layer = layer_of(call.path) or layer_of(path)
            steps.append(Step("add", path, layer, rows(tensor), added=rows(other)))
            tensor, before = stream, call.number
        elif call is not None and call.name in ("dropout", "contiguous", "to", "float", "type_as"):
            tensor, before = call.tensors[0], call.number
        else:
            break
    steps.append(Step("start", "", "", rows(tensor)))
    return steps[::-1]


def rows(tensor):
    return tensor.detach()[0].float()


def is_sum(call):
    return (
        call.name == "add"
        and len(call.tensors) == 2
        and call.tensors[0].dim() == 3
        and call.tensors[0].shape == call.tensors[1].shape
    )


def operands(recording, call):
    """(what goes on, what is added to it) of an addition; (None, None) where neither came from the other."""
    first, second = call.tensors
    for stream, other in ((first, second), (second, first)):
        roots = terms(recording, stream, call.number)
        came_from = any(recording.depends(other, root) for root in roots)
        # In (x + attn) + ffn both came from x, which is in the first.
        if came_from and not any(recording.depends(root, other) for root in roots):
            return stream, other
    return None, None


def terms(recording, tensor, before):
    """The tensor, and what it is the sum of."""
    call = recording.maker(tensor, before)
    if call is None or not is_sum(call):
        return [tensor]
    return [tensor, *(each for operand in call.tensors for each in terms(recording, operand, call.number))]


def name_of(recording, tensor, inside):
    """Which module made what is added, norms and what bends it left out; the one that adds it if none did."""
    for view in recording.views(tensor)[0]:
        norm = norm_around(recording, view)
        if norm:
            return name_of(recording, norm[1], inside)
        if id(view) in recording.modules:
            path = recording.modules[id(view)][0]
            # attn, rather than the last matrix in it.
            parents = [each for each in recording.outputs if path.startswith(each + ".")]
            within = [each for each in parents if len(each) > len(inside) and returns(recording, each, view)]
            return min(within, key=len, default=path)
    return inside


def returns(recording, path, tensor):
    return any(output is tensor for _, output in recording.outputs[path])


def layer_of(path):
    match = re.match(r"(.*?\.\d+)(\.|$)", path)
    return match[1] if match else ""


# Norms ------------------------------------------------------------------------------------------------------


def norm_around(recording, tensor):
    """(path, input, Frozen) of the norm that returned a tensor; None if none did."""
    found = recording.modules.get(id(tensor))
    if not found or not found[1] or not isinstance(found[1][0], torch.Tensor):
        return None
    path, (x, *_) = found
    if x.shape != tensor.shape or x is tensor:
        return None
    frozen = frozen_norm(recording.model.get_submodule(path), rows(x), rows(tensor))
    return frozen and (path, x, frozen)


@torch.no_grad()
def frozen_norm(module, x, y):
    """The Frozen that takes x to y, (T, D) both, if a module does nothing but that; or None."""
    D, parameter = x.shape[-1], next(module.parameters(), None)
    like = parameter if parameter is not None else x
    if any(p.dim() > 1 for p in module.parameters()) or D < 2:
        return None
    # Of both signs, with the mean 0, and so large that no eps counts.
    signs = torch.ones(D).to(x)
    signs[1::2] = -1
    signs[-1] = -signs[:-1].sum() or -1
    if D % 2:
        signs[-2:] = -0.5
    probe = 1e4 * signs
    bias = module(torch.zeros(1, D).to(like))[0].float()
    weight = (module(probe[None].to(like))[0].float() - bias) / (signs / signs.square().mean().sqrt())
    # Whether it is one is asked of numbers of ours: x may hold NaN.
    any_x = torch.arange(3.0 * D).to(x).sin().view(3, D)
    any_y = module(any_x.to(like)).float()
    for centred in (True, False):
        trial = fitted(weight, bias, any_x, any_y, centred)
        if (trial.linear(any_x) + bias - any_y).abs().max() <= 1e-3 * any_y.abs().max().clamp(min=1e-6):
            return fitted(weight, bias, x, y, centred)
    return None


def fitted(weight, bias, x, y, centred):
    """The Frozen whose scale takes x to y as nearly as one can."""
    frozen = Frozen(weight, bias, torch.ones(len(x), 1).to(x), centred)
    base = frozen.linear(x)  # (T, D)
    length = base.square().sum(-1, keepdim=True).clamp(min=1e-30)
    frozen.scale = ((y - bias) * base).sum(-1, keepdim=True) / length
    return frozen


# What a logit is made of ------------------------------------------------------------------------------------


def contributions(steps, direction):
    """{name: (T,)}: what each part of x adds to a logit; the sum of all is direction . hidden.

    direction: (T, D), for each token what the logit gains with each feature of hidden (its gradient).
    """
    parts = {"embedding": steps[0].after}
    for step in steps[1:]:
        if step.kind == "add":
            name = step.path or "embedding"
            parts[name] = parts.get(name, 0) + step.added
        else:
            parts = {name: step.norm.linear(part) for name, part in parts.items()}
            if step.norm.bias.abs().max() > 0:
                parts[BIASES] = parts.get(BIASES, 0) + step.norm.bias.expand_as(step.after)
    return {name: (part * direction).sum(dim=-1) for name, part in parts.items()}


def layers_of(steps):
    """[(name, x after it)] of the embedding and of each layer."""
    found = {"embedding": steps[0].after}
    for step in steps[1:]:
        if step.layer:
            found[step.layer] = step.after
        elif len(found) == 1:  # positions that are added, a norm of the embedding
            found["embedding"] = step.after
    return list(found.items())


def tail_of(steps):
    """The paths of the norms behind the last layer, which the head reads through."""
    found = []
    for step in reversed(steps):
        if step.layer or step.kind != "norm":
            break
        found.insert(0, step.path)
    return found if len(found) < len(steps) - 1 else []
