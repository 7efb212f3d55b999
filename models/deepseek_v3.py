"""DeepSeek-V3: attention whose cache keeps one small vector a token (MLA), experts in groups, a look ahead.

New against qwen3_moe:
- latent attention: the keys and values of all heads are linear maps of one vector c, which the cache keeps
- RoPE turns features of their own, and the key's are one for all heads
- queries, too, come through a narrow vector (V2-Lite: straight from x)
- beside the experts that are chosen a shared one, which every token passes through
- the router's scores are sigmoids; a bias for each expert balances what is chosen, and groups limit it
- a last layer that looks one token further ahead, to draft with (multi-token prediction)
Papers: DeepSeek-AI 2024a (V2, section 2.1), DeepSeek-AI 2024b (V3, section 2).

    tokens (B, T)
      x = token_embed(tokens)
      repeat L times:
        x = x + attn(attn_norm(x))    head h has the key (K_h c, k_rope) and the value V_h c
        x = x + ffn(ffn_norm(x))      shared(x) + weight_1 expert_1(x) + ...; dense in the first layers
      hidden = final_norm(x)
    logits (B, T, V) = lm_head(hidden)

The cache keeps c and k_rope: 512 + 64 = 576 numbers a token and layer in V3. With a key and a value of 128
for each of its 128 heads it would be 32,768; with 8 heads of them, as in Llama, 2,048.

Shapes: B batch, T positions in this call, S positions attended (T, or with `positions` all slots of the
    cache), t tokens of a call (B T), f features inside a feed-forward.
Proof: tests/test_deepseek_v3.py, against `transformers`. Picture: python show_structure.py deepseek-v3
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

    Differs from qwen3_moe: attention gets sharper by another way, see score_scale.
    """

    factor: float  # how many times longer a text may be: 40
    original_max_seq_len: int  # the context of training (4,096)
    fast_turns: float  # pairs that turn more often than this in that context stay as they are (beta: 32)
    slow_turns: float  # pairs that turn less often are slowed by factor (alpha: 1)
    rotation_scale: float  # of q_rope and k_rope: 1, since it would sharpen these alone
    score_mscale: float | None  # sharpens all of a score: 1 in V3, 0.707 in V2-Lite; None: not


@dataclass(frozen=True)
class Config:
    """Differs from qwen3_moe: the sizes of latent attention, groups and kinds of experts, the layer ahead."""

    vocab_size: int  # V: 129,280
    max_seq_len: int  # M: 163,840; RoPE itself has no limit
    d_model: int  # D: 7,168 in V3
    num_layers: int  # L: 61 in V3
    num_heads: int  # H: 128 in V3
    d_query: int | None  # the narrow vector that queries are made from, 1,536 in V3; None: from x itself
    d_latent: int  # r: the vector that keys and values are made from, 512
    head_dim: int  # d: features of a head's q and k that carry no position, 128
    rotary_dim: int  # R: those that RoPE turns, 64
    value_dim: int  # v: features of a head's value, 128
    d_ff: int  # f of a layer without experts: 18,432 in V3
    d_expert: int  # f of an expert: 2,048 in V3
    num_experts: int  # E: 256 in V3
    num_active_experts: int  # A: how many of them are chosen for a token, 8 in V3
    num_shared_experts: int  # how many times d_expert the shared one is wide: 1 in V3
    num_groups: int  # G: equal groups of neighbouring experts, 8 in V3
    num_active_groups: int  # g: how many of them a token's experts are chosen from, 4 in V3
    sigmoid_scores: bool  # True in V3; False in V2: softmax, no bias, and a group is as good as its best
    normalize_weights: bool  # whether the weights of a token's experts are made to add up to 1: True in V3
    weight_scale: float  # what these weights are then multiplied by: 2.5 in V3
    dense_layers: tuple[int, ...]  # numbers of the layers without experts: 0, 1, 2 in V3, all in Youtu
    multi_token: bool  # whether there is a layer that looks one token further ahead: 11.6 B of V3's 683 B
    norm_eps: float  # keeps RMSNorm from dividing by zero
    rope_base: float  # the larger, the slower the slowest rotation; 10,000
    rope_scaling: RopeScaling | None  # YaRN in V2 and V3; None in Youtu
    tied_head: bool  # whether lm_head and token_embed are one matrix, as in Youtu

    def __post_init__(self):
        assert self.rotary_dim % 2 == 0, "rotary_dim must be even, since RoPE turns pairs"
        assert self.value_dim <= self.head_dim + self.rotary_dim, "value_dim exceeds head_dim + rotary_dim"
        assert self.num_experts % self.num_groups == 0, "num_groups must divide num_experts"
        assert self.num_active_groups <= self.num_groups, "num_active_groups exceeds num_groups"
        size, all_active = self.num_experts // self.num_groups, self.num_active_groups == self.num_groups
        assert size > 1 or all_active or not self.sigmoid_scores, "a group has one expert, where two count"
        assert self.num_active_experts <= size * self.num_active_groups, (
            "num_active_experts exceeds the experts of num_active_groups"
        )


