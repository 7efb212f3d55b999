"""Small random `transformers` models: the oracle that the zoo's own models are compared with."""

import torch


def redraw(model, seed=0, std_of_logits=1.0):
    """Draw every parameter anew, biases and norm weights too, whose defaults (0 and 1) hide mistakes.

    Matrices keep the scale of their input, so that signals neither die nor explode; norms stay around what
    they begin with (1, or 0 where they multiply by 1 + weight); the output matrix is then scaled so that the
    logits' standard deviation is about `std_of_logits`.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * weight_std(name, parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(float(parameter.any()) + 0.3 * noise)
        tokens = torch.randint(model.config.vocab_size, (2, 16), generator=generator)
        head = model.get_output_embeddings().weight
        head *= std_of_logits / model(tokens).logits.std()
    return model.eval()


def weight_std(name, parameter):
    if "wte" in name or "wpe" in name or "embed_tokens" in name or "embed_in" in name:
        return 1.0
    if ".experts." in name:
        return 1.5 * parameter.shape[-1] ** -0.5  # the experts' matrices in one tensor, (expert, out, in)
    # Conv1D (GPT-2) stores its matrix as (in, out), nn.Linear as (out, in).
    fan_in = parameter.shape[0] if ".c_" in name else parameter.shape[1]
    return 1.5 * fan_in**-0.5
