"""GPT-NeoX: the architecture of GPT-NeoX-20B and of the Pythia models.

New against gpt2:
- attention and feed-forward read the same x and are added to it together (the parallel residual)
- rotary positions (RoPE), on a part of each head's features, instead of a learned table
- an output matrix of its own
- no dropout
Papers: Black et al. 2022 (GPT-NeoX-20B, section 2), Biderman et al. 2023 (Pythia, section 2).

    tokens (B, T)
      x = token_embed(tokens)
      repeat L times:
        x = x + attn(attn_norm(x)) + ffn(ffn_norm(x))
          attn: RoPE turns R of the d features of q and k by their positions; then, as in GPT-2, each head
                takes softmax(q k^T / sqrt(d)) v, no look ahead, and o_proj joins them
          ffn:  down_proj(gelu(up_proj(x)))
      hidden = final_norm(x)
    logits (B, T, V) = lm_head(hidden)

The cache keeps the keys and values of the past, so that a step feeds only the new token:

    cache = model.new_cache(batch_size, num_slots)
    logits = model(prompt, cache=cache)               # fills slots 0 to T - 1
    logits = model(next_token, positions, cache)      # positions (B, 1): each row's slot to fill

Shapes: B batch, T positions in this call, S positions attended (T, or with `positions` all slots of the
    cache), d width of a head (D / H).
Proof: tests/test_gpt_neox.py, against `transformers`. Picture: python show_structure.py gpt-neox-20b
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Differs from gpt2: RoPE on some features, the form of the residual and of GELU, biases and the head."""

    vocab_size: int  # V: 50,304 in most Pythias; a multiple of 128, more than the tokenizer has
    max_seq_len: int  # M: 2,048, the context it was trained for; for callers, since RoPE itself has no limit
    d_model: int  # D: 6,144 in GPT-NeoX-20B
    num_layers: int  # L: 44 in GPT-NeoX-20B
    num_heads: int  # H: 64 in GPT-NeoX-20B, a divisor of D
    d_ff: int  # f: 4 D in every published size
    norm_eps: float  # keeps LayerNorm from dividing by zero
    rotary_dim: int  # R: the features of a head that RoPE turns, d / 4: in GPT-NeoX-20B 24 of 96
    rope_base: float  # the larger, the slower the slowest rotation; 10,000
    parallel_residual: bool  # False in some relatives: attention first, then feed-forward, as in GPT-2
    gelu_approximation: str  # "none" in Pythia, "tanh" in GPT-NeoX-20B
    attn_bias: bool  # on q, k, v and the output; True in every published size
    tied_head: bool  # whether lm_head and token_embed are one matrix; False in every published size

    def __post_init__(self):
        assert self.d_model % self.num_heads == 0, "num_heads must divide d_model"
        assert self.rotary_dim % 2 == 0, "rotary_dim must be even, since RoPE turns pairs"
        assert 0 < self.rotary_dim <= self.d_model // self.num_heads, "rotary_dim must be 2 to d"
        assert self.gelu_approximation in ("none", "tanh"), "gelu_approximation is none or tanh"


