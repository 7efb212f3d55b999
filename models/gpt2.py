"""GPT-2: the decoder-only Transformer in its plainest form; the other language models here build on it.

New against transformer:
- no encoder and no cross-attention: a decoder alone, which continues the text that it is given
- LayerNorm before each sublayer instead of after it, and once more at the end
- learned positions, whose table is as long as a text may be
- GELU instead of ReLU
- embeddings are not scaled, and dropout acts on the attention weights too
Papers: Radford et al. 2018 (GPT, section 3.1), 2019 (GPT-2, section 2.3).

    tokens (B, T)
      x = token_embed(tokens) + pos_embed(positions)
      repeat L times:
        x = x + attn(attn_norm(x))    H heads, each softmax(q k^T / sqrt(d)) v, no look ahead; o_proj joins
        x = x + ffn(ffn_norm(x))      down_proj(gelu(up_proj(x)))
      hidden = final_norm(x)
    logits (B, T, V) = lm_head(hidden), whose matrix is token_embed's

To write text, keep the keys and values of the past in a cache, so that a step feeds only the new token:

    cache = model.new_cache(batch_size, num_slots)
    logits = model(prompt, cache=cache)               # fills slots 0 to T - 1
    logits = model(next_token, positions, cache)      # positions (B, 1): each row's slot to fill

Shapes: B batch, T positions in this call, S positions attended (T, or with `positions` all slots of the
    cache), d width of a head (D / H).
Proof: tests/test_gpt2.py, against `transformers`. Picture: python show_structure.py gpt2
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Differs from transformer: one stack of layers, and a table of positions that ends."""

    vocab_size: int  # V: 50,257
    max_seq_len: int  # M: 1,024, the length of the position table and so a hard limit
    d_model: int  # D: 768 in GPT-2 small (124 M parameters)
    num_layers: int  # L: 12 in GPT-2 small
    num_heads: int  # H: 12 in GPT-2 small, a divisor of D
    d_ff: int  # f: 4 D in every published size
    norm_eps: float  # keeps LayerNorm from dividing by zero
    dropout: float  # after the embeddings, on the attention weights and after each sublayer; training only

    def __post_init__(self):
        assert self.d_model % self.num_heads == 0, "num_heads must divide d_model"


class Model(nn.Module):
    """Differs from transformer: a decoder alone, with learned positions and a norm after the last layer."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.pos_embed = nn.Embedding(config.max_seq_len, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.d_model, config.norm_eps)
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

        cache: from new_cache, written in place at `positions`; None: nothing is kept.
        positions: the slots of the cache where the tokens go, 0 <= position < num_slots; each token attends
            to all slots up to its own, which must have been written. None: these are the text's first T.
        """
        B, T = tokens.shape
        if self.config.max_seq_len < T:
            raise ValueError(f"{T} tokens are more than the {self.config.max_seq_len} of the position table")
        if positions is not None and cache is None:
            raise ValueError("positions are slots of a cache: give the cache too")
        S = T if positions is None else cache[0].k.shape[2]
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)  # (B, T)
        mask = causal_mask(positions, S)  # (B, 1, T, S)

        x = self.dropout(self.token_embed(tokens) + self.pos_embed(positions))  # (B, T, D)
        for n, layer in enumerate(self.layers):
            x = layer(x, mask, positions, cache[n] if cache else None)
        return self.final_norm(x)

    def new_cache(self, batch_size: int, num_slots: int) -> "Cache":
        """An empty cache, of the weights' dtype and device, for `batch_size` rows of `num_slots` tokens."""
        attn = self.layers[0].attn
        shape = (batch_size, attn.num_heads, num_slots, attn.head_dim)
        zeros = self.token_embed.weight.new_zeros
        return tuple(LayerCache(k=zeros(shape), v=zeros(shape)) for _ in self.layers)

    @torch.no_grad()
    def init_weights(self):
        """Fresh weights for training. Each of the 2 L sublayers adds its output to x; the matrices that make
        these outputs start smaller by sqrt(2 L), so that x does not grow with depth (GPT-2, section 2.3)."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.num_layers))
            else:
                # GPT's paper has the 0.02 (section 4.1), OpenAI's code of GPT-2 the 0.01.
                nn.init.normal_(parameter, std=0.01 if name == "pos_embed.weight" else 0.02)


class Layer(nn.Module):
    """Norm, sublayer, add: pre-LN. The Transformer of 2017 and GPT are post-LN: sublayer, add, norm.

    Why the norm first: from the embeddings to final_norm, x then meets nothing but additions, along which
    gradients reach every layer as they are. In post-LN a norm in every layer changes them.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor, cache: "LayerCache | None") -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x), mask, positions, cache))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, eq. 1 and section 3.2.2).

    Differs from transformer: k and v are x's own, and dropout acts on the attention weights too.
    Why sqrt(d): q . k is a sum of d products, so its spread grows with sqrt(d); divided by it, softmax stays
    soft at any width.
    """

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.num_heads, self.head_dim = config.num_heads, D // config.num_heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.o_proj = nn.Linear(D, D)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        mask: Tensor,  # (B, 1, T, S): True = attend
        positions: Tensor,  # (B, T)
        cache: "LayerCache | None",
    ) -> Tensor:
        B, T, _ = x.shape
        H, d = self.num_heads, self.head_dim
        q = self.q_proj(x).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)
        v = self.v_proj(x).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)

        if cache is not None:
            cache.write(k, v, positions)
            # Decoding reads every slot; a text's first call reads only the T it wrote.
            S = mask.shape[-1]
            k, v = cache.k[:, :, :S], cache.v[:, :, :S]  # each (B, H, S, d)

        # Dividing q gives the same result, and q is smaller than the scores when S > d.
        scores = (q / math.sqrt(d)) @ k.mT  # (B, H, T, S)
        scores = scores.masked_fill_(~mask, -math.inf)
        probs = self.dropout(scores.softmax(dim=-1))
        out = probs @ v  # (B, H, T, d)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class FeedForward(nn.Module):
    """Differs from transformer: always GELU, a ReLU without a corner, in the tanh form that GPT-2 has.

    (Hendrycks and Gimpel 2016, section 2.)
    """

    def __init__(self, config: Config):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ff)
        self.down_proj = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.up_proj(x), approximate="tanh")  # (B, T, f)
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
