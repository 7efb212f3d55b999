"""gpt-oss: experts, windows in every other layer, and sinks that take what no token wants.

New against qwen3_moe:
- a sink per head: one logit more under the softmax, learned, with no token behind it
- a window of 128 tokens in every other layer, from the first on; its cache is a ring that stops growing
- experts with another SwiGLU, clamped, and a router whose softmax runs over the chosen alone
- biases on q, k, v and o, on the router and in the experts; no norms on q and k
- YaRN always on, its line between pair numbers that are not rounded
Papers: OpenAI 2025 (gpt-oss model card, section 2), Xiao et al. 2023 (sinks), Peng et al. 2023 (YaRN).

    tokens (B, T)
      x = token_embed(tokens)
      repeat L times:
        x = x + attn(attn_norm(x))    RoPE turns q and k; softmax over the scores and the head's sink
        x = x + ffn(ffn_norm(x))      weight_1 expert_1(x) + ... + weight_A expert_A(x), the router's choice
      hidden = final_norm(x)
    logits (B, T, V) = lm_head(hidden)

The 20B has 20.9 billion parameters, of which a token reads 3.6. In the cache a token takes 2 K d = 1,024
numbers a layer: at 131,072 tokens the 12 full layers keep 3.2 GB in bf16, the 12 windows 4.7 MB.

Shapes: B batch, T positions in this call, S positions attended, s slots of a layer's cache, t tokens: B T.
Proof: tests/test_gpt_oss.py, against `transformers`. Picture: python show_structure.py gpt-oss-20b
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUERIES = 64  # that attend at once: their scores stay in a core's cache, and a ring has room for their keys


@dataclass(frozen=True)
class RopeScaling:
    """Differs from qwen3_moe: always on, since the texts are longer than those of most of the training."""

    factor: float  # how many times longer a text may be: 32 for 131,072 tokens
    original_max_seq_len: int  # the context of most of the training (4,096)
    fast_turns: float  # pairs that turn more often than this in that context stay as they are (beta: 32)
    slow_turns: float  # pairs that turn less often are slowed by factor (alpha: 1)
    rotation_scale: float  # of q and k each, so that scores grow by its square: 0.1 ln(factor) + 1


@dataclass(frozen=True)
class Config:
    """Differs from qwen3_moe: a window, the two numbers of the experts' SwiGLU, and fewer choices."""

    vocab_size: int  # V: 201,088
    max_seq_len: int  # M: 131,072; RoPE itself has no limit
    d_model: int  # D: 2,880 in both sizes
    num_layers: int  # L: 24 in the 20B, 36 in the 120B
    num_heads: int  # H: query heads, 64 in both sizes
    num_kv_heads: int  # K: key/value heads, 8 in both sizes, a divisor of H
    head_dim: int  # d: 64 in both sizes
    window: int  # how many tokens a token of an even layer sees, itself among them (128)
    d_expert: int  # f: 2,880 in both sizes
    num_experts: int  # E: 32 in the 20B, 128 in the 120B
    num_active_experts: int  # A: how many of them a token passes through, 4 in both sizes
    swiglu_alpha: float  # how steeply an expert's gates open (1.702)
    swiglu_limit: float  # what an expert's gates and values are clamped to (7)
    norm_eps: float  # keeps RMSNorm from dividing by zero
    rope_base: float  # the larger, the slower the slowest rotation; 150,000
    rope_scaling: RopeScaling  # YaRN, which takes 4,096 positions of training to 131,072

    def __post_init__(self):
        assert self.num_heads % self.num_kv_heads == 0, "num_kv_heads must divide num_heads"
        assert self.head_dim % 2 == 0, "head_dim must be even, since RoPE turns pairs"
        assert self.num_active_experts <= self.num_experts, "num_active_experts is more than num_experts"