class Model(nn.Module):
    """Differs from gpt2: no table of positions; the angles of RoPE are computed once, for all layers."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.token_embed.weight

    def forward(
        self,
        tokens: Tensor,  # (B, T)
        positions: Tensor | None = None,  # (B, T) or None
        cache: "Cache | None" = None,
    ) -> Tensor:
        """Logits for the token that follows each token; arguments as for hidden."""
        return self.lm_head(self.hidden(tokens, positions, cache))  # (B, T, V)

    def hidden(
        self,
        tokens: Tensor,  # (B, T)
        positions: Tensor | None = None,  # (B, T) or None
        cache: "Cache | None" = None,
    ) -> Tensor:
        """What lm_head reads. Generation calls this and applies the head only where it picks a token.

        cache: from new_cache, written in place at `positions`; None: nothing is kept.
        positions: the slots of the cache where the tokens go, 0 <= position < num_slots; each token attends
            to all slots up to its own, which must have been written. None: these are the text's first T.
        """
        B, T = tokens.shape
        if positions is not None and cache is None:
            raise ValueError("positions are slots of a cache: give the cache too")
        mask = None
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)  # (B, T)
        else:
            mask = causal_mask(positions, cache[0].k.shape[2])  # (B, 1, T, S)

        rotation = rope(positions, self.config)  # each (B, 1, T, R // 2)
        x = self.token_embed(tokens)  # (B, T, D)
        for n, layer in enumerate(self.layers):
            x = layer(x, rotation, mask, positions, cache[n] if cache else None)
        return self.final_norm(x)

    def new_cache(self, batch_size: int, num_slots: int) -> "Cache":
        """An empty cache, of the weights' dtype and device, for `batch_size` rows of `num_slots` tokens."""
        attn = self.layers[0].attn
        shape = (batch_size, attn.num_heads, num_slots, attn.head_dim)
        zeros = self.token_embed.weight.new_zeros
        return tuple(LayerCache(k=zeros(shape), v=zeros(shape)) for _ in self.layers)

    @torch.no_grad()
    def init_weights(self):
        """Fresh weights for training (GPT-NeoX-20B, section 2.1.3): the matrices whose output is added to x
        start at 2 / (L sqrt(D)), so that x does not grow with depth, all others at sqrt(2 / (5 D))."""
        D, L = self.config.d_model, self.config.num_layers
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=2 / (L * math.sqrt(D)))
            else:
                nn.init.normal_(parameter, std=math.sqrt(2 / (5 * D)))


class Layer(nn.Module):
    """Differs from gpt2: both sublayers read the x that came in, the parallel residual (section 2.1.2).

        serial     x -+- attn_norm - attn -(+)-+- ffn_norm - ffn -(+)- x
                      +---------------------+  +-------------------+

        parallel   x -+- attn_norm - attn -(+)- x
                      +- ffn_norm -- ffn ---+
                      +---------------------+

    Why: on many GPUs their outputs are summed in one exchange instead of two. The authors meant both to share
    one norm; by an oversight, as the paper says, there are two, and the published weights need them.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.attn_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x, rotation, mask, positions, cache):
        attn_out = self.attn(self.attn_norm(x), rotation, mask, positions, cache)
        if self.parallel_residual:
            return x + attn_out + self.ffn(self.ffn_norm(x))
        x = x + attn_out
        return x + self.ffn(self.ffn_norm(x))


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, eq. 1 and section 3.2.2).

    Differs from gpt2: RoPE turns q and k, and one fused call attends.
    Why sqrt(d): q . k is a sum of d products, so its spread grows with sqrt(d); divided by it, softmax stays
    soft at any width.

    scaled_dot_product_attention does the following, in fused kernels that need not hold all scores at once
    (is_causal stands for a mask that lets each of T tokens see itself and those before it):

        scores = (q @ k.mT / math.sqrt(d)).masked_fill(~mask, -math.inf)     # (B, H, T, S)
        probs = scores.softmax(dim=-1)
        out = probs @ v                                                      # (B, H, T, d)
    """

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.num_heads, self.head_dim = config.num_heads, D // config.num_heads
        # Checkpoints hold q, k and v as one matrix, head by head: the rows of q of head 0, then of its k, of
        # its v, then head 1. Taken as three blocks Q, K, V, the weights fit and the text is gibberish. They
        # are taken apart when a checkpoint is converted.
        self.q_proj = nn.Linear(D, D, bias=config.attn_bias)
        self.k_proj = nn.Linear(D, D, bias=config.attn_bias)
        self.v_proj = nn.Linear(D, D, bias=config.attn_bias)
        self.o_proj = nn.Linear(D, D, bias=config.attn_bias)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        rotation: tuple[Tensor, Tensor],  # each (B, 1, T, R // 2): cosines and sines
        mask: Tensor | None,  # (B, 1, T, S) or None: True = attend; None = causal among these T
        positions: Tensor,  # (B, T)
        cache: "LayerCache | None",
    ) -> Tensor:
        B, T, _ = x.shape
        H, d = self.num_heads, self.head_dim
        q = self.q_proj(x).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)
        v = self.v_proj(x).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)
        q, k = rotate(q, *rotation), rotate(k, *rotation)

        if cache is not None:
            cache.write(k, v, positions)
        # Given positions, attend to the whole cache through the mask. Without, this is a text's beginning:
        # only its own k and v.
        if mask is not None:
            k, v = cache  # each (B, H, S, d)

        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)  # (B, H, T, d)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class FeedForward(nn.Module):
    """Differs from gpt2: GELU is exact, or has its tanh form (Hendrycks and Gimpel 2016, section 2)."""

    def __init__(self, config: Config):
        super().__init__()
        self.gelu_approximation = config.gelu_approximation
        self.up_proj = nn.Linear(config.d_model, config.d_ff)
        self.down_proj = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.up_proj(x), approximate=self.gelu_approximation)  # (B, T, f)
        return self.down_proj(x)  # (B, T, D)


