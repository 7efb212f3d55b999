"""Qwen3-MoE: Qwen3 with experts, many narrow feed-forwards in a layer, of which a token runs a few.

New against qwen3:
- E experts in place of a layer's feed-forward, and a router that chooses A of them for each token
- layers may be left without experts; the published models have them in all
Papers: Yang et al. 2025 (Qwen3, section 2), Shazeer et al. 2017 (experts), Fedus et al. 2022 (Switch).

    tokens (B, T)
      x = token_embed(tokens)
      repeat L times:
        x = x + attn(attn_norm(x))    as in Qwen3
        x = x + ffn(ffn_norm(x))      weight_1 expert_1(x) + ... + weight_A expert_A(x), the router's choice
      hidden = final_norm(x)
    logits (B, T, V) = lm_head(hidden)

Of 30.5 billion parameters 30B-A3B reads 3.0 to write a token. The cache is that of qwen3.py.

Shapes: B batch, T positions in this call, S positions attended (T, or with `positions` all slots of the
    cache), t tokens of a call (B T), f features inside a feed-forward.
Proof: tests/test_qwen3_moe.py, against `transformers`. Picture: python show_structure.py qwen3-30b-a3b
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """YaRN's change of the RoPE frequencies (Peng et al. 2023, section 3).

    Differs from llama: the blend goes by the pair's number, and attention gets sharper.
    """

    factor: float  # how many times longer a text may be: 4 for 131,072 tokens
    original_max_seq_len: int  # the context of training (32,768)
    fast_turns: float  # pairs that turn more often than this in that context stay as they are (beta: 32)
    slow_turns: float  # pairs that turn less often are slowed by factor (alpha: 1)
    rotation_scale: float  # of q and k each, so that scores grow by its square: 0.1 ln(factor) + 1


@dataclass(frozen=True)
class Config:
    """Differs from qwen3: experts, and which layers have none."""

    vocab_size: int  # V: 151,936
    max_seq_len: int  # M: 40,960, of which 8,192 are meant for the prompt; RoPE itself has no limit
    d_model: int  # D: 2,048 in Qwen3 30B-A3B
    num_layers: int  # L: 48 in Qwen3 30B-A3B
    num_heads: int  # H: query heads, 32 in Qwen3 30B-A3B
    num_kv_heads: int  # K: key/value heads, 4 in both sizes, a divisor of H
    head_dim: int  # d: 128 in both sizes
    d_ff: int  # f of a layer without experts: 6,144 in Qwen3 30B-A3B, which has no such layer
    d_expert: int  # f of an expert: 768 in Qwen3 30B-A3B, so that 8 are as wide as d_ff
    num_experts: int  # E: 128 in both sizes
    num_active_experts: int  # A: how many of them a token passes through, 8 in both sizes
    normalize_weights: bool  # whether the weights of a token's experts are made to add up to 1, as published
    dense_layers: tuple[int, ...]  # numbers of the layers without experts: none as published
    norm_eps: float  # keeps RMSNorm from dividing by zero
    rope_base: float  # the larger, the slower the slowest rotation; 1,000,000
    rope_scaling: RopeScaling | None  # None as published; YaRN for texts beyond 32,768 tokens
    tied_head: bool  # whether lm_head and token_embed are one matrix; False as published

    def __post_init__(self):
        assert self.num_heads % self.num_kv_heads == 0, "num_kv_heads must divide num_heads"
        assert self.head_dim % 2 == 0, "head_dim must be even, since RoPE turns pairs"
        assert self.num_active_experts <= self.num_experts, "num_active_experts is more than num_experts"


class Model(nn.Module):
    """Differs from qwen3: a layer is told its number, by which it has experts or none."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_layers))
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
        """Logits for the token that follows each token.

        cache: from new_cache, written in place at `positions`; None: nothing is kept.
        positions: the slots of the cache where the tokens go, 0 <= position < num_slots; each token attends
            to all slots up to its own, which must have been written. None: these are the text's first T.
        """
        return self.lm_head(self.hidden(tokens, positions, cache))  # (B, T, V)

    def hidden(self, tokens, positions=None, cache=None):
        """What lm_head reads. Generation calls this and applies the head only where it picks a token."""
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
            else:
                nn.init.normal_(parameter, std=0.02)