class Model(nn.Module):
    """Differs from qwen3_moe: one layer more, which looks ahead."""

    # Kept in fp32 by whoever makes the rest bf16: what decides between two experts may be a last digit.
    in_fp32 = ("router_bias",)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.token_embed.weight
        self.ahead = Ahead(config) if config.multi_token else None

    def forward(
        self,
        tokens: Tensor,  # (B, T)
        positions: Tensor | None = None,  # (B, T) or None
        cache: "Cache | None" = None,
    ) -> Tensor:
        """Logits for the token that follows each token; arguments as for hidden."""
        return self.lm_head(self.hidden(tokens, positions, cache))  # (B, T, V)

    def hidden(self, tokens, positions=None, cache=None) -> Tensor:
        """What lm_head reads. Generation calls this and applies the head only where it picks a token.

        cache: from new_cache, written in place at `positions`; None: nothing is kept.
        positions: the slots of the cache where the tokens go, 0 <= position < num_slots; each token attends
            to all slots up to its own, which must have been written. None: these are the text's first T.
        """
        x = self.token_embed(tokens)  # (B, T, D)
        return self.final_norm(self.through(self.layers, x, positions, cache))

    def hidden_ahead(self, hidden, tokens, positions=None, cache=None) -> Tensor:
        """What lm_head reads for the token after `tokens`, without a pass of all layers (see Ahead).

        hidden (B, T, D): what hidden() gave for each token of a text, or hidden_ahead() for a guess; tokens
        (B, T): those that followed them; positions: those of hidden; cache: from new_layer_cache.
        """
        x = self.ahead(hidden, self.token_embed(tokens))  # (B, T, D)
        return self.ahead.final_norm(self.through([self.ahead.layer], x, positions, cache and [cache]))

    def through(self, layers, x: Tensor, positions: Tensor | None, cache: "Cache | None") -> Tensor:
        if positions is not None and cache is None:
            raise ValueError("positions are slots of a cache: give the cache too")
        mask = None
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])  # (B, T)
        else:
            mask = causal_mask(positions, cache[0].latent.shape[2])  # (B, 1, T, S)
        rotation = rope(positions, self.config)  # each (B, 1, T, R // 2)
        for n, layer in enumerate(layers):
            x = layer(x, rotation, mask, positions, cache[n] if cache else None)
        return x

    def new_cache(self, batch_size: int, num_slots: int) -> "Cache":
        """An empty cache, of the weights' dtype and device, for `batch_size` rows of `num_slots` tokens."""
        return tuple(self.new_layer_cache(batch_size, num_slots) for _ in self.layers)

    def new_layer_cache(self, batch_size: int, num_slots: int) -> "LayerCache":
        width = self.config.d_latent + self.config.rotary_dim
        return LayerCache(self.token_embed.weight.new_zeros(batch_size, 1, num_slots, width))

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


