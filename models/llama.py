"""Llama 3: the decoder-only Transformer that most open language models of today resemble.

New against gpt2:
- RMSNorm instead of LayerNorm
- rotary positions (RoPE) instead of a learned table
- a gated feed-forward (SwiGLU) instead of GELU
- key/value heads shared by groups of query heads (GQA)
- no dropout, and no biases (though Qwen2, which loads into this page, has some)
- in the larger sizes an output matrix of its own
Papers: Touvron et al. 2023 (Llama, section 2.2), Grattafiori et al. 2024 (Llama 3, section 3.2).

    tokens (B, T)
      x = token_embed(tokens)
      repeat L times:
        x = x + attn(attn_norm(x))    RoPE turns q and k by their positions; then, as in GPT-2, each head
                                      takes softmax(q k^T / sqrt(d)) v, no look ahead, and o_proj joins them
        x = x + ffn(ffn_norm(x))      down_proj(silu(gate_proj(x)) * up_proj(x))
      hidden = final_norm(x)
    logits (B, T, V) = lm_head(hidden)

The cache keeps the keys and values of the past, so that a step feeds only the new token:

    cache = model.new_cache(batch_size, num_slots)
    logits = model(prompt, cache=cache)               # fills slots 0 to T - 1
    logits = model(next_token, positions, cache)      # positions (B, 1): each row's slot to fill

Shapes: B batch, T positions in this call, S positions attended (T, or with `positions` all slots of the
    cache).
Proof: tests/test_llama.py, against `transformers`. Picture: python show_structure.py llama-3-8b
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's change of the slow RoPE frequencies, for texts longer than those of pre-training."""

    factor: float  # what the slow frequencies are divided by: 8 in Llama 3.1, 32 in the small Llama 3.2
    low_freq_factor: float  # slow: fewer turns than this in original_max_seq_len positions (1)
    high_freq_factor: float  # fast, and left alone: more turns than this (4)
    original_max_seq_len: int  # the context of pre-training (8,192)

    def __post_init__(self):
        assert self.low_freq_factor < self.high_freq_factor, "low_freq_factor must be below high_freq_factor"


@dataclass(frozen=True)
class Config:
    """Differs from transformer_lm: fewer key/value heads than heads, RoPE's scaling, and biases."""

    vocab_size: int  # V: 128,256 in Llama 3
    max_seq_len: int  # M: the context it was trained for; for callers, since RoPE itself has no limit
    d_model: int  # D: 4,096 in Llama 3 8B
    num_layers: int  # L: 32 in Llama 3 8B
    num_heads: int  # H: query heads, 32 in Llama 3 8B
    num_kv_heads: int  # K: key/value heads, 8 in Llama 3 8B, a divisor of H
    head_dim: int  # d: often D / H, but it need not be
    d_ff: int  # f: 14,336 in Llama 3 8B
    norm_eps: float  # keeps RMSNorm from dividing by zero
    rope_base: float  # the larger, the slower the slowest rotation; 500,000 in Llama 3
    rope_scaling: RopeScaling | None  # None before Llama 3.1
    qkv_bias: bool  # False in Llama, True in Qwen2
    o_bias: bool  # False in every published Llama
    ffn_bias: bool  # False in every published Llama
    tied_head: bool  # whether lm_head and token_embed are one matrix, as in the small Llama 3.2

    def __post_init__(self):
        assert self.num_heads % self.num_kv_heads == 0, "num_kv_heads must divide num_heads"
        assert self.head_dim % 2 == 0, "head_dim must be even, since RoPE turns pairs"


class Model(nn.Module):
    """Differs from transformer_lm: torch's own parts, and a mask only where positions are given."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
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

        rotation = rope(positions, self.config)  # each (B, 1, T, d // 2)
        x = self.token_embed(tokens)  # (B, T, D)
        for n, layer in enumerate(self.layers):
            x = layer(x, rotation, mask, positions, cache[n] if cache else None)
        return self.final_norm(x)

    def new_cache(self, batch_size: int, num_slots: int) -> "Cache":
        """An empty cache, of the weights' dtype and device, for `batch_size` rows of `num_slots` tokens."""
        shape = (batch_size, self.config.num_kv_heads, num_slots, self.config.head_dim)
        zeros = self.token_embed.weight.new_zeros
        return tuple(LayerCache(k=zeros(shape), v=zeros(shape)) for _ in self.layers)

    @torch.no_grad()
    def init_weights(self):
        """Fresh weights for training: the papers give no scheme; 0.02 is what the published configs name."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)


class Layer(nn.Module):
    """Norm, sublayer, add: pre-norm, so that from the embedding to final_norm x meets nothing but additions.

    Differs from transformer_lm: its parts read their sizes in Config.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x, rotation, mask, positions, cache):
        x = x + self.attn(self.attn_norm(x), rotation, mask, positions, cache)
        return x + self.ffn(self.ffn_norm(x))


