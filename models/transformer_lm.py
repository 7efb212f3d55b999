"""A decoder-only language model with nothing hidden: every part is made here, from bare tensors.

New against gpt2:
- RMSNorm instead of LayerNorm
- rotary positions (RoPE) instead of a learned table
- a gated feed-forward (SwiGLU) instead of GELU
- no dropout, no biases: all this as in Llama
- torch.nn lends its bookkeeping alone (Module, Parameter, random numbers); each part is of use on its own
Papers: Vaswani et al. 2017 (section 3.2), Touvron et al. 2023 (Llama, section 2.2); the parts name theirs.

    tokens (B, T)
      x = token_embed(tokens)
      repeat L times:
        x = x + attn(attn_norm(x))    RoPE turns q and k by their positions; each of H heads takes
                                      softmax(q k^T / sqrt(d)) v, no look ahead; o_proj joins them
        x = x + ffn(ffn_norm(x))      down_proj(silu(gate_proj(x)) * up_proj(x))
      hidden = final_norm(x)
    logits (B, T, V) = lm_head(hidden)

Shapes: B batch, T positions in this call, S positions attended (T, or with `positions` all slots).
Proof: tests/test_transformer_lm.py. Picture: python show_structure.py transformer-lm-15m
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Differs from gpt_neox: the width of a head is free, and RoPE turns all of it or is left out."""

    vocab_size: int  # V: 32,000 in Llama 2
    max_seq_len: int  # M: the context it was trained for; for callers, since nothing here has a limit
    d_model: int  # D: 4,096 in Llama 2 7B
    num_layers: int  # L: 32 in Llama 2 7B
    num_heads: int  # H: 32 in Llama 2 7B
    head_dim: int  # d: often D / H, but it need not be
    d_ff: int  # f: 11,008 in Llama 2 7B, about 8/3 D, since three matrices stand for GPT-2's two of 4 D
    norm_eps: float  # keeps RMSNorm from dividing by zero
    rope_base: float | None  # 10,000 in Llama 2; None: no RoPE, and then only the mask tells of an order
    tied_head: bool  # whether lm_head and token_embed are one matrix

    def __post_init__(self):
        assert self.rope_base is None or self.head_dim % 2 == 0, "head_dim must be even: RoPE turns pairs"


class Model(nn.Module):
    """Differs from gpt_neox: every part is made on this page, and a test holds it equal to torch's own.

    here         torch's                             in tests/test_transformer_lm.py
    Linear       nn.Linear                           test_linear
    Embedding    nn.Embedding                        test_embedding
    RMSNorm      nn.RMSNorm                          test_rms_norm
    silu         nn.SiLU                             test_silu
    softmax      torch.softmax                       test_softmax
    attention    F.scaled_dot_product_attention      test_attention
    Attention    nn.MultiheadAttention               test_multi_head_self_attention
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embed = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = Linear(config.d_model, config.vocab_size)
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
        S = T if positions is None else cache[0].k.shape[2]
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)  # (B, T)
        mask = causal_mask(positions, S)  # (B, 1, T, S)
        rotation = None
        if self.config.rope_base is not None:
            rotation = rope(positions, self.config.head_dim, self.config.rope_base)  # each (B, 1, T, d // 2)

        x = self.token_embed(tokens)  # (B, T, D)
        for n, layer in enumerate(self.layers):
            x = layer(x, mask, rotation, positions, cache[n] if cache else None)
        return self.final_norm(x)

    def new_cache(self, batch_size: int, num_slots: int) -> "Cache":
        """An empty cache, of the weights' dtype and device, for `batch_size` rows of `num_slots` tokens."""
        shape = (batch_size, self.config.num_heads, num_slots, self.config.head_dim)
        zeros = self.token_embed.weight.new_zeros
        return tuple(LayerCache(k=zeros(shape), v=zeros(shape)) for _ in self.layers)

    @torch.no_grad()
    def init_weights(self):
        """Fresh weights for training, as each part draws its own; a tied matrix is drawn by the head."""
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, (Embedding, Linear)):
                module.init_weights()