class Ahead(nn.Module):
    """Multi-token prediction (V3, section 2.2, eqs. 21 to 23): from a token's hidden state and the token that
    followed it, what the state there would be, for the price of one layer.

    Why: in training each place learns from two tokens. In use it drafts (runs_ss): most of what the model
    will say next is known from its own state, and the layer is 1 of 61. The head is the model's.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.token_norm = RMSNorm(config.d_model, config.norm_eps)
        self.hidden_norm = RMSNorm(config.d_model, config.norm_eps)
        self.join_proj = nn.Linear(2 * config.d_model, config.d_model, bias=False)
        self.layer = Layer(config, config.num_layers)
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, hidden, x):
        return self.join_proj(torch.cat([self.token_norm(x), self.hidden_norm(hidden)], dim=-1))


class Layer(nn.Module):
    """Norm, sublayer, add: pre-norm, so that from the embedding to final_norm x meets nothing but additions.

    Differs from qwen3: its feed-forward is a mixture of experts.
    """

    def __init__(self, config: Config, number: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        is_dense = number in config.dense_layers
        self.ffn = FeedForward(config.d_model, config.d_ff) if is_dense else Experts(config)

    def forward(self, x, rotation, mask, positions, cache):
        x = x + self.attn(self.attn_norm(x), rotation, mask, positions, cache)
        return x + self.ffn(self.ffn_norm(x))


class Attention(nn.Module):
    """Latent attention: the keys and values of all heads are made from one vector c of r numbers (V2, eq. 9).

    Head h has the key (K_h c, k_rope) and the value V_h c, with matrices K_h (d, r) and V_h (v, r). Moving
    these matrices from the slots s to the query and to the output gives the same numbers:

        expanded   score_s = q . (K_h c_s) + q_rope . k_rope_s      out = sum_s prob_s (V_h c_s)
        absorbed   score_s = (K_h^T q) . c_s + q_rope . k_rope_s    out = V_h (sum_s prob_s c_s)

    Absorbed, the H heads read the same (c, k_rope): key and value of a single head, and all that the cache
    keeps. A query then costs 2 r + R multiplications a slot and head, not d + R + v, but no slot is expanded,
    which costs r (d + v). So a step is absorbed, a prompt expanded: V3 breaks even at 170 queries.
    Why RoPE has features of its own: a rotation between q and K_h, another at each slot, would not let K_h
    through.
    Differs from qwen3_moe: all of the above.
    """

    def __init__(self, config: Config):
        super().__init__()
        D, H, n, r = config.d_model, config.num_heads, config.d_query, config.d_latent
        d, R, v = config.head_dim, config.rotary_dim, config.value_dim
        self.sizes, self.scale = (d, R, v, r), score_scale(config)
        self.q_proj = nn.Linear(D, H * (d + R), bias=False) if n is None else None
        if n is not None:
            self.q_down_proj = nn.Linear(D, n, bias=False)
            self.q_norm = RMSNorm(n, 1e-6)  # whatever norm_eps is
            self.q_up_proj = nn.Linear(n, H * (d + R), bias=False)
        self.kv_down_proj = nn.Linear(D, r + R, bias=False)
        self.kv_norm = RMSNorm(r, 1e-6)
        self.kv_up = nn.Parameter(torch.empty(H, d + v, r))  # K_h above V_h; no Linear: both ways read it
        self.o_proj = nn.Linear(H * v, D, bias=False)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        rotation: tuple[Tensor, Tensor],  # each (B, 1, T, R // 2): cosines and sines
        mask: Tensor | None,  # (B, 1, T, S) or None: True = attend; None = causal among these T
        positions: Tensor,  # (B, T)
        cache: "LayerCache | None",
    ) -> Tensor:
        B, T, _ = x.shape
        H, (d, R, v, r) = len(self.kv_up), self.sizes
        if self.q_proj is None:
            q = self.q_up_proj(self.q_norm(self.q_down_proj(x)))  # (B, T, H * d + H * R)
        else:
            q = self.q_proj(x)  # (B, T, H * d + H * R)
        q = q.view(B, T, H, d + R).transpose(1, 2)  # (B, H, T, d + R)
        q, q_rope = q.split([d, R], dim=-1)  # (B, H, T, d), (B, H, T, R)
        c, k_rope = self.kv_down_proj(x)[:, None].split([r, R], dim=-1)  # (B, 1, T, r), (B, 1, T, R)
        q_rope, k_rope = rotate(q_rope, *rotation), rotate(k_rope, *rotation)
        latent = torch.cat([self.kv_norm(c), k_rope], dim=-1)  # (B, 1, T, r + R)

        if cache is not None:
            cache.write(latent, positions)
        # Without a mask this is a text's beginning, which attends to its own latents alone.
        if mask is not None:
            latent = cache.latent  # (B, 1, S, r + R)
        few = mask is not None and T * (2 * r - d - v) < r * (d + v)
        out = (self.absorbed if few else self.expanded)(q, q_rope, latent, mask)  # (B, H, T, v)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def expanded(self, q: Tensor, q_rope: Tensor, latent: Tensor, mask: Tensor | None) -> Tensor:
        H, (d, R, v, r) = len(self.kv_up), self.sizes
        c, k_rope = latent.split([r, R], dim=-1)  # (B, 1, S, r), (B, 1, S, R)
        kv = F.linear(c[:, 0], self.kv_up.flatten(0, 1))  # (B, S, H * d + H * v)
        kv = kv.unflatten(-1, (H, d + v)).transpose(1, 2)  # (B, H, S, d + v)
        k, value = kv.split([d, v], dim=-1)  # (B, H, S, d), (B, H, S, v)
        q = torch.cat([q, q_rope], dim=-1)  # (B, H, T, d + R)
        k = torch.cat([k, k_rope.expand(-1, H, -1, -1)], dim=-1)  # (B, H, S, d + R)
        # The fused kernel takes values that are as wide as keys.
        value = F.pad(value, (0, d + R - v))  # (B, H, S, d + R)
        out = F.scaled_dot_product_attention(q, k, value, mask, is_causal=mask is None, scale=self.scale)
        return out[..., :v]  # (B, H, T, v)

    def absorbed(self, q: Tensor, q_rope: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
        H, (d, _, v, r) = len(self.kv_up), self.sizes
        k_up, v_up = self.kv_up.split([d, v], dim=1)  # (H, d, r), (H, v, r)
        q = torch.cat([q @ k_up, q_rope], dim=-1)  # (B, H, T, r + R)
        # To the fused kernel these are H * T queries of one head, whose value is all of the key.
        rows = q.flatten(1, 2)[:, None]  # (B, 1, H * T, r + R)
        mask = mask.repeat(1, 1, H, 1)  # (B, 1, H * T, S)
        out = F.scaled_dot_product_attention(rows, latent, latent, mask, scale=self.scale)
        return out.view(q.shape)[..., :r] @ v_up.mT  # (B, H, T, v)


class Experts(nn.Module):
    """A shared feed-forward, and of E narrow ones the A that a token's router scores best, by their weights.

    Differs from qwen3_moe: the shared one, and how the router scores and chooses.
    Why shared: what every token needs is learnt once, and the others are left to what tokens differ in.
    Why a bias: a router soon sends most tokens to few experts. Training moves an expert's bias down where it
    had too many, up where too few (V3, eq. 16); it decides who is chosen, and the weights are without it.
    Why groups: each lies on a machine of its own, and a token travels to g of them only.
    """

    def __init__(self, config: Config):
        super().__init__()
        D, E, f = config.d_model, config.num_experts, config.d_expert
        self.config, self.num_active = config, config.num_active_experts
        self.router = nn.Linear(D, E, bias=False)
        self.router_bias = nn.Parameter(torch.zeros(E)) if config.sigmoid_scores else None
        self.shared = FeedForward(D, config.num_shared_experts * f)
        self.experts = nn.ModuleList(FeedForward(D, f) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (t, D)
        weights, chosen = self.route(tokens)  # each (t, A)
        out = (weights[..., None] * self.run(tokens, chosen)).sum(dim=1)  # (t, D)
        return self.shared(x) + out.view_as(x)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, numbers) of each token's A experts; scores are in fp32 whatever the dtype."""
        config = self.config
        logits = F.linear(tokens.float(), self.router.weight.float())  # (t, E)
        scores = logits.sigmoid() if config.sigmoid_scores else logits.softmax(dim=-1)
        ranks = scores + self.router_bias if config.sigmoid_scores else scores
        if config.num_active_groups < config.num_groups:
            groups = ranks.unflatten(-1, (config.num_groups, -1))  # (t, G, E // G)
            best = best_groups(groups, config.num_active_groups, 1 + config.sigmoid_scores)  # (t, G, 1)
            ranks = groups.masked_fill(~best, -math.inf).flatten(1)  # (t, E)
        chosen = ranks.topk(config.num_active_experts).indices  # (t, A)
        weights = scores.gather(1, chosen)  # (t, A)
        if config.normalize_weights:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return (config.weight_scale * weights).type_as(tokens), chosen

    def run(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Each token through its experts: all tokens of an expert at once, so that it is read once."""
        order = chosen.flatten().argsort()  # (t * A,): those of expert 0 first
        counts = F.one_hot(chosen, self.config.num_experts).sum(dim=(0, 1))  # (E,)
        groups = zip(self.experts, tokens.index_select(0, order // chosen.shape[1]).split(counts.tolist()))
        # Whom no token chose does not run; while a tracer is at work, who knows no count, all do.
        out = [expert(group) for expert, group in groups if torch.compiler.is_compiling() or len(group)]
        return torch.cat(out).index_select(0, order.argsort()).unflatten(0, chosen.shape)  # (t, A, D)


def best_groups(
    ranks: Tensor,  # (t, G, E // G)
    number: int,
    count: int,
) -> Tensor:
    """The `number` groups whose `count` best experts have the largest sum; V3 counts two, V2 one.

    >>> ranks = torch.tensor([[[0.9, 0.1], [0.5, 0.6]]])  # sums of 1.0 and 1.1
    >>> best_groups(ranks, 1, 2).flatten(), best_groups(ranks, 1, 1).flatten()
    (tensor([False,  True]), tensor([ True, False]))
    """
    best = ranks.topk(count).values.sum(dim=-1).topk(number).indices  # (t, g)
    return torch.zeros_like(ranks[..., 0], dtype=torch.bool).scatter(1, best, True)[..., None]  # (t, G, 1)


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

    Differs from qwen3_moe: they are for R features, not d.
    In fp32 whatever the weights' dtype: bf16 has 8 bits of precision and cannot tell position 256 from 257.
    """
    theta = rope_frequencies(config, positions.device)  # (R // 2,)
    angles = positions[:, None, :, None].float() * theta  # (B, 1, T, R // 2)
    scale = config.rope_scaling.rotation_scale if config.rope_scaling else 1.0
    return angles.cos() * scale, angles.sin() * scale


def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """Radians per position: theta_i = base ** (-2 i / R) for pair i (Su et al. 2021, section 3.2.2).

    Differs from qwen3_moe: R in place of d.
    """
    R, scaling = config.rotary_dim, config.rope_scaling
    theta = 1.0 / config.rope_base ** (torch.arange(0, R, 2, device=device).float() / R)  # (R // 2,)
    if scaling is None:
        return theta

    turns = scaling.fast_turns, scaling.slow_turns
    lengths = (scaling.original_max_seq_len / (2 * math.pi * n) for n in turns)  # positions per radian
    fast, slow = (R * math.log(length) / (2 * math.log(config.rope_base)) for length in lengths)
    last_fast, first_slow = max(math.floor(fast), 0), min(math.ceil(slow), R - 1)
    pairs = torch.arange(R // 2, device=device)  # (R // 2,)
    slowed = ((pairs - last_fast) / max(first_slow - last_fast, 0.001)).clamp(0, 1)
    return (1 - slowed) * theta + slowed * theta / scaling.factor


def score_scale(config: Config) -> float:
    """What q . k is multiplied by: 1 / sqrt(d + R), with YaRN times (0.1 score_mscale ln(factor) + 1)^2.

    rotation_scale would sharpen what R of the d + R features say; this is for all. In V3 it is 1.87.
    """
    scale, scaling = (config.head_dim + config.rotary_dim) ** -0.5, config.rope_scaling
    if scaling is None or scaling.score_mscale is None or scaling.factor <= 1:
        return scale
    return scale * (0.1 * scaling.score_mscale * math.log(scaling.factor) + 1.0) ** 2


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x1_i, x2_i) of a head in its plane (Su et al. 2021, eq. 34).

    Differs from qwen3_moe: published files pair neighbours, (2i, 2i + 1); conversion reorders their rows.
    """
    x1, x2 = x.chunk(2, dim=-1)  # each (..., R // 2)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).type_as(x)


class LayerCache(NamedTuple):
    """What one layer keeps of the past; slot s holds the token at position s.

    Differs from transformer_lm: c and k_rope in place of the keys and values of all heads.
    """

    latent: Tensor  # (B, 1, S, r + R)

    def write(self, latent: Tensor, positions: Tensor):
        assert latent.shape[2] <= self.latent.shape[2], "more tokens than the cache has slots"
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]  # (B, 1)
        # Indexed by (B, 1) and (B, T), the left side is (B, T, 1, r + R).
        self.latent[rows, :, positions] = latent.transpose(1, 2)  # (B, 1, S, r + R)


# Differs from transformer: there is no memory, only the past.
Cache = tuple[LayerCache, ...]  # one per layer
