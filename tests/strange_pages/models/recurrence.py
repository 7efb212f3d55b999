"""A decoder without attention: each layer reads the text token by token and keeps a state of fixed size.

New against llama:
- no heads, no positions, no scores: a loop over time stands where attention was
- the cache does not grow with the text: a layer keeps one matrix per row, whatever was read
- no feed-forward: the layer's gate does its work
Paper: Dao and Gu 2024 (Mamba-2, section 3), of which this is the recurrence with one head and no convolution.

    tokens (B, T)
      x = token_embed(tokens)
      repeat L times:
        x = x + mixer(norm(x))        state = a state + k v^T, out = q state, for one token after the other
      hidden = final_norm(x)
    logits (B, T, V) = lm_head(hidden), whose matrix is token_embed's

A state stands behind the last token and cannot be indexed, so that going back needs the states before it:

    cache = model.new_cache(batch_size, num_slots, num_undo)
    logits = model(prompt, cache=cache)               # reads positions 0 to T - 1
    logits = model(next_token, positions, cache)      # goes on behind them, or up to num_undo tokens earlier

Shapes: B batch, T positions in this call, U states kept (num_undo + 1).
Proof: tests/test_recurrence.py, against the same sum written without a loop.
Picture: python show_structure.py recurrence
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Differs from llama: a size of the state in place of heads, RoPE and a feed-forward."""

    vocab_size: int  # V: 50,288 in Mamba-2
    max_seq_len: int  # M: the context it was trained for; for callers, since a state has no limit
    d_model: int  # D: 768 in Mamba-2 130M
    num_layers: int  # L: 24 in Mamba-2 130M
    d_state: int  # N: rows of the state, 128 in Mamba-2
    norm_eps: float  # keeps RMSNorm from dividing by zero


class Model(nn.Module):
    """Differs from llama: positions say where a row goes on and which tokens are pads, and nothing else."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.d_model, config.norm_eps)
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

        cache: from new_cache, moved on in place; None: nothing is kept.
        positions: where the tokens of a row stand, one behind the other, then -1 for pads, which move no
            state. A row begins behind the last token that it has read, or up to num_undo tokens earlier.
            None: these are the text's first T.
        """
        B, T = tokens.shape
        if positions is not None and cache is None:
            raise ValueError("positions are places behind a cache's states: give the cache too")
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)  # (B, T)
        if cache is not None:
            check_start(positions[:, 0], cache)

        x = self.token_embed(tokens)  # (B, T, D)
        for n, layer in enumerate(self.layers):
            x = layer(x, positions, cache[n] if cache else None)
        return self.final_norm(x)

    def new_cache(self, batch_size: int, num_slots: int, num_undo: int = 0) -> "Cache":
        """Fresh states, for `batch_size` rows; num_slots, what a text may hold, costs no memory.

        num_undo: how many tokens earlier than the last one a call may begin.
        """
        shape = (batch_size, num_undo + 1, self.config.d_state, self.config.d_model)
        weight = self.token_embed.weight
        nothing_read = torch.full(shape[:2], -1, device=weight.device)  # (B, U)
        nothing_read[:, 0] = 0
        return tuple(LayerCache(weight.new_zeros(shape), nothing_read.clone()) for _ in self.layers)

    @torch.no_grad()
    def init_weights(self):
        """Fresh weights for training; a gate's bias of 3 keeps 95% of a state from token to token."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("keep_proj.bias"):
                nn.init.constant_(parameter, 3.0)
            else:
                nn.init.normal_(parameter, std=0.02)


class Layer(nn.Module):
    """Differs from llama: one sublayer, which mixes over time and over features."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mixer(config)

    def forward(self, x: Tensor, positions: Tensor, cache: "LayerCache | None") -> Tensor:
        return x + self.mixer(self.norm(x), positions, cache)