class Attention(nn.Module):
    """Grouped-query attention: H / K neighbouring query heads read the same key/value head.

    With H = 4 and K = 2, q0 q1 q2 q3 read k0 k0 k1 k1:

    >>> torch.tensor([0, 1]).repeat_interleave(4 // 2)
    tensor([0, 0, 1, 1])

    (Ainslie et al. 2023; K = H is multi-head attention, K = 1 multi-query attention.) Why K heads: each token
    written reads the whole cache, which they make H / K times smaller, at hardly any loss of quality.
    Differs from transformer_lm: K heads of keys and values, and one fused call attends.
    Why sqrt(d): q . k is a sum of d products, so its spread grows with sqrt(d); divided by it, softmax stays
    soft at any width.

    scaled_dot_product_attention does the following, in fused kernels that need not hold all scores at once:

        k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
        scores = (q @ k.mT / math.sqrt(d)).masked_fill(~mask, -math.inf)     # (B, H, T, S)
        probs = scores.softmax(dim=-1)
        out = probs @ v                                                      # (B, H, T, d)
    """

    def __init__(self, config: Config):
        super().__init__()
        D, H, K, d = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = H, K, d
        self.q_proj = nn.Linear(D, H * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, K * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, K * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * d, D, bias=config.o_bias)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        rotation: tuple[Tensor, Tensor],  # each (B, 1, T, d // 2): cosines and sines
        mask: Tensor | None,  # (B, 1, T, S) or None: True = attend; None = causal among these T
        positions: Tensor,  # (B, T)
        cache: "LayerCache | None",
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        q, k = rotate(q, *rotation), rotate(k, *rotation)

        if cache is not None:
            cache.write(k, v, positions)
        # Given positions, attend to the whole cache through the mask. Without, this is a text's beginning:
        # only its own k and v.
        if mask is not None:
            k, v = cache  # each (B, K, S, d)

        # enable_gqa: the H query heads share the K key/value heads, which stay K in the cache.
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6): silu(z) = z sigmoid(z) of one map multiplies another, by features.

    Differs from transformer_lm: the maps and SiLU are torch's, and Config may give them biases.
    Why a gate: it lets a feature through for one token and holds it back for another. That it trains better
    was measured; the paper gives no reason.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.ffn_bias)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.ffn_bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.gate_proj(x))  # (B, T, f)
        return self.down_proj(gate * self.up_proj(x))  # (B, T, D)


class RMSNorm(nn.Module):
    """LayerNorm without the mean and the bias (Zhang and Sennrich 2019, eq. 4); it divides in fp32.

    Why the mean may go: training needs x to keep its size, whatever the scale of the weights, and dividing
    alone sees to that: (3, 4), divided by sqrt((3^2 + 4^2) / 2), is (0.85, 1.13).
    """

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * x32.type_as(x)


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
    """Cosine and sine of every rotation angle, position times frequency.

    Differs from transformer_lm: the frequencies are a function of their own, since Llama 3.1 changes them.
    In fp32 whatever the weights' dtype: bf16 has 8 bits of precision and cannot tell position 256 from 257.
    """
    theta = rope_frequencies(config, positions.device)  # (d // 2,)
    angles = positions[:, None, :, None].float() * theta  # (B, 1, T, d // 2)
    return angles.cos(), angles.sin()


def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """Radians per position: theta_i = base ** (-2 i / d) for pair i (Su et al. 2021, section 3.2.2).

    With d = 4 and base 10,000, position 3 turns the two pairs by 3 and by 0.03 radians: fast pairs tell
    neighbours apart, slow ones reach far.

    Llama 3.1 leaves the fast pairs as they are. It slows by `factor` the pairs that turn less than
    low_freq_factor times in a text of pre-training, and blends in between (the paper is silent on this;
    apply_scaling in Meta's llama-models repository).
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim  # (d // 2,)
    theta = 1.0 / config.rope_base**exponent
    if config.rope_scaling is None:
        return theta

    scaling = config.rope_scaling
    turns = scaling.original_max_seq_len * theta / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * theta + (1 - keep) * theta / scaling.factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x1_i, x2_i) of a head in its plane (Su et al. 2021, eq. 34).

    As complex numbers z = x1 + i x2, a turn by m theta is z e^(i m theta). With q at position m and k at n,
    Re(q e^(i m theta) conj(k e^(i n theta))) = Re(q conj(k) e^(i (m - n) theta)): m - n is all that counts.
    The pairs are (i, i + d/2), as Hugging Face stores them; conversion reorders Meta's, (2i, 2i + 1).

    >>> quarter = torch.tensor([math.pi / 2, 0])  # turn the pair (1, 3), leave (2, 4)
    >>> rotate(torch.tensor([1.0, 2, 3, 4]), quarter.cos(), quarter.sin()).round()
    tensor([-3.,  2.,  1.,  4.])
    """
    x1, x2 = x.chunk(2, dim=-1)  # each (..., d // 2)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).type_as(x)


class LayerCache(NamedTuple):
    """The keys and values of one layer's past; slot s holds the token at position s.

    Differs from transformer_lm: K heads, not H.
    """

    k: Tensor  # (B, K, S, d)
    v: Tensor  # (B, K, S, d)

    def write(self, k: Tensor, v: Tensor, positions: Tensor):
        assert k.shape[2] <= self.k.shape[2], "more tokens than the cache has slots"
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]  # (B, 1)
        # Indexed by (B, 1) and (B, T), the left sides are (B, T, K, d).
        self.k[rows, :, positions] = k.transpose(1, 2)  # (B, K, S, d)
        self.v[rows, :, positions] = v.transpose(1, 2)  # (B, K, S, d)


# Differs from transformer: there is no memory, only the past.
Cache = tuple[LayerCache, ...]  # one per layer