class Model(nn.Module):
    """Differs from qwen3_moe: layers of two kinds, and no mask for all of them here."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_layers))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,  # (B, T)
        positions: Tensor | None = None,  # (B, T) or None
        cache: "Cache | None" = None,
    ) -> Tensor:
        """Logits for the token that follows each token; arguments as for hidden."""
        return self.lm_head(self.hidden(tokens, positions, cache))  # (B, T, V)

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, cache: "Cache | None" = None) -> Tensor:
        """What lm_head reads. Generation calls this and applies the head only where it picks a token.

        positions: (B, T), where the tokens of a row stand, one behind the other, then -1 for pads, of which
            nothing is kept. A row begins behind the last token that it has read, or up to num_undo tokens
            earlier. None: these are the text's first T.
        """
        if positions is not None and cache is None:
            raise ValueError("positions are slots of a cache: give the cache too")
        is_start = positions is None
        if is_start:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)  # (B, T)
        if cache is not None and not torch.compiler.is_compiling():  # which looks at no data
            check_positions(positions, cache, self.config.window)
        rotation = rope(positions, self.config)  # each (B, 1, T, d // 2)
        x = self.token_embed(tokens)  # (B, T, D)
        for n, layer in enumerate(self.layers):
            x = layer(x, rotation, positions, is_start, cache[n] if cache else None)
        return self.final_norm(x)

    def new_cache(self, batch_size: int, num_slots: int, num_undo: int = 0) -> "Cache":
        """An empty cache for rows of `num_slots` tokens, which may go back `num_undo`, as after a draft."""
        return tuple(layer.attn.new_cache(batch_size, num_slots, num_undo) for layer in self.layers)

    @torch.no_grad()
    def init_weights(self):
        """Fresh weights for training: the paper gives no scheme; 0.02 is what the published configs name."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)


class Layer(nn.Module):
    """Differs from qwen3_moe: every layer has experts, and every other one, from the first on, a window."""

    def __init__(self, config: Config, number: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config, config.window if number % 2 == 0 else None)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = Experts(config)

    def forward(self, x, rotation, positions, is_start, cache):
        x = x + self.attn(self.attn_norm(x), rotation, positions, is_start, cache)
        return x + self.ffn(self.ffn_norm(x))