class Layer(nn.Module):
    """Differs from qwen3: a mixture of experts in place of the feed-forward, unless the config says no."""

    def __init__(self, config: Config, number: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        dense = number in config.dense_layers
        self.ffn = FeedForward(config.d_model, config.d_ff) if dense else Experts(config)

    def forward(self, x, rotation, mask, positions, cache):
        x = x + self.attn(self.attn_norm(x), rotation, mask, positions, cache)
        return x + self.ffn(self.ffn_norm(x))


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys.

    Differs from qwen3: why q and k are normed is said there.
    """

    def __init__(self, config: Config):
        super().__init__()
        D, H, K, d = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = H, K, d
        self.q_proj = nn.Linear(D, H * d, bias=False)
        self.k_proj = nn.Linear(D, K * d, bias=False)
        self.v_proj = nn.Linear(D, K * d, bias=False)
        self.o_proj = nn.Linear(H * d, D, bias=False)
        self.q_norm = RMSNorm(d, config.norm_eps)
        self.k_norm = RMSNorm(d, config.norm_eps)

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
        q, k = rotate(self.q_norm(q), *rotation), rotate(self.k_norm(k), *rotation)

        if cache is not None:
            cache.write(k, v, positions)
        # Without a mask this is a text's beginning, which attends to its own k and v alone.
        if mask is not None:
            k, v = cache  # each (B, K, S, d)

        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class Experts(nn.Module):
    """E feed-forwards, of which a token passes through the A that a linear map of it, the router, prefers.

    Why: knowledge takes parameters, and a token needs little of it. A layer has E / A times as many as a
    token reads. The choice has no gradient; the router learns through the weights of the chosen.
    Of four experts two are chosen; with `normalize`, their weights add up to 1:

    >>> weights, chosen = torch.tensor([1.0, 3.0, 0.0, 2.0]).softmax(dim=-1).topk(2)
    >>> chosen, weights / weights.sum()
    (tensor([1, 3]), tensor([0.7311, 0.2689]))
    """

    def __init__(self, config: Config):
        super().__init__()
        self.num_experts, self.num_active = config.num_experts, config.num_active_experts
        self.normalize = config.normalize_weights
        self.router = nn.Linear(config.d_model, config.num_experts, bias=False)
        widths = config.d_model, config.d_expert
        self.experts = nn.ModuleList(FeedForward(*widths) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (t, D)
        weights, chosen = self.route(tokens)  # each (t, A)
        out = self.run(tokens, chosen)  # (t, A, D)
        return (weights[..., None] * out).sum(dim=1).view_as(x)  # (B, T, D)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the numbers of each token's A experts; the softmax over all E is in fp32."""
        probs = self.router(tokens).softmax(dim=-1, dtype=torch.float32)  # (t, E)
        weights, chosen = probs.topk(self.num_active)  # each (t, A)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.type_as(tokens), chosen

    def run(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Each token through its experts: all tokens of an expert at once, so that it is read once."""
        order = chosen.flatten().argsort()  # (t * A,): those of expert 0 first
        counts = F.one_hot(chosen, self.num_experts).sum(dim=(0, 1))  # (E,)
        groups = zip(self.experts, tokens.index_select(0, order // self.num_active).split(counts.tolist()))
        # Whom no token chose does not run; while a tracer is at work, who knows no count, all do.
        out = [expert(group) for expert, group in groups if torch.compiler.is_compiling() or len(group)]
        return torch.cat(out).index_select(0, order.argsort()).unflatten(0, chosen.shape)  # (t, A, D)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6): silu(z) = z sigmoid(z) of one map multiplies another, by features.

    Differs from qwen3: it is told its width, since an expert is narrower than a whole layer.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.gate_proj(x))  # (..., f)
        return self.down_proj(gate * self.up_proj(x))  # (..., D)


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

    Differs from llama: YaRN makes both larger, and with them q, k and the scores (section 3.4).
    In fp32 whatever the weights' dtype: bf16 has 8 bits of precision and cannot tell position 256 from 257.
    """
    theta = rope_frequencies(config, positions.device)  # (d // 2,)
    angles = positions[:, None, :, None].float() * theta  # (B, 1, T, d // 2)
    scale = config.rope_scaling.rotation_scale if config.rope_scaling else 1.0
    return angles.cos() * scale, angles.sin() * scale


def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """Radians per position: theta_i = base ** (-2 i / d) for pair i (Su et al. 2021, section 3.2.2).

    Differs from qwen3: there YaRN is explained; here is its arithmetic alone.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim  # (d // 2,)
    theta = 1.0 / config.rope_base**exponent
    if config.rope_scaling is None:
        return theta

    scaling, d = config.rope_scaling, config.head_dim
    turns = scaling.fast_turns, scaling.slow_turns
    lengths = (scaling.original_max_seq_len / (2 * math.pi * n) for n in turns)  # positions per radian
    fast, slow = (d * math.log(length) / (2 * math.log(config.rope_base)) for length in lengths)
    last_fast, first_slow = max(math.floor(fast), 0), min(math.ceil(slow), d - 1)
    pairs = torch.arange(d // 2, device=device)  # (d // 2,)
    slowed = ((pairs - last_fast) / max(first_slow - last_fast, 0.001)).clamp(0, 1)
    return (1 - slowed) * theta + slowed * theta / scaling.factor


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
