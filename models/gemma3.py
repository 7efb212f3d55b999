"""Gemma 3: five of six layers see a window of the text, and their cache stops growing.

New against qwen3:
- five layers attend to a window of the last tokens, the sixth to all: a ring of slots keeps a window
- RoPE with two bases: 10,000 in a window, 1,000,000 over all, where linear scaling reaches further yet
- four norms a layer, before and after each sublayer, and each multiplies by 1 + weight
- embeddings times sqrt(D); GELU as the gate; scores divided by the root of a number that Config gives
Papers: Gemma Team 2025 (Gemma 3, section 2), Beltagy et al. 2020 (Longformer, section 3: windows).

    tokens (B, T)
      x = sqrt(D) token_embed(tokens)
      repeat L times:
        x = x + attn_out_norm(attn(attn_norm(x)))    q_norm, k_norm, RoPE; a window sees w tokens, no more
        x = x + ffn_out_norm(ffn(ffn_norm(x)))       down_proj(gelu(gate_proj(x)) * up_proj(x))
      hidden = final_norm(x)
    logits (B, T, V) = lm_head(hidden), whose matrix is token_embed's

A token takes 2 K d numbers a layer, in 4B 2,048. At 32,768 tokens its 5 full layers keep 671 MB in bf16, its
29 windows of 1,024 tokens in rings of 1,280 slots 152 MB; without windows the 34 layers would keep 4.6 GB.

Shapes: B batch, T positions in this call, S slots of a cache (or keys), R of a ring.
Proof: tests/test_gemma3.py, against `transformers`. Picture: python show_structure.py gemma-3-1b
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Differs from qwen3: windows, two bases of RoPE, and a scale of scores; the head is always tied."""

    vocab_size: int  # V: 262,144, and 64 more where images are read too
    max_seq_len: int  # M: 131,072, in 270M and 1B 32,768; RoPE itself has no limit
    d_model: int  # D: 2,560 in 4B
    num_layers: int  # L: 34 in 4B
    num_heads: int  # H: query heads, 8 in 4B
    num_kv_heads: int  # K: key/value heads, 4 in 4B, a divisor of H
    head_dim: int  # d: 256, in 27B 128
    d_ff: int  # f: 10,240 in 4B
    norm_eps: float  # keeps RMSNorm from dividing by zero
    window: int  # w: how many tokens a windowed layer sees, the last one among them: 512, from 4B on 1,024
    full_every: int  # 6: the sixth layer, the twelfth, ... see the whole text
    rope_base: float  # of the full layers: 1,000,000
    rope_factor: float  # they turn so many times slower: 8 from 4B on, for texts beyond 32,768; else 1
    local_rope_base: float  # of the windowed layers: 10,000
    score_scale: int  # scores are divided by its root: d, but in 27B 168, which is D / H

    def __post_init__(self):
        assert self.num_heads % self.num_kv_heads == 0, "num_kv_heads must divide num_heads"
        assert self.head_dim % 2 == 0, "head_dim must be even, since RoPE turns pairs"
        assert 2 <= self.full_every <= self.num_layers, "full_every must leave layers of both kinds"


