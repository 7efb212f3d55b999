"""How far what mixes tokens without attention reaches back: a state that decays, a convolution over time.

Such a sublayer has no probabilities, but it can be asked: take one token away from what it reads, by zeros in
its place, and see how much what it says at each later token changes. A state that forgets fast hardly changes
a few tokens later; one that keeps, changes as much at the end. Asked of the module alone, with what it read
in the run, so that nothing of other layers comes in.

Shapes: T tokens, D features.
Proof: tests/test_watch.py.
"""

import torch


@torch.no_grad()
def reaches(recording, steps, attending, cache, new_cache):
    """[(path, (T, T))] of each sublayer that mixes tokens and in which nothing attends.

    attending: the paths of modules that do. cache: of the run, new_cache: makes an empty one like it. Row t,
    column s: how much the output at t changes without s, by the largest change in the row.
    """
    found = []
    for step in steps:
        inside = any(path.startswith(step.path) for path in attending)
        if step.kind == "add" and step.path in recording.outputs and not inside:
            ask = asker(recording, step.path, cache, new_cache)
            if ask and len(step.after) > 1 and ask(0)[1:].any():
                change = torch.stack([ask(s) for s in range(len(step.after))], dim=1)
                found.append((step.path, change / change.amax(dim=1, keepdim=True).clamp(min=1e-30)))
    return found


def asker(recording, path, cache, new_cache):
    """A function of s: how much the module's output at each token changes without token s, (T,)."""
    module, (inputs, output) = recording.model.get_submodule(path), recording.outputs[path][0]
    x = inputs[0] if inputs else None
    if not isinstance(x, torch.Tensor) or not isinstance(output, torch.Tensor) or x.dim() != 3:
        return None

    def ask(s):
        without = x.clone()
        without[:, s] = 0
        fresh = new_cache() if cache is not None else ()
        places = {id(part): n for n, part in enumerate(cache or ())}
        others = [fresh[places[id(each)]] if id(each) in places else each for each in inputs[1:]]
        change = (module(without, *others) - output)[0].norm(dim=-1)
        # What rounding changes is no reach.
        return change * (change > 1e-5 * output[0].norm(dim=-1))

    return ask