class Mixer(nn.Module):
    """Writes each token's value into the state under its key, and reads the state with its query.

    Without `keep` the state would be the sum of all k v^T, which is attention without softmax. keep, a number
    from 0 to 1 per token and row of the state, lets what is old fade as fast as the text asks for.

    >>> state = 0.0
    >>> for keep, key_times_value in [(0.5, 8.0), (0.5, 0.0), (0.5, 1.0)]:
    ...     state = keep * state + key_times_value
    >>> state
    3.0
    """

    def __init__(self, config: Config):
        super().__init__()
        D, N = config.d_model, config.d_state
        self.q_proj = nn.Linear(D, N, bias=False)
        self.k_proj = nn.Linear(D, N, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.keep_proj = nn.Linear(D, N)
        self.gate_proj = nn.Linear(D, D, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        positions: Tensor,  # (B, T): -1 for pads
        cache: "LayerCache | None",
    ) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, N), (B, T, N), (B, T, D)
        keep = torch.sigmoid(self.keep_proj(x))  # (B, T, N)

        state = x.new_zeros(x.shape[0], k.shape[-1], x.shape[-1])  # (B, N, D)
        if cache is not None:
            state = cache.begin(positions[:, 0])  # (B, N, D)
        outs = []
        for t in range(x.shape[1]):
            # Eq. 1 of the paper: h_t = A_t h_(t-1) + B_t x_t, y_t = C_t h_t.
            moved = keep[:, t, :, None] * state + k[:, t, :, None] * v[:, t, None, :]  # (B, N, D)
            is_token = (positions[:, t] >= 0)[:, None, None]  # (B, 1, 1)
            state = torch.where(is_token, moved, state)  # (B, N, D)
            outs.append(q[:, t, None, :] @ state)
            if cache is not None:
                cache.write(state, positions[:, t])

        gate = F.silu(self.gate_proj(x))  # (B, T, D)
        return self.o_proj(gate * torch.cat(outs, dim=1))  # (B, T, D)


class LayerCache(NamedTuple):
    """The last U states of one layer, a ring: the state behind n tokens stands in place n % U.

    Differs from llama: what was read is one matrix, and the slots are moments of it.
    """

    states: Tensor  # (B, U, N, D)
    num_read: Tensor  # (B, U): behind how many tokens the state stands, -1 where there is none

    def begin(self, start: Tensor) -> Tensor:
        """The state behind the first `start` tokens of each row; those behind more tokens are void."""
        rows = torch.arange(start.shape[0], device=start.device)  # (B,)
        is_void = (self.num_read > start[:, None]) & (start[:, None] >= 0)  # (B, U)
        self.num_read.masked_fill_(is_void, -1)
        return self.states[rows, start % self.states.shape[1]]  # (B, N, D)

    def write(self, state: Tensor, position: Tensor):
        """Keep what the state is behind the token at `position`; -1, a pad, changes nothing."""
        rows = torch.arange(position.shape[0], device=position.device)  # (B,)
        place = (position + 1) % self.states.shape[1]  # (B,)
        is_token = position >= 0  # (B,)
        kept = self.states[rows, place], self.num_read[rows, place]  # (B, N, D), (B,)
        self.states[rows, place] = torch.where(is_token[:, None, None], state, kept[0])  # (B, U, N, D)
        self.num_read[rows, place] = torch.where(is_token, position + 1, kept[1])  # (B, U)


# Differs from gpt2: a layer's past is a few states of it.
Cache = tuple[LayerCache, ...]  # one per layer


def check_start(start: Tensor, cache: Cache):
    """A state cannot be indexed: a row goes on where a state of it stands, or has nothing but pads (-1)."""
    # What depends on data is not looked at while a graph is made of the model.
    if torch.compiler.is_compiling():
        return
    is_there = (cache[0].num_read == start[:, None]).any(dim=1) | (start < 0)  # (B,)
    if not is_there.all():
        row = is_there.long().argmin().item()
        there = sorted(n for n in cache[0].num_read[row].tolist() if n >= 0)
        raise ValueError(
            f"row {row} begins at position {start[row].item()}, and the cache has states to begin at "
            f"{' or '.join(map(str, there))}; go on there, or give new_cache a larger num_undo"
        )
