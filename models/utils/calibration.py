"""What a model's linear layers are given to read: measured once on a short text, used by quantize.py.

Let a row w of a weight be changed by e. The layer's outputs change by X e, and their squared error over the
text is |X e|^2 = e^T (X^T X) e. The K by K matrix X^T X is thus all that the text has to say about the layer,
however long it is. Of wide layers only squares along its diagonal are kept, the products of inputs that stand
in the same BLOCK: K * BLOCK numbers, in Llama 3.2 1B 0.7 GB for all layers.

An expert is given the tokens that chose it: of 16,384 tokens, with 8 of 128 experts active, 1,024 if all are
chosen alike. Where they say nothing of an input, the damping in quantize.py keeps it as it was. An expert
that no token chose is quantized by the search alone, and a line says so.
Shapes: K inputs of a layer, b of them in a block; X (tokens, K).
Proof: tests/test_quantize.py.
"""

import torch

from models.utils.errors import UserError

BLOCK = 512  # a multiple of every group size


@torch.no_grad()
def input_products(model, names, windows):
    """{name of a linear layer: [(b, b), ...]}: X^T X of each block of columns, in fp32, on the CPU.

    The model runs as it is, with weights that may be mapped from a file: they are read once for each window,
    from memory where they fit. A layer that no pass reaches, as an expert that nobody chose, has no entry.
    """
    products = {}

    def watch(name):
        def add(module, inputs):
            rows = inputs[0].float().flatten(0, -2)  # (tokens, K)
            new = [block.T @ block for block in rows.split(BLOCK, dim=1)]
            old = products.get(name)
            products[name] = new if old is None else [a.add_(b) for a, b in zip(old, new)]

        return model.get_submodule(name).register_forward_pre_hook(add)

    hooks = [watch(name) for name in names]
    try:
        for window in windows:
            model(window)
    finally:
        for hook in hooks:
            hook.remove()
    for name, blocks in products.items():
        if not all(block.isfinite().all() for block in blocks):
            raise UserError(
                f"--calibrate: the inputs of {name} overflow in this dtype; convert to bfloat16 first"
            )
    return products