class Model(nn.Module):
    """Differs from qwen3: embeddings are scaled, and layers are of two kinds, each with its angles and mask.

    Why sqrt(D): numbers near 1 / sqrt(D) suit the matrix as a head, near 1 as an embedding; it is both.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            Layer(config, is_full=n % config.full_every == 0) for n in range(1, config.num_layers + 1)
        )
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
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

        cache: from new_cache, written in place; None: nothing is kept.
        positions: where the tokens of a row stand, 0 <= position < num_slots, one behind the other, then -1
            for pads, which change nothing. A row begins behind the last token that it has read, or up to
            num_undo tokens earlier. None: these are the text's first T.
        """
        B, T, w = *tokens.shape, self.config.window
        if positions is not None and cache is None:
            raise ValueError("positions are slots of a cache: give the cache too")
        is_new = positions is None
        if is_new:
            positions = torch.arange(T, device=tokens.device).expand(B, T)  # (B, T)
        if cache is not None:
            positions = place_pads(positions, cache, w)

        x = self.token_embed(tokens)  # (B, T, D)
        x = x * x.new_full((), math.sqrt(self.config.d_model))  # a number in the dtype of x, as in training
        # For the two kinds of layers, those with a window first.
        rotations = [rope(positions, self.config, window) for window in (w, None)]  # each (B, 1, T, d // 2)
        masks = None, None
        if not is_new:
            R, S = cache[0].k.shape[2], max(past.k.shape[2] for past in cache)
            masks = ring_mask(positions, R, w), ring_mask(positions, S, None)  # (B, 1, T, R), (B, 1, T, S)
        for layer, past in zip(self.layers, cache or [None] * len(self.layers)):
            x = layer(x, rotations[layer.is_full], masks[layer.is_full], positions, past)
        return self.final_norm(x)

    def new_cache(self, batch_size: int, num_slots: int, num_undo: int = 0) -> "Cache":
        """An empty cache, of the weights' dtype and device, for `batch_size` rows of `num_slots` tokens.

        num_undo: how many tokens earlier than the last one a call may begin, as after a rejected draft.
        """
        B, K, d, w = batch_size, self.config.num_kv_heads, self.config.head_dim, self.config.window
        # Beside the window a ring has room for a draft, and for a piece of a prompt (Attention.forward).
        ring = min(w + max(num_undo, w // 4), num_slots)
        sizes = [num_slots if layer.is_full else ring for layer in self.layers]
        zeros = self.token_embed.weight.new_zeros
        return tuple(
            LayerCache(zeros(B, K, S, d), zeros(B, K, S, d), zeros(B, 1, dtype=torch.long) - 1) for S in sizes
        )

    @torch.no_grad()
    def init_weights(self):
        """Fresh weights for training: 0.02 is what the published configs name; norms begin at 1 + 0."""
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=0.0 if name.endswith("norm.weight") else 0.02)


class Layer(nn.Module):
    """Differs from qwen3: what a sublayer adds is normed too, and every layer is windowed or full.

    Why norms behind sublayers: whatever their weights grow to, x gets no more than these norms let through.
    """

    def __init__(self, config: Config, is_full: bool):
        super().__init__()
        self.is_full = is_full
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config, window=None if is_full else config.window)
        self.attn_out_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = FeedForward(config)
        self.ffn_out_norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, x, rotation, mask, positions, cache):
        x = x + self.attn_out_norm(self.attn(self.attn_norm(x), rotation, mask, positions, cache))
        return x + self.ffn_out_norm(self.ffn(self.ffn_norm(x)))


class Attention(nn.Module):
    """Attention to the whole past or, with a window, to the last w tokens.

    Differs from qwen3: a window, and the scale of scores is the config's.
    Why windows: most of what a token needs stands close by, and five layers with little to read make up for
    the sixth. Five windows one upon the other still reach back 5 (w - 1) tokens.
    """

    def __init__(self, config: Config, window: int | None):
        super().__init__()
        D, H, K, d = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = H, K, d
        self.window = window
        self.scale = config.score_scale**-0.5
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
        mask: Tensor | None,  # (B, 1, T, S) or None: True = attend; None = these T are a text's first
        positions: Tensor,  # (B, T)
        cache: "LayerCache | None",
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        q, k = rotate(self.q_norm(q), *rotation), rotate(self.k_norm(k), *rotation)
        # With a window piece by piece, so that no mask is T by T. Given a mask, a piece is what the ring has
        # room for: it is written, then it attends to the ring. A text's beginning attends to its own keys.
        reach = self.window or T
        size = reach // 4 + 1 if self.window and mask is not None else reach
        outs = []
        for start in range(0, T, size):
            piece, near = slice(start, start + size), slice(max(0, start - reach + 1), start + size)
            if cache is not None:
                cache.write(k[:, :, piece], v[:, :, piece], positions[:, piece])
            if mask is not None:
                outs.append(self.attend(q[:, :, piece], cache.k, cache.v, mask[:, :, piece]))
            else:
                outs.append(self.attend(q[:, :, piece], k[:, :, near], v[:, :, near], None))
        out = torch.cat(outs, dim=2)  # (B, H, T, d)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def attend(self, q, k, v, mask):
        n, m = q.shape[2], k.shape[2]
        if mask is None and n < m:  # the queries are those of the last n of m tokens
            mask = ring_mask(torch.arange(m - n, m, device=q.device)[None], m, self.window)  # (..., S)
        # enable_gqa: the H query heads share the K key/value heads, which stay K in the cache.
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )


class FeedForward(nn.Module):
    """GeGLU (Shazeer 2020, eq. 6): gelu(z) of one map multiplies another, by features.

    Differs from qwen3: GELU, in its tanh form, in the place of SiLU; both are z times a soft step.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.gate_proj(x), approximate="tanh")  # (B, T, f)
        return self.down_proj(gate * self.up_proj(x))  # (B, T, D)


class RMSNorm(nn.Module):
    """LayerNorm without the mean and the bias (Zhang and Sennrich 2019, eq. 4), all of it in fp32.

    Differs from llama: it multiplies by 1 + weight, and rounds to the dtype of x at the very end.
    Why 1 + weight: weight decay draws weights to 0, and the norm then to one that only divides.
    """

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + self.eps)
        return (x32 * (1 + self.weight.float())).type_as(x)


def ring_mask(positions: Tensor, num_slots: int, window: int | None) -> Tensor:
    """No look ahead, nor further back than the window: a token attends to `window` tokens, itself the last.

    Position p stands in slot p % S. So slot s was written (p - s) % S tokens ago, if the text is as long; and
    what a rejected draft has written, further on, seems to lie before the window. 1 = attend, for a window of
    three tokens in a ring of five slots. Position 1 sees 0 and 1, 3 sees 1 to 3, and 6 sees 4 to 6:

    >>> 1 * ring_mask(torch.tensor([[1, 3, 6]]), 5, 3)[0, 0]
    tensor([[1, 1, 0, 0, 0],
            [0, 1, 1, 1, 0],
            [1, 1, 0, 0, 1]])
    """
    slots = torch.arange(num_slots, device=positions.device)  # (S,)
    positions = positions[:, None, :, None]  # (..., 1)
    ago = (positions - slots) % num_slots  # (..., S)
    return (ago < (window or num_slots)) & (ago <= positions)


def rope(positions: Tensor, config: Config, window: int | None) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotation angle, position times frequency.

    Differs from llama: windowed layers have frequencies of their own.
    In fp32 whatever the weights' dtype: bf16 has 8 bits of precision and cannot tell position 256 from 257.
    """
    theta = rope_frequencies(config, positions.device, window)  # (d // 2,)
    angles = positions[:, None, :, None].float() * theta  # (B, 1, T, d // 2)
    return angles.cos(), angles.sin()


def rope_frequencies(config: Config, device: torch.device, window: int | None = None) -> Tensor:
    """Radians per position: theta_i = base ** (-2 i / d) for pair i (Su et al. 2021, section 3.2.2).

    Differs from llama: a base for each kind of layer, and linear scaling, which slows every pair alike.
    Why two bases: the slowest pairs tell far places apart, of which a window has none.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim  # (d // 2,)
    base, factor = (config.local_rope_base, 1.0) if window else (config.rope_base, config.rope_factor)
    return 1.0 / base**exponent / factor


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
    """The keys and values of one layer's past; slot p % S holds the token at position p.

    Differs from llama: a windowed layer's slots are a ring, less than the text is long. A new token stands
    where one was that no window sees any more.
    """

    k: Tensor  # (B, K, S, d)
    v: Tensor  # (B, K, S, d)
    furthest: Tensor  # (B, 1): the last position written, -1 in an empty cache

    def write(self, k: Tensor, v: Tensor, positions: Tensor):
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]  # (B, 1)
        slots = positions % self.k.shape[2]
        # Indexed by (B, 1) and (B, T), the left sides are (B, T, K, d).
        self.k[rows, :, slots] = k.transpose(1, 2)  # (B, K, S, d)
        self.v[rows, :, slots] = v.transpose(1, 2)  # (B, K, S, d)


# Differs from transformer: there is no memory, only the past.
Cache = tuple[LayerCache, ...]  # one per layer


def place_pads(positions: Tensor, cache: Cache, window: int) -> Tensor:
    """Note how far each row has come, and put its pads (-1) where its next token will write over them."""
    start, last = positions[:, :1], positions.amax(dim=1, keepdim=True)  # each (B, 1)
    before, num_slots = cache[0].furthest, max(layer.k.shape[2] for layer in cache)
    # What depends on data is not looked at while a graph is made of the model.
    if not torch.compiler.is_compiling() and not positions.is_meta:
        assert last.max() < num_slots, "more tokens than the cache has slots"
        first_kept = (before + 1).clamp(max=num_slots - 1) + 1 - cache[0].k.shape[2]
        if ((start > 0) & ((start - window + 1).clamp(min=0) < first_kept)).any():
            raise ValueError("a row goes back to where its window is lost; give new_cache a larger num_undo")
    # Who goes back has still written what lies further on; position 0 begins a text anew.
    furthest = torch.where(start == 0, last, torch.maximum(last, before))  # (B, 1)
    for layer in cache:
        layer.furthest.copy_(furthest)
    next_token = (torch.where(last < 0, before, last) + 1).clamp(max=num_slots - 1)
    return torch.where(positions < 0, next_token, positions)