def causal_mask(positions: Tensor, num_slots: int) -> Tensor:
    """No look ahead: a token attends to the slots up to its own. 1 = attend, for the first three tokens of a
    text, then for one token at position 3 of a cache with five slots:

    >>> 1 * causal_mask(torch.tensor([[0, 1, 2]]), 3)[0, 0]
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 1, 1]])
    >>> 1 * causal_mask(torch.tensor([[3]]), 5)[0, 0]
    tensor([[1, 1, 1, 1, 0]])
    """
    slots = torch.arange(num_slots, device=positions.device)  # (S,)
    return slots <= positions[:, None, :, None]  # (B, 1, T, S)


def rope(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotation angle: position times theta_i = base ** (-2 i / R) for pair i.

    (Su et al. 2021, section 3.2.2, with R features in the place of all d.) With R = 4 and base 10,000,
    position 3 turns the two pairs by 3 and by 0.03 radians: one tells neighbours apart, one reaches far.
    In fp32 whatever the weights' dtype: bf16 has 8 bits of precision and cannot tell position 256 from 257.
    """
    R = config.rotary_dim
    theta = config.rope_base ** (-torch.arange(0, R, 2, device=positions.device).float() / R)  # (R // 2,)
    angles = positions[:, None, :, None].float() * theta  # (B, 1, T, R // 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x1_i, x2_i) in a head's first R features (Su et al. 2021, eq. 34).

    Differs from transformer: the other features carry no position. A quarter was the best balance of quality
    and cost in the authors' trials (section 2.1.1). The pairs are (i, i + R/2), as in the checkpoints.
    As complex numbers z = x1 + i x2, a turn by m theta is z e^(i m theta). With q at position m and k at n,
    Re(q e^(i m theta) conj(k e^(i n theta))) = Re(q conj(k) e^(i (m - n) theta)): m - n is all that counts.

    >>> quarter = torch.tensor([math.pi / 2])  # R = 2: turn the pair (1, 2), leave the rest
    >>> rotate(torch.tensor([1.0, 2, 3, 4]), quarter.cos(), quarter.sin()).round()
    tensor([-2.,  1.,  3.,  4.])
    """
    half = cos.shape[-1]
    x1, x2 = x[..., :half], x[..., half : 2 * half]  # each (..., R // 2)
    turned = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).type_as(x)  # (..., R)
    return torch.cat([turned, x[..., 2 * half :]], dim=-1)  # (..., d)


class LayerCache(NamedTuple):
    """The keys and values of one layer's past; slot s holds the token at position s."""

    k: Tensor  # (B, H, S, d)
    v: Tensor  # (B, H, S, d)

    def write(self, k: Tensor, v: Tensor, positions: Tensor):
        assert k.shape[2] <= self.k.shape[2], "more tokens than the cache has slots"
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]  # (B, 1)
        # Indexed by (B, 1) and (B, T), the left sides are (B, T, H, d).
        self.k[rows, :, positions] = k.transpose(1, 2)  # (B, H, S, d)
        self.v[rows, :, positions] = v.transpose(1, 2)  # (B, H, S, d)


# Differs from transformer: there is no memory, only the past.
Cache = tuple[LayerCache, ...]  # one per layer
