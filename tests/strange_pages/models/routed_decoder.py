"""A decoder with experts: of E feed-forwards in a layer, a router lets A work on each token, as in Mixtral.

New against llama:
- E feed-forwards in place of one; a token passes through A of them, chosen by a linear map of it
- no biases and no scaling of RoPE
Paper: Jiang et al. 2024 (Mixtral, section 2.1).

    tokens (B, T)
      x = token_embed(tokens)
      repeat L times:
        x = x + attn(attn_norm(x))    RoPE turns q and k, then softmax(q k^T / sqrt(d)) v, no look ahead
        x = x + ffn(ffn_norm(x))      the A experts that the router likes best, weighted by how much it does
      hidden = final_norm(x)
    logits (B, T, V) = lm_head(hidden)

A token reads the weights of its A experts and no others: of Mixtral's 47 B parameters, 13 B.

Shapes: B batch, T positions in this call, S positions attended (T, or with `positions` all slots of the
    cache), t tokens of a call (B T), e tokens of one expert.
Proof: tests/test_routed_decoder.py, against `transformers`.
Picture: python show_structure.py routed-decoder
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Differs from llama: experts, and no scaling, biases and tied head to choose."""

    vocab_size: int  # V: 32,000 in Mixtral
    max_seq_len: int  # M: the context it was trained for; for callers, since RoPE itself has no limit
    d_model: int  # D: 4,096 in Mixtral 8x7B
    num_layers: int  # L: 32 in Mixtral 8x7B
    num_heads: int  # H: query heads, 32 in Mixtral 8x7B
    num_kv_heads: int  # K: key/value heads, 8 in Mixtral, a divisor of H
    head_dim: int  # d: 128 in Mixtral
    d_ff: int  # f: of one expert, 14,336 in Mixtral 8x7B
    num_experts: int  # E: 8 in Mixtral
    num_active_experts: int  # A: how many of them a token passes through, 2 in Mixtral
    norm_eps: float  # keeps RMSNorm from dividing by zero
    rope_base: float  # the larger, the slower the slowest rotation; 1,000,000 in Mixtral

    def __post_init__(self):
        assert self.num_heads % self.num_kv_heads == 0, "num_kv_heads must divide num_heads"
        assert self.head_dim % 2 == 0, "head_dim must be even, since RoPE turns pairs"
        assert self.num_active_experts <= self.num_experts, "num_active_experts is more than num_experts"


class Model(nn.Module):
    """Differs from llama: RoPE is told a width and a base alone, and the head is never tied."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,  # (B, T)
        positions: Tensor | None = None,  # (B, T) or None
        cache: "Past | None" = None,
    ) -> Tensor:
        """Logits for the token that follows each token; arguments as for hidden."""
        return self.lm_head(self.hidden(tokens, positions, cache))  # (B, T, V)

    def hidden(
        self,
        tokens: Tensor,  # (B, T)
        positions: Tensor | None = None,  # (B, T) or None
        cache: "Past | None" = None,
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
            slots = torch.arange(cache[0].k.shape[2], device=tokens.device)  # (S,)
            mask = slots <= positions[:, None, :, None]  # (B, 1, T, S)

        rotation = rope(positions, self.config.head_dim, self.config.rope_base)  # each (B, 1, T, d // 2)
        x = self.token_embed(tokens)  # (B, T, D)
        for n, layer in enumerate(self.layers):
            x = layer(x, rotation, mask, positions, cache[n] if cache else None)
        return self.final_norm(x)

    def new_cache(self, batch_size: int, num_slots: int) -> "Past":
        """An empty cache, of the weights' dtype and device, for `batch_size` rows of `num_slots` tokens."""
        shape = (batch_size, self.config.num_kv_heads, num_slots, self.config.head_dim)
        zeros = self.token_embed.weight.new_zeros
        return tuple(KeysAndValues(k=zeros(shape), v=zeros(shape)) for _ in self.layers)

    @torch.no_grad()
    def init_weights(self):
        """Fresh weights for training: the paper gives no scheme; 0.02 is what the published configs name."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)


class Layer(nn.Module):
    """Differs from llama: its norms are torch's own, and its feed-forward is a mixture."""

    def __init__(self, config: Config):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.ffn = Mixture(config)

    def forward(self, x, rotation, mask, positions, cache):
        x = x + self.attn(self.attn_norm(x), rotation, mask, positions, cache)
        return x + self.ffn(self.ffn_norm(x))


