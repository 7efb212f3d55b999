"""gpt-oss: experts, windows in every other layer, and sinks that take what no token wants.

New against qwen3_moe:
- a sink per head: one logit more under the softmax, learned, with no token behind it
- a window of 128 tokens in the even layers, full attention in the odd ones
- experts with biases and another SwiGLU: clamped, and with a path that is open before training
- a router with biases, whose softmax runs over the chosen experts alone
- biases on q, k, v and o; no norms on q and k
- YaRN always on, its ramp between pair numbers that are not rounded
Papers: OpenAI 2025 (gpt-oss model card, section 2), Xiao et al. 2023 (sinks), Peng et al. 2023 (YaRN).

    tokens (B, T)
      x = token_embed(tokens)
      repeat L times:
        x = x + attn(attn_norm(x))    RoPE turns q and k; softmax over the scores and the head's sink
        x = x + ffn(ffn_norm(x))      weight_1 expert_1(x) + ... + weight_A expert_A(x), the router's choice
      hidden = final_norm(x)
    logits (B, T, V) = lm_head(hidden)

The 20B has 20.9 billion parameters, of which a token reads 3.6. In bf16 its cache takes 24.6 KB a token, and
the windows' half of it ends at 3.1 MB. The cache is used as in gemma3.py.

Shapes: B batch, T positions in this call, S positions attended, W slots of a layer's cache, t tokens of a
    call (B T).
Proof: tests/test_gpt_oss.py, against `transformers`. Picture: python show_structure.py gpt-oss-20b
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUERIES = 64  # that attend at once: their scores fit into the caches of a processor, and memory stays small


@dataclass(frozen=True)
class RopeScaling:
    """YaRN's change of the RoPE frequencies (Peng et al. 2023, section 3).

    Differs from qwen3_moe: no choice, and a context of training that is much shorter than the texts.
    """

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
    rope_scaling: RopeScaling

    def __post_init__(self):
        assert self.num_heads % self.num_kv_heads == 0, "num_kv_heads must divide num_heads"
        assert self.head_dim % 2 == 0, "head_dim must be even, since RoPE turns pairs"
        assert self.num_active_experts <= self.num_experts, "num_active_experts is more than num_experts"


class Model(nn.Module):
    """Differs from qwen3_moe: no masks here, since layers with and without a window need different ones."""

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

    def hidden(
        self,
        tokens: Tensor,  # (B, T)
        positions: Tensor | None = None,  # (B, T) or None
        cache: "Cache | None" = None,
    ) -> Tensor:
        """What lm_head reads. Generation calls this and applies the head only where it picks a token.

        cache: from new_cache, written in place; None: nothing is kept.
        positions: where the tokens of a row stand, one behind the other, then -1 for pads, of which nothing
            is kept. A row begins behind the last token that it has read, or up to num_undo tokens earlier.
            None: these are the text's first T.
        """
        B, T = tokens.shape
        if positions is not None and cache is None:
            raise ValueError("positions are slots of a cache: give the cache too")
        is_start = positions is None
        if is_start:
            positions = torch.arange(T, device=tokens.device).expand(B, T)  # (B, T)
        elif not torch.compiler.is_compiling():  # which looks at no data
            check_start(positions[:, 0], cache[0].held, self.config.window)

        rotation = rope(positions, self.config)  # each (B, 1, T, d // 2)
        x = self.token_embed(tokens)  # (B, T, D)
        for n, layer in enumerate(self.layers):
            x = layer(x, rotation, positions, is_start, cache[n] if cache else None)
        return self.final_norm(x)

    def new_cache(self, batch_size: int, num_slots: int, num_undo: int = 0) -> "Cache":
        """An empty cache, of the weights' dtype and device, for `batch_size` rows of `num_slots` tokens.

        num_undo: how many tokens earlier than the last one a call may begin; windows keep so many more.
        """
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
    """Norm, sublayer, add: pre-norm, so that from the embedding to final_norm x meets nothing but additions.

    Differs from qwen3_moe: every layer has experts, and the even ones a window.
    """

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

    Three scores of 2, 0 and 0, without a sink and with one of logit 2:

    >>> scores = torch.tensor([2.0, 0.0, 0.0])
    >>> [round(p, 2) for p in scores.softmax(dim=-1).tolist()]
    [0.79, 0.11, 0.11]
    >>> [round(p, 2) for p in torch.tensor([2.0, 0.0, 0.0, 2.0]).softmax(dim=-1)[:-1].tolist()]
    [0.44, 0.06, 0.06]
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

    def new_cache(self, batch_size: int, num_slots: int, num_undo: int) -> "LayerCache":
        num_kept = num_slots if self.window is None else min(num_slots, self.window + num_undo)
        shape = (batch_size, self.num_kv_heads, num_kept + 1, self.head_dim)
        held = torch.full(shape[::2], -1, device=self.sinks.device)  # (B, W)
        return LayerCache(self.sinks.new_zeros(shape), self.sinks.new_zeros(shape), held)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        rotation: tuple[Tensor, Tensor],  # each (B, 1, T, d // 2): cosines and sines
        positions: Tensor,  # (B, T)
        is_start: bool,
        cache: "LayerCache | None",
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        q, k = rotate(q, *rotation), rotate(k, *rotation)

        k, v, held = self.keep(k, v, positions, is_start, cache)  # (B, K, S, d), (B, K, S, d), (B, S)
        outs = []
        for queries, places in zip(q.split(QUERIES, dim=2), positions.split(QUERIES, dim=1)):
            outs.append(attend(queries, k, v, can_see(places, held, self.window), self.sinks))
        out = torch.cat(outs, dim=2)  # (B, H, T, d)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def keep(self, k, v, positions, is_start, cache):
        """Write the new keys and values, and return all that is there to be seen, with its positions."""
        new = k, v, positions  # which is all there is of a text that begins
        if cache is None:
            return new
        if self.window is None:
            assert k.shape[2] < cache.k.shape[2], "more tokens than the cache has slots"
            cache.write(*new)
            return new if is_start else cache
        # A ring is read before it is written, since the new may take the place of what its first tokens see.
        seen = new if is_start else cache.joined(*new)  # (B, K, S, d), (B, K, S, d), (B, S)
        cache.write(*new)
        return seen


def attend(
    q: Tensor,  # (B, H, T, d)
    k: Tensor,  # (B, K, S, d)
    v: Tensor,  # (B, K, S, d)
    mask: Tensor,  # (B, 1, T, S): True = attend
    sinks: Tensor,  # (H,)
) -> Tensor:
    """What scaled_dot_product_attention does, with a column more in the scores: the sink's.

    All its scores are there at once, so that it is called for a few queries, not for a whole text.
    """
    B, H, T, d = q.shape
    q = q.reshape(B, k.shape[1], -1, d)  # (B, K, H // K * T, d): beside each other, who shares a key
    scores = (q @ k.mT / math.sqrt(d)).view(B, H, T, -1)  # (B, H, T, S)
    scores = scores.masked_fill(~mask, -math.inf)
    column = sinks[:, None, None].expand(B, H, T, 1)  # (B, H, T, 1)
    probs = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]  # (B, H, T, S)
    out = probs.reshape(B, k.shape[1], -1, k.shape[2]) @ v  # (B, K, H // K * T, d)
    return out.view(B, H, T, d)  # (B, H, T, d)


def can_see(positions: Tensor, held: Tensor, window: int | None) -> Tensor:
    """Whether a token may look at a key: not ahead, not behind the window, not where no token is (-1).

    1 = it may, for four tokens of a text in a window of 2, and for the token after them without a window:

    >>> text = torch.tensor([[0, 1, 2, 3]])
    >>> 1 * can_see(text, text, 2)[0, 0]
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1]])
    >>> 1 * can_see(torch.tensor([[4]]), torch.tensor([[0, 1, 2, 3, 4, -1]]), None)[0, 0]
    tensor([[1, 1, 1, 1, 1, 0]])
    """
    behind = positions[:, None, :, None] - held[:, None, None]  # (B, 1, T, S)
    mask = (behind >= 0) & (held >= 0)[:, None, None]  # (B, 1, T, S)
    return mask if window is None else mask & (behind < window)  # (B, 1, T, S)


class Experts(nn.Module):
    """E feed-forwards, of which a token passes through the A that a linear map of it, the router, prefers.

    Differs from qwen3_moe: the router has biases, and the softmax runs over the scores of the chosen, which
    is the same as over all E and then made to add up to 1.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.num_active = config.num_active_experts
        self.router = nn.Linear(config.d_model, config.num_experts)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (t, D)
        weights, chosen = self.route(tokens)  # each (t, A)
        out = self.run(tokens, chosen)  # (t, A, D)
        return (weights[..., None] * out).sum(dim=1).view_as(x)  # (B, T, D)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the numbers of each token's A experts; the softmax is in fp32."""
        scores, chosen = self.router(tokens).topk(self.num_active)  # each (t, A)
        weights = scores.softmax(dim=-1, dtype=torch.float32)  # (t, A)
        return weights.type_as(tokens), chosen

    def run(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Each token through its experts: all tokens of an expert at once, so that it is read once."""
        order = chosen.flatten().argsort()  # (t * A,): those of expert 0 first
        counts = F.one_hot(chosen, len(self.experts)).sum(dim=(0, 1))  # (E,)
        groups = zip(self.experts, tokens[order // self.num_active].split(counts.tolist()))
        # Whom no token chose is not read. While torch.export traces, no count is known: all run.
        traces = torch.compiler.is_compiling()
        out = [expert(group) for expert, group in groups if traces or len(group)]
        return torch.cat(out)[order.argsort()].unflatten(0, chosen.shape)  # (t, A, D)


class FeedForward(nn.Module):
    """One expert: a SwiGLU whose gate opens faster and whose numbers are clamped.

    Differs from qwen3_moe: limits, biases, and z sigmoid(1.702 z) in place of silu(z), which is nearly GELU.
    Why up + 1: where up is near 0, as before training, what the gate lets through still comes through.
    Why limits: a product of two large numbers is huge, and in few bits it drowns the others of its sum. A
    gate needs no limit below, where z sigmoid(1.702 z) goes to 0 by itself.
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
    """Cosine and sine of every rotation angle, position times frequency, both larger by YaRN's scale.

    Differs from qwen3_moe: YaRN is always on.
    In fp32 whatever the weights' dtype: bf16 has 8 bits of precision and cannot tell position 256 from 257.
    """
    theta = rope_frequencies(config, positions.device)  # (d // 2,)
    angles = positions[:, None, :, None].float() * theta  # (B, 1, T, d // 2)
    scale = config.rope_scaling.rotation_scale
    return angles.cos() * scale, angles.sin() * scale


def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """Radians per position: theta_i = base ** (-2 i / d) for pair i, slowed down by YaRN.

    Differs from qwen3_moe: the line from fast to slow begins and ends between two pairs where it falls so.
    With d = 64, base 150,000 and 4,096 positions it runs from pair 8.1 to pair 17.4; rounded to whole pairs,
    as in Qwen3 (`truncate`), from 8 to 18, and ten pairs would turn at another speed.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim  # (d // 2,)
    theta = 1.0 / config.rope_base**exponent
    scaling = config.rope_scaling
    last_fast = max(pair_that_turns(scaling.fast_turns, config), 0)
    first_slow = min(pair_that_turns(scaling.slow_turns, config), config.head_dim - 1)
    pairs = torch.arange(config.head_dim // 2, device=device)  # (d // 2,)
    slowed = ((pairs - last_fast) / max(first_slow - last_fast, 0.001)).clamp(0, 1)
    return (1 - slowed) * theta + slowed * theta / scaling.factor


def pair_that_turns(turns: float, config: Config) -> float:
    """The number i, not whole, of the pair that turns `turns` times in the context of training.

    Differs from qwen3: there is the equation, with an example.
    """
    context = config.rope_scaling.original_max_seq_len / (2 * math.pi * turns)
    return config.head_dim * math.log(context) / (2 * math.log(config.rope_base))


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
    """The keys and values of one layer's past. With a window it is a ring: the token at position p has slot
    p % (W - 1), where another stood that no one sees any more. Without, the ring is as large as the text.

    The last slot takes what is not to be kept: pads, and of a call longer than the ring its beginning.
    Differs from qwen3_moe: slots say what they hold, and so what a query sees is one rule for both kinds.
    """

    k: Tensor  # (B, K, W, d)
    v: Tensor  # (B, K, W, d)
    held: Tensor  # (B, W): the position of the token in each slot, -1 where there is none

    def write(self, k: Tensor, v: Tensor, positions: Tensor):
        num_slots = self.held.shape[1] - 1
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]  # (B, 1)
        last = positions.amax(dim=1, keepdim=True)  # (B, 1)
        is_kept = (positions >= 0) & (positions > last - num_slots)  # (B, T)
        slots = torch.where(is_kept, positions % num_slots, num_slots)  # (B, T)
        # Indexed by (B, 1) and (B, T), the first two left sides are (B, T, K, d).
        self.k[rows, :, slots] = k.transpose(1, 2)  # (B, K, W, d)
        self.v[rows, :, slots] = v.transpose(1, 2)  # (B, K, W, d)
        self.held[rows, slots] = torch.where(is_kept, positions, -1)  # (B, W)

    def joined(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is held and what is new; of a rejected draft, which the new stands in place of, nothing."""
        held = torch.where(self.held < positions[:, :1], self.held, -1)  # (B, W)
        k, v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)  # each (B, K, S, d)
        held = torch.cat([held, positions], dim=1)  # (B, S)
        return k, v, held


# Differs from transformer: there is no memory, only the past.
Cache = tuple[LayerCache, ...]  # one per layer


def check_start(start: Tensor, held: Tensor, window: int):
    """A ring forgets: a row may begin only where the window before it is still there."""
    behind = start[:, None] - held  # (B, W)
    num_there = ((behind > 0) & (behind < window) & (held >= 0)).sum(dim=1)  # (B,)
    is_lost = num_there < start.clamp(max=window - 1)  # (B,)
    if is_lost.any():
        row = is_lost.long().argmax().item()
        raise ValueError(
            f"row {row} begins at position {start[row].item()}, where the cache no longer holds what its "
            "window sees; go on behind the last token, or give new_cache a larger num_undo"
        )
