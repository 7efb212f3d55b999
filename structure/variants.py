"""What the model files share and where they differ, as declared: tests/copies.py holds it true.

Every file of models/ stands alone, so some of its code stands in other files too. A name that two files
define at the top level is in a group, whose files hold the same text, or is a variant with a reason per file.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Files that hold the same text for a name."""

    name: str
    files: tuple


GROUPS = [
    Group("Cache", ("gpt2.py", "gpt_neox.py", "llama.py", "transformer_lm.py")),
    Group("LayerCache", ("gpt2.py", "gpt_neox.py", "transformer.py", "transformer_lm.py")),
    Group("RMSNorm", ("llama.py", "transformer_lm.py")),
    Group("rotate", ("llama.py", "transformer.py", "transformer_lm.py")),
]

# name -> file -> one sentence on what is particular about it there
VARIANTS = {
    "Config": {
        "bert.py": "Segments, a choice of activations, a pooler, and the head with its labels.",
        "gpt2.py": "Heads of D / H features, a position table as long as the context, and dropout.",
        "gpt_neox.py": "The features that RoPE turns, the form of the residual and of GELU are its choices.",
        "llama.py": "Key/value heads, the width of a head, RoPE, biases and a tied head are its choices.",
        "transformer.py": "Two stacks of layers; positions, activation, window and memory are its choices.",
        "transformer_lm.py": "Llama's without key/value heads, scaling and biases; RoPE may be left out.",
        "vision_transformer.py": "Sizes of images and patches in place of a vocabulary and a length.",
    },
    "Model": {
        "bert.py": "Embeds segments too, masks padding alone, and answers what its head is for.",
        "gpt2.py": "Adds learned positions to the token embeddings, and makes the causal mask in every call.",
        "gpt_neox.py": "Llama's, with LayerNorm at the end, and fresh weights as the paper draws them.",
        "llama.py": "The RoPE angles are computed once for all layers, a mask only for given positions.",
        "transformer.py": "An encoder and a decoder that share one embedding and can be called one by one.",
        "transformer_lm.py": "GPT-2's mask, Llama's RoPE angles, and fresh weights as each part draws them.",
        "vision_transformer.py": "Embeds patches, adds a class token, and stretches the position table.",
    },
    "Layer": {
        "bert.py": "Post-LN, where GPT-2 is pre-LN, and without positions and cache.",
        "gpt2.py": "LayerNorm, and dropout after each sublayer.",
        "gpt_neox.py": "Both sublayers read the x that came in, and are added to it together.",
        "llama.py": "RMSNorm and no dropout; the RoPE angles pass through to the attention.",
        "transformer_lm.py": "Llama's, of parts that are told their sizes and so are of use on their own.",
        "vision_transformer.py": "GPT-2's, without mask, positions and cache.",
    },
    "Attention": {
        "bert.py": "GPT-2's without a cache; the mask is for padding, and may be left out.",
        "gpt2.py": "A key/value head per query head, and attention spelled out in four lines, with dropout.",
        "gpt_neox.py": "GPT-2's heads with RoPE on a part of their features, and one fused call.",
        "llama.py": "H query heads share K key/value heads, RoPE turns q and k, one fused call attends.",
        "transformer.py": "Is given keys and values, x's own or the memory's, and a bias for mask and ALiBi.",
        "transformer_lm.py": "GPT-2's heads with Llama's RoPE, which may be left out, and no dropout.",
        "vision_transformer.py": "No mask and no cache: every patch sees every other.",
    },
    "FeedForward": {
        "bert.py": "GPT-2's with a choice of activations, of which the exact GELU is BERT's own.",
        "gpt2.py": "Two linear maps with GELU between them.",
        "gpt_neox.py": "GPT-2's, with GELU exact or in its tanh form.",
        "llama.py": "SwiGLU: three linear maps, of which one gates another.",
        "transformer.py": "ReLU as in the paper, or the activation that Config names.",
        "transformer_lm.py": "Llama's, with SiLU written out, and without biases.",
        "vision_transformer.py": "Two linear maps with the exact GELU between them.",
    },
    "Cache": {
        "transformer.py": "Besides the past it holds the memory's keys and values, and where they are pads.",
    },
    "LayerCache": {
        "llama.py": "Holds the K key/value heads, of which there are fewer than H.",
    },
    "rope": {
        "gpt_neox.py": "The frequencies follow from the rotated part of a head, and nothing scales them.",
        "llama.py": "The frequencies come from a function of their own, since Llama 3.1 scales them.",
        "transformer_lm.py": "Told the width of a head and the base, not a config.",
    },
    "rotate": {
        "gpt_neox.py": "Turns the first R features of a head and lets the others pass.",
    },
}