class Layer(nn.Module):
    """Differs from gpt2: RMSNorm, RoPE's angles passed on, and no dropout."""

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.attn_norm = RMSNorm(D, config.norm_eps)
        self.attn = Attention(D, config.num_heads, config.head_dim)
        self.ffn_norm = RMSNorm(D, config.norm_eps)
        self.ffn = FeedForward(D, config.d_ff)

    def forward(self, x, mask, rotation=None, positions=None, cache=None):
        x = x + self.attn(self.attn_norm(x), mask, rotation, positions, cache)
        return x + self.ffn(self.ffn_norm(x))


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2.2).

    Differs from gpt_neox: told its sizes, it is of use without a model, and RoPE and cache may be left out:
    attn(x, causal_mask(positions, T), rope(positions, head_dim, base)), with positions (B, T) from 0 on.
    """

    def __init__(self, d_model: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.q_proj = Linear(d_model, num_heads * head_dim)
        self.k_proj = Linear(d_model, num_heads * head_dim)
        self.v_proj = Linear(d_model, num_heads * head_dim)
        self.o_proj = Linear(num_heads * head_dim, d_model)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        mask: Tensor,  # (B, 1, T, S): True = attend
        rotation: tuple[Tensor, Tensor] | None = None,  # (B, 1, T, d // 2), (B, 1, T, d // 2) or None
        positions: Tensor | None = None,  # (B, T) or None: where a cache is written
        cache: "LayerCache | None" = None,
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        v = self.v_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)

        if cache is not None:
            cache.write(k, v, positions)
            # Decoding reads every slot; a text's first call reads only the T it wrote.
            S = mask.shape[-1]
            k, v = cache.k[:, :, :S], cache.v[:, :, :S]  # each (B, H, S, d)

        out = attention(q, k, v, mask)  # (B, H, T, d)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6): silu of one map multiplies another, feature by feature.

    Differs from gpt_neox: three maps, one of which is a gate. Why a gate: it lets a feature through for one
    token and holds it back for another. That it trains better was measured; the paper gives no reason.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff)
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        gate = silu(self.gate_proj(x))  # (B, T, f)
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


class Embedding(nn.Module):
    """A row of D numbers for each token."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.init_weights()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens]  # (B, T, D)

    def init_weights(self):
        nn.init.trunc_normal_(self.weight, std=1.0, a=-3.0, b=3.0)


class Linear(nn.Module):
    """y = W x for the last dimension of x, without a bias; W has a row per output, as in torch."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)  # (...): o outputs where i inputs were

    def init_weights(self):
        """A variance between 1 / d_in, for signals, and 1 / d_out, for gradients (Glorot, eq. 12)."""
        d_out, d_in = self.weight.shape
        std = math.sqrt(2 / (d_in + d_out))
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)


def attention(
    q: Tensor,  # (B, H, T, d)
    k: Tensor,  # (B, H, S, d)
    v: Tensor,  # (B, H, S, d)
    mask: Tensor,  # (B, 1, T, S): True = attend; every query attends to something
) -> Tensor:
    """Each query takes a mean of the values, weighted by how well their keys match it (Vaswani, eq. 1).

    Why sqrt(d): q . k is a sum of d products, so its spread grows with sqrt(d); divided by it, softmax stays
    soft at any width.
    """
    # Dividing q gives the same result, and q is smaller than the scores when S > d.
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT  # (B, H, T, S)
    scores = scores.masked_fill_(~mask, -math.inf)
    probs = softmax(scores)
    return probs @ v  # (B, H, T, d)


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


def softmax(x: Tensor) -> Tensor:
    """exp(x_i) / sum_j exp(x_j) over the last dimension, in fp32.

    A factor exp(-max) above and below changes nothing, except that no exp overflows. exp(-inf) is 0: what is
    masked gets nothing. Where all is masked there is no answer, and this one is NaN, like torch's.
    >>> softmax(torch.tensor([0.0, math.log(3), -math.inf]))
    tensor([0.2500, 0.7500, 0.0000])
    """
    x32 = x.float()
    exps = (x32 - x32.amax(dim=-1, keepdim=True)).exp_()
    return (exps / exps.sum(dim=-1, keepdim=True)).type_as(x)


def silu(x: Tensor) -> Tensor:
    """About x where x is large, about 0 where it is very negative, a little below 0 in between."""
    return x * torch.sigmoid(x)


def rope(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotation angle, position times frequency.

    Differs from gpt_neox: all d features turn, pair i by base ** (-2 i / d) radians per position (Su et al.
    2021, section 3.2.2): fast pairs tell neighbours apart, slow ones reach far. In fp32 whatever the weights'
    dtype: bf16 has 8 bits of precision and cannot tell position 256 from 257.

    >>> cos, sin = rope(torch.tensor([[3]]), head_dim=4, base=10_000.0)
    >>> torch.atan2(sin, cos)
    tensor([[[[3.0000, 0.0300]]]])
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim  # (d // 2,)
    theta = 1.0 / base**exponent
    angles = positions[:, None, :, None].float() * theta  # (B, 1, T, d // 2)
    return angles.cos(), angles.sin()


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