class Attention(nn.Module):
    """Grouped-query attention in which a head may attend to nothing.

    Differs from qwen3_moe: a window, sinks, biases, and no norms on q and k.
    Why sinks: a softmax's probabilities add up to 1, so that a head with nothing to say still has to look
    somewhere. Training then makes a sink of the text's first token, and a window that leaves it behind spoils
    the model (Xiao et al. 2023). A sink of the head's own is always there. With the logit s it takes
    exp(s) / (exp(s) + sum of exp(scores)), and what it takes is gone: a gate, open where a score is above s.
    Three scores beside a sink of logit 2, without which the first would take 0.79:

    >>> torch.tensor([2.0, 0.0, 0.0, 2.0]).softmax(dim=-1)[:-1]
    tensor([0.4404, 0.0596, 0.0596])
    """

    def __init__(self, config: Config, window: int | None):
        super().__init__()
        D, H, K, d = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim, self.window = H, K, d, window
        self.q_proj = nn.Linear(D, H * d)
        self.k_proj = nn.Linear(D, K * d)
        self.v_proj = nn.Linear(D, K * d)
        self.o_proj = nn.Linear(H * d, D)
        self.sinks = nn.Parameter(torch.zeros(H))

    def forward(self, x, rotation, positions, is_start, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        q, k = rotate(q, *rotation), rotate(k, *rotation)

        outs = []
        for start in range(0, T, QUERIES):
            some = slice(start, start + QUERIES)
            if cache is not None:
                cache.write(k[:, :, some], v[:, :, some], positions[:, some])
            # At a text's start its own keys are all there is, and the rest of the cache need not be read.
            keys, values, held = (k, v, positions) if is_start else cache
            mask = can_see(positions[:, some], held, self.window)  # (B, 1, T, S)
            outs.append(attend(q[:, :, some], keys, values, mask, self.sinks))
        return self.o_proj(torch.cat(outs, dim=2).transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def new_cache(self, batch_size: int, num_slots: int, num_undo: int) -> "LayerCache":
        if self.window is not None:
            num_slots = min(num_slots, self.window + max(QUERIES, num_undo))
        shape = (batch_size, self.num_kv_heads, num_slots + 1, self.head_dim)
        held = torch.full(shape[::2], -1, device=self.sinks.device)  # (B, s)
        return LayerCache(self.sinks.new_zeros(shape), self.sinks.new_zeros(shape), held)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    """scaled_dot_product_attention with a column more in the scores, the sinks'; for q (B, H, T, d), k and v
    (B, K, S, d), mask (B, 1, T, S), sinks (H,). All scores are there at once: a whole text has too many.
    """
    B, H, T, d = q.shape
    q = q.reshape(B, k.shape[1], -1, d)  # (B, K, H // K * T, d): beside each other, who shares a key
    scores = (q @ k.mT / math.sqrt(d)).view(B, H, T, -1).masked_fill(~mask, -math.inf)  # (B, H, T, S)
    column = sinks[:, None, None].expand(B, H, T, 1)  # (B, H, T, 1)
    probs = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]  # (B, H, T, S)
    return (probs.reshape(B, k.shape[1], -1, k.shape[2]) @ v).view(B, H, T, d)  # (B, H, T, d)


def can_see(positions: Tensor, held: Tensor, window: int | None) -> Tensor:
    """Whether a token attends to what is held: not ahead, not behind the window, not where no token is (-1).

    1 = attend, for positions 2 and 3 in a window of 2, and a slot that holds nothing yet:

    >>> 1 * can_see(torch.tensor([[2, 3]]), torch.tensor([[0, 1, 2, 3, -1]]), 2)[0, 0]
    tensor([[0, 1, 1, 0, 0],
            [0, 0, 1, 1, 0]])
    """
    behind = positions[:, None, :, None] - held[:, None, None]  # (B, 1, T, S)
    near = behind >= 0 if window is None else (behind >= 0) & (behind < window)  # (B, 1, T, S)
    return near & (held >= 0)[:, None, None]  # (B, 1, T, S)


class Experts(nn.Module):
    """E feed-forwards, of which a token passes through the A that a linear map of it, the router, prefers.

    Differs from qwen3_moe: the router has biases, and the softmax runs over the scores of the chosen, which
    is the same as over all E and then made to add up to 1.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.num_experts, self.num_active = config.num_experts, config.num_active_experts
        self.router = nn.Linear(config.d_model, config.num_experts)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (t, D)
        scores, chosen = self.router(tokens).topk(self.num_active)  # each (t, A)
        weights = scores.softmax(dim=-1, dtype=torch.float32).type_as(x)  # (t, A)
        out = self.run(tokens, chosen)  # (t, A, D)
        return (weights[..., None] * out).sum(dim=1).view_as(x)  # (B, T, D)

    def run(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Each token through its experts: all tokens of an expert at once, so that it is read once."""
        order = chosen.flatten().argsort()  # (t * A,): those of expert 0 first
        counts = F.one_hot(chosen, self.num_experts).sum(dim=(0, 1))  # (E,)
        groups = zip(self.experts, tokens.index_select(0, order // self.num_active).split(counts.tolist()))
        # Whom no token chose is not read. While torch.export traces, no count is known: all run.
        out = [expert(group) for expert, group in groups if torch.compiler.is_compiling() or len(group)]
        return torch.cat(out).index_select(0, order.argsort()).unflatten(0, chosen.shape)  # (t, A, D)


class FeedForward(nn.Module):
    """One expert: a SwiGLU whose gate opens faster and whose numbers are clamped.

    Differs from qwen3_moe: limits, biases, and z sigmoid(1.702 z) in place of silu(z), which is nearly GELU.
    Why up + 1: where up is near 0, as before training, the gate's number passes. Why limits: a product of two
    large numbers drowns the others of its sum in few bits; below, the gate's goes to 0 by itself.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.gate_proj = nn.Linear(config.d_model, config.d_expert)
        self.up_proj = nn.Linear(config.d_model, config.d_expert)
        self.down_proj = nn.Linear(config.d_expert, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x).clamp(max=self.limit)  # (..., f)
        up = self.up_proj(x).clamp(-self.limit, self.limit)  # (..., f)
        return self.down_proj((up + 1) * gate * torch.sigmoid(self.alpha * gate))  # (..., D)


class RMSNorm(nn.Module):
    """LayerNorm without the mean and the bias (Zhang and Sennrich 2019, eq. 4); all of it in fp32.

    Differs from qwen3_moe: it multiplies by its weight in fp32 too, and rounds once.
    """

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + self.eps)
        return (self.weight * x32).type_as(x)


def rope(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotation angle, in fp32. Differs from qwen3_moe: YaRN is always on."""
    theta = rope_frequencies(config, positions.device)  # (d // 2,)
    angles = positions[:, None, :, None].float() * theta  # (B, 1, T, d // 2)
    scale = config.rope_scaling.rotation_scale
    return angles.cos() * scale, angles.sin() * scale


def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """Radians per position: theta_i = base ** (-2 i / d) for pair i, slowed down by YaRN.

    Differs from qwen3_moe: the line from fast to slow runs over the pairs' numbers, and where its ends are
    not rounded to whole ones that is a line over the logarithm of the turns, in which the numbers are linear.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim  # (d // 2,)
    theta = 1.0 / config.rope_base**exponent
    scaling = config.rope_scaling
    turns = scaling.original_max_seq_len * theta / (2 * math.pi)  # from 652 down to 0.006
    slowed = (scaling.fast_turns / turns).log() / math.log(scaling.fast_turns / scaling.slow_turns)
    slowed = slowed.clamp(0, 1)
    return (1 - slowed) * theta + slowed * theta / scaling.factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of a head, features i and i + d/2. Differs from qwen3_moe: it says there why."""
    x1, x2 = x.chunk(2, dim=-1)  # each (..., d // 2)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).type_as(x)


class LayerCache(NamedTuple):
    """The keys and values of one layer's past: position p is in slot p % (s - 1), the last slot is for pads.

    Differs from qwen3_moe: with a window the slots are a ring, in which the new takes the place of what no
    one sees any more, and s does not grow with the text. So each slot says what it holds.
    """

    k: Tensor  # (B, K, s, d)
    v: Tensor  # (B, K, s, d)
    held: Tensor  # (B, s): the position of the token in each slot, -1 where there is none

    def write(self, k: Tensor, v: Tensor, positions: Tensor):
        num_slots = self.held.shape[1] - 1
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]  # (B, 1)
        slots = torch.where(positions >= 0, positions % num_slots, num_slots)  # (B, T)
        # Indexed by (B, 1) and (B, T), the first two left sides are (B, T, K, d).
        self.k[rows, :, slots] = k.transpose(1, 2)  # (B, K, s, d)
        self.v[rows, :, slots] = v.transpose(1, 2)  # (B, K, s, d)
        self.held[rows, slots] = positions  # (B, s)


# Differs from transformer: there is no memory, only the past.
Cache = tuple[LayerCache, ...]  # one per layer


def check_positions(positions: Tensor, cache: Cache, window: int):
    """A ring forgets: a row may begin only where the window before it is still there."""
    start, held = positions[:, :1], cache[0].held  # (B, 1), (B, s)
    num_there = ((held >= 0) & (held < start) & (held > start - window)).sum(dim=1)  # (B,)
    if (num_there < start[:, 0].clamp(max=window - 1)).any():
        raise ValueError("a row begins where its window is overwritten: give new_cache a larger num_undo")
    assert positions.max() < max(layer.held.shape[1] for layer in cache) - 1, "more tokens than slots"