class Attention(nn.Module):
    """Grouped-query attention.

    Differs from llama: it has no biases.
    """

    def __init__(self, config: Config):
        super().__init__()
        D, H, K, d = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = H, K, d
        self.q_proj = nn.Linear(D, H * d, bias=False)
        self.k_proj = nn.Linear(D, K * d, bias=False)
        self.v_proj = nn.Linear(D, K * d, bias=False)
        self.o_proj = nn.Linear(H * d, D, bias=False)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        rotation: tuple[Tensor, Tensor],  # each (B, 1, T, d // 2): cosines and sines
        mask: Tensor | None,  # (B, 1, T, S) or None: True = attend; None = causal among these T
        positions: Tensor,  # (B, T)
        cache: "KeysAndValues | None",
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        q, k = turn(q, *rotation), turn(k, *rotation)

        if cache is not None:
            cache.write(k, v, positions)
        # A mask is over all slots of the cache; without one, this call's tokens are all there is.
        if mask is not None:
            k, v = cache  # each (B, K, S, d)

        # enable_gqa: the H query heads share the K key/value heads, which stay K in the cache.
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class Mixture(nn.Module):
    """The A experts that a token's router likes best, weighted by the softmax over these A.

    All E at once would cost E / A times as much and give the router nothing to choose.

    >>> scores, chosen = torch.tensor([1.0, 3.0, 2.0, 3.0]).topk(2)
    >>> sorted(chosen.tolist()), scores.softmax(dim=-1).tolist()
    ([1, 3], [0.5, 0.5])
    """

    def __init__(self, config: Config):
        super().__init__()
        self.num_active = config.num_active_experts
        self.router = nn.Linear(config.d_model, config.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (t, D)
        scores, chosen = self.router(tokens).topk(self.num_active)  # each (t, A)
        weights = scores.float().softmax(dim=-1).type_as(x)  # (t, A)

        out = torch.zeros_like(tokens)  # (t, D)
        for n, expert in enumerate(self.experts):
            add_share(out, expert, tokens, weights, chosen == n)
        return out.view_as(x)  # (B, T, D)


def add_share(
    out: Tensor,  # (t, D)
    expert: "FeedForward",
    tokens: Tensor,  # (t, D)
    weights: Tensor,  # (t, A)
    is_chosen: Tensor,  # (t, A)
):
    """The tokens of an expert go through it together; where nobody chose it, none of its weights is read."""
    token, rank = torch.nonzero(is_chosen, as_tuple=True)  # each (e,)
    share = weights[token, rank, None] * expert(tokens[token])  # (e, D)
    out.index_add_(0, token, share)  # (t, D)


class FeedForward(nn.Module):
    """One expert: SwiGLU (Shazeer 2020, eq. 6), for the tokens that were sent to it.

    Differs from llama: it has no biases, and its tokens stand in one row whatever text they are from.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.gate_proj(x))  # (e, f)
        return self.down_proj(gate * self.up_proj(x))  # (e, D)


def rope(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotation angle: pair i turns by base ** (-2 i / d) radians per position.

    Differs from llama: its frequencies are never scaled, so that they are computed in place.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim  # (d // 2,)
    angles = positions[:, None, :, None].float() / base**exponent  # (B, 1, T, d // 2)
    return angles.cos(), angles.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x1_i, x2_i) of a head in its plane (Su et al. 2021, eq. 34).

    With q turned by its position m and k by its position n, their product depends on m - n alone. The pairs
    are (i, i + d/2), as Hugging Face stores them; Meta's own files pair (2i, 2i + 1), and the rows of their
    q_proj and k_proj are brought into this order when the checkpoint is converted.
    """
    x1, x2 = x.chunk(2, dim=-1)  # each (..., d // 2)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).type_as(x)


class KeysAndValues(NamedTuple):
    """The keys and values of one layer's past, K heads each; slot s holds the token at position s."""

    k: Tensor  # (B, K, S, d)
    v: Tensor  # (B, K, S, d)

    def write(self, k: Tensor, v: Tensor, positions: Tensor):
        assert k.shape[2] <= self.k.shape[2], "more tokens than the cache has slots"
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]  # (B, 1)
        # Indexed by (B, 1) and (B, T), the left sides are (B, T, K, d).
        self.k[rows, :, positions] = k.transpose(1, 2)  # (B, K, S, d)
        self.v[rows, :, positions] = v.transpose(1, 2)  # (B, K, S, d)


Past = tuple[KeysAndValues, ...]  # one per layer
