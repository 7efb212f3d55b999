"""The decoder taken apart: its components have names in a registry, and a file puts them together.

New against qwen3:
- attention, feed-forward, norm, embedding, head and sampler are components, each told its own sizes
- a .cfg names them (`confection` reads it), those of the reader too, once they are registered
- attention to a window, to every so many tokens and to the first few (SparseAttention)
- a feed-forward of experts, of which each token passes through a few (MixtureOfExperts)
- a choice of norm (LayerNorm), activation (GELU), biases, and of norms after the sums (`prenorm`)
Papers: Child et al. 2019 (strides), Beltagy et al. 2020 (windows, global tokens), Jiang et al. 2024 (experts)

    [model]                                    tokens (B, T)
    @architecture = "TransformerDecoder"         x = token_embed(tokens)           [model.embedding]
    num_layers = 28                              repeat num_layers times:
    max_length = 40960                             x = x + attn(attn_norm(x))      [model.attention]
                                                   x = x + ffn(ffn_norm(x))        [model.feedforward]
    [model.norm]                                 hidden = final_norm(x)            [model.norm], as all norms
    @normalization = "RMSNorm"                 logits (B, T, V) = lm_head(hidden)  [model.head]
    in_dim = 1024

Three ways to the same model: TransformerDecoder.from_config("configs/qwen3-0.6b.cfg"), a
TransformerDecoderBuilder, the constructors themselves. The rest of the zoo calls Model(config).

Shapes: B batch, T positions in this call, S positions attended (T, or with `positions` all slots of the
    cache), H query heads, K key/value heads, d features of a head, f width inside a feed-forward, E experts,
    A of them that a token passes through, t tokens of a call (B T).
Proof: tests/test_modular_decoder.py, against `transformers`.
Picture: python show_structure.py modular-qwen3-0.6b
"""

import configparser
import inspect
import math
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial, partialmethod
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import NamedTuple, get_args

import confection
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Components:
    """The components of one kind, by the names that files have for them."""

    def __init__(self, kind: str):
        self.kind, self.known = kind, {}

    def register(self, name: str):
        """Above a class, or a function, that makes a module: @Registry.head.register("LMHead")."""

        def keep(component):
            self.known[name] = component
            return component

        return keep

    def get(self, name: str):
        if str(name) not in self.known:
            raise ValueError(f"no {self.kind} is called {name!r}; registered: {', '.join(self.known)}")
        return self.known[name]


# `@normalization = "RMSNorm"` in a file is Registry.normalization.get("RMSNorm").
KINDS = ("architecture", "embedding", "attention", "feedforward", "normalization", "head", "sampler")
Registry = SimpleNamespace(**{kind: Components(kind) for kind in KINDS})


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
    """The [model] of a .cfg as JSON, which the zoo's configs and converted checkpoints hold.

    Differs from qwen3: parts are sections, of which each component knows the fields.
    """

    vocab_size: int  # V: 151,936 in Qwen3
    max_seq_len: int  # M: 40,960 in Qwen3; for callers, since RoPE itself has no limit
    d_model: int  # D: 1,024 in Qwen3 0.6B; a .cfg says it in each section, as in_dim, here it stands once
    num_layers: int  # L: 28 in Qwen3 0.6B
    attention: dict  # {"@attention": "PagedAttention", "num_heads": 16, ...}
    feedforward: dict  # {"@feedforward": "SwiGLU", "hidden_dim": 3072}
    norm: dict  # {"@normalization": "RMSNorm", "eps": 1e-6}
    prenorm: bool  # True since GPT-2; False: norms after the sums, as in the Transformer of 2017
    tied_head: bool  # whether lm_head and token_embed are one matrix, as in the small Qwen3

    def sections(self) -> dict:
        """What a .cfg would say: print(confection.Config({"model": config.sections()}).to_str())."""
        V, D = self.vocab_size, self.d_model
        return {
            "@architecture": "TransformerDecoder",
            "num_layers": self.num_layers,
            "max_length": self.max_seq_len,
            "prenorm": self.prenorm,
            "tied_head": self.tied_head,
            "attention": with_width(self.attention, D),
            "embedding": {"@embedding": "VocabEmbedding", "num_embeddings": V, "embedding_dim": D},
            "feedforward": with_width(self.feedforward, D),
            "head": {"@head": "LMHead", "in_dim": D, "out_dim": V},
            "norm": with_width(self.norm, D),
        }


@Registry.architecture.register("TransformerDecoder")
class TransformerDecoder(nn.Module):
    """A decoder of the components that it is given; each layer has copies of them, with weights of its own.

    The copies begin alike; init_weights, which from_config and build call, or a checkpoint tells them apart.
    """

    def __init__(
        self,
        num_layers: int,
        max_length: int,
        embedding: nn.Module,
        attention: nn.Module,
        feedforward: nn.Module,
        norm: nn.Module,
        head: nn.Module,
        sampler: "SimpleSampler | None" = None,
        prenorm: bool = True,
        tied_head: bool = False,
    ):
        super().__init__()
        V, D = embedding.weight.shape
        check_widths(D, {"attention": attention, "feedforward": feedforward, "norm": norm})
        if head.weight.shape != (V, D):
            raise ValueError(f"head is {tuple(head.weight.shape)}, where embedding is {(V, D)}")
        sizes = {"vocab_size": V, "max_seq_len": max_length, "d_model": D, "num_layers": num_layers}
        self.config = SimpleNamespace(**sizes)  # what callers ask of any decoder
        self.token_embed = embedding
        self.layers = nn.ModuleList(Layer(attention, feedforward, norm, prenorm) for _ in range(num_layers))
        self.final_norm = norm if prenorm else nn.Identity()
        self.lm_head = head
        self.sampler = sampler or SimpleSampler()
        if tied_head:
            self.lm_head.weight = self.token_embed.weight

    @classmethod
    def from_config(cls, config: "str | Path | dict", model_section="model", empty_init=False):
        """The model of a .cfg, given as a path or as text; empty_init: on the meta device, without memory."""
        with torch.device("meta") if empty_init else nullcontext():
            model = build(read_section(config, model_section), model_section)
        if not empty_init:
            model.init_weights()
        return model

    form_config = from_config  # as OSC-Transformers, which has such files, spells it

    def forward(
        self,
        tokens: Tensor,  # (B, T)
        positions: Tensor | None = None,  # (B, T) or None
        cache: "Cache | None" = None,
    ) -> Tensor:
        """Logits for the token that follows each token; arguments as for hidden."""
        return self.compute_logits(self.hidden(tokens, positions, cache))  # (B, T, V)

    def compute_logits(self, x: Tensor) -> Tensor:
        return self.lm_head(x)  # (B, T, V)

    def hidden(
        self,
        tokens: Tensor,  # (B, T)
        positions: Tensor | None = None,  # (B, T) or None
        cache: "Cache | None" = None,
    ) -> Tensor:
        """What lm_head reads. As in llama.py, positions are slots of the cache; None: a text's first."""
        B, T = tokens.shape
        if positions is not None and cache is None:
            raise ValueError("positions are slots of a cache: give the cache too")
        num_slots = None if positions is None else cache[0].k.shape[2]
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)  # (B, T)

        context = self.layers[0].attn.prepare(positions, num_slots)
        x = self.token_embed(tokens)  # (B, T, D)
        for n, layer in enumerate(self.layers):
            x = layer(x, context, cache[n] if cache else None)
        return self.final_norm(x)

    def setup(self, batch_size: int = 1, num_slots: int | None = None, device=None, dtype=None) -> "Cache":
        """Moves the weights where told, and prepares memory, by default for texts of max_length tokens."""
        self.to(device=device, dtype=dtype)
        return self.new_cache(batch_size, num_slots or self.config.max_seq_len)

    def new_cache(self, batch_size: int, num_slots: int) -> "Cache":
        """An empty cache, of the weights' dtype and device, for `batch_size` rows of `num_slots` tokens."""
        like = self.token_embed.weight
        return tuple(layer.attn.new_cache(batch_size, num_slots, like) for layer in self.layers)

    @torch.no_grad()
    def init_weights(self):
        """Fresh matrices for training, as in llama.py; scales and biases stay as components make them."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)


class Model(TransformerDecoder):
    """The same decoder, made of a Config, as the rest of the zoo asks for it.

    Differs from qwen3: its Config becomes sections, and these become parts.
    """

    def __init__(self, config: Config):
        _, parts = read_fields(config.sections(), "model")
        super().__init__(**parts)
        self.config = config


class TransformerDecoderBuilder:
    """A .cfg piece by piece: builder.set_norm(config=TEXT, section="norm") and its like, then build()."""

    def __init__(self, num_layers: int, max_length: int, prenorm: bool = True, tied_head: bool = False):
        self.sections = {"@architecture": "TransformerDecoder", "num_layers": num_layers}
        self.sections |= {"max_length": max_length, "prenorm": prenorm, "tied_head": tied_head}

    def set_part(self, part: str, config: "str | Path | dict", section: str | None = None):
        self.sections[part] = read_section(config, section or part)
        return self

    set_embedding = partialmethod(set_part, "embedding")
    set_attention = partialmethod(set_part, "attention")
    set_feedforward = partialmethod(set_part, "feedforward")
    set_norm = partialmethod(set_part, "norm")
    set_head = partialmethod(set_part, "head")
    set_sampler = partialmethod(set_part, "sampler")

    def build(self, empty_init: bool = False) -> TransformerDecoder:
        return TransformerDecoder.from_config({"model": self.sections}, empty_init=empty_init)


class Layer(nn.Module):
    """Norm, sublayer, add; without prenorm sublayer, add, norm.

    Differs from qwen3: its parts are copies of those that it is given.
    Why norms first: x then meets nothing but additions on its way up, and gradients on their way down. With
    norms after the sums, deep models need a slow start (Xiong et al. 2020).
    """

    def __init__(self, attention: nn.Module, feedforward: nn.Module, norm: nn.Module, prenorm: bool):
        super().__init__()
        self.prenorm = prenorm
        self.attn_norm, self.attn = deepcopy(norm), deepcopy(attention)
        self.ffn_norm, self.ffn = deepcopy(norm), deepcopy(feedforward)

    def forward(self, x: Tensor, context: "Context", cache: "LayerCache | None") -> Tensor:
        if self.prenorm:
            x = x + self.attn(self.attn_norm(x), context, cache)
            return x + self.ffn(self.ffn_norm(x))
        x = self.attn_norm(x + self.attn(x, context, cache))
        return self.ffn_norm(x + self.ffn(x))


class Context(NamedTuple):
    """What all layers know of a call: the first computes it, since the attention of all is the same."""

    positions: Tensor  # (B, T)
    cos: Tensor | None  # (B, 1, T, d // 2) or None: without RoPE
    sin: Tensor | None  # (B, 1, T, d // 2) or None
    mask: Tensor | None  # (B, 1, T, S) or None: True = attend; None = causal among these T
    reads_cache: bool  # False at a text's beginning, which attends to itself


@Registry.attention.register("PagedAttention")
class PagedAttention(nn.Module):
    """Grouped-query attention as in Llama and Qwen3, with all that one of them has, each to be left out.

    An attention has prepare, forward and new_cache. The memory of this one is whatever has write(k, v,
    positions) and can be taken apart into k and v: LayerCache, or, hence the name, pages of a memory that
    many texts share (Kwon et al. 2023).
    """

    def __init__(
        self,
        in_dim: int,
        num_heads: int,
        head_dim: int | None = None,
        num_query_groups: int | None = None,
        rope_base: float | None = 10_000.0,
        rope_scaling: dict | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        q_bias: bool = False,
        k_bias: bool = False,
        v_bias: bool = False,
        o_bias: bool = False,
    ):
        super().__init__()
        H, K, d = num_heads, num_query_groups or num_heads, head_dim or in_dim // num_heads
        if H % K or (rope_base and d % 2):
            raise ValueError(f"num_query_groups {K} must divide num_heads {H}, and head_dim {d} be even")
        check_widths(d, {name: norm for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)) if norm})
        self.in_dim, self.num_heads, self.num_kv_heads, self.head_dim = in_dim, H, K, d
        self.rope_base, self.rope_scaling = rope_base, read_scaling(rope_scaling)
        self.q_proj = nn.Linear(in_dim, H * d, bias=q_bias)
        self.k_proj = nn.Linear(in_dim, K * d, bias=k_bias)
        self.v_proj = nn.Linear(in_dim, K * d, bias=v_bias)
        self.o_proj = nn.Linear(H * d, in_dim, bias=o_bias)
        self.q_norm, self.k_norm = q_norm or nn.Identity(), k_norm or nn.Identity()
        self.mask = None  # all tokens up to a query's own, unless SparseAttention says otherwise

    def prepare(self, positions: Tensor, num_slots: int | None) -> Context:
        """num_slots: of the cache that is attended to; None: these tokens are a text's first."""
        cos = sin = mask = None
        if self.rope_base:
            cos, sin = rope(positions, self)  # each (B, 1, T, d // 2)
        if num_slots is not None or self.mask:
            mask = (self.mask or causal_mask)(positions, num_slots or positions.shape[1])  # (B, 1, T, S)
        return Context(positions, cos, sin, mask, reads_cache=num_slots is not None)

    def forward(self, x: Tensor, context: Context, cache: "LayerCache | None") -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_base:
            q, k = rotated(q, context.cos, context.sin), rotated(k, context.cos, context.sin)

        if cache is not None:
            cache.write(k, v, context.positions)
        if context.reads_cache:
            k, v = cache  # each (B, K, S, d)

        mask = context.mask
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def new_cache(self, batch_size: int, num_slots: int, like: Tensor) -> "LayerCache":
        shape = (batch_size, self.num_kv_heads, num_slots, self.head_dim)
        return LayerCache(k=like.new_zeros(shape), v=like.new_zeros(shape))


@Registry.attention.register("SparseAttention")
def SparseAttention(
    in_dim: int, attention: nn.Module, window: int, stride: int | None = None, num_global: int | None = None
):
    """An attention of which a token uses a part: the last `window` tokens, itself among them, those a
    multiple of `stride` back, and the first `num_global` of the text. A row for each query, # = attend:

    >>> def drawn(**options):
    ...     mask = causal_mask(torch.arange(7)[None], 7, **options)[0, 0]
    ...     return ["".join(" #"[sees] for sees in row) + "|" for row in mask.int()]
    >>> patterns = {"window": 2}, {"window": 1, "stride": 3}, {"window": 1, "num_global": 2}
    >>> for rows in zip(*(drawn(**options) for options in patterns)):
    ...     print(*rows)
    #      | #      | #      |
    ##     |  #     | ##     |
     ##    |   #    | ###    |
      ##   | #  #   | ## #   |
       ##  |  #  #  | ##  #  |
        ## |   #  # | ##   # |
         ##| #  #  #| ##    #|

    Why: a token that looks at few is cheap, and over several layers it hears of all. Here the mask only
    hides, which shows what such a model knows; speed takes kernels that leave out what is hidden.
    """
    check_widths(in_dim, {"attention": attention})
    attention.mask = partial(causal_mask, window=window, stride=stride, num_global=num_global)
    return attention


def causal_mask(positions: Tensor, num_slots: int, window=None, stride=None, num_global=None) -> Tensor:
    """A token attends to the slots up to its own, or to some of them.

    Differs from qwen3: it has the patterns of SparseAttention.
    """
    slots = torch.arange(num_slots, device=positions.device)  # (S,)
    back = positions[:, None, :, None] - slots  # (B, 1, T, S)
    seen = back < (window or num_slots)
    if stride:
        seen = seen | (back % stride == 0)
    if num_global:
        seen = seen | (slots < num_global)
    return seen & (back >= 0)


def rope(positions: Tensor, attn: PagedAttention) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotation angle, position times frequency, in fp32.

    Differs from llama: the numbers are those of a component.
    """
    theta = rope_frequencies(attn, positions.device)  # (d // 2,)
    angles = positions[:, None, :, None].float() * theta  # (B, 1, T, d // 2)
    return angles.cos(), angles.sin()


def rope_frequencies(attn: PagedAttention, device: torch.device) -> Tensor:
    """Radians per position: theta_i = base ** (-2 i / d) for pair i, the slow ones as Llama 3.1 slows them.

    Differs from llama: the numbers are those of a component.
    """
    exponent = torch.arange(0, attn.head_dim, 2, device=device).float() / attn.head_dim  # (d // 2,)
    theta, scaling = 1.0 / attn.rope_base**exponent, attn.rope_scaling
    if scaling is None:
        return theta
    turns = scaling.original_max_seq_len * theta / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * theta + (1 - keep) * theta / scaling.factor


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x1_i, x2_i) of a head turned in its plane; rotate of llama.py says why."""
    x1, x2 = x.chunk(2, dim=-1)  # each (..., d // 2)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).type_as(x)


@Registry.feedforward.register("SwiGLU")
class SwiGLU(nn.Module):
    """silu(gate_proj(x)) * up_proj(x), then down_proj, as in llama.py (Shazeer 2020, eq. 6)."""

    def __init__(self, in_dim: int, hidden_dim: int, gate_bias=False, up_bias=False, down_bias=False):
        super().__init__()
        self.in_dim = in_dim
        self.gate_proj = nn.Linear(in_dim, hidden_dim, bias=gate_bias)
        self.up_proj = nn.Linear(in_dim, hidden_dim, bias=up_bias)
        self.down_proj = nn.Linear(hidden_dim, in_dim, bias=down_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.gate_proj(x))  # (..., f)
        return self.down_proj(gate * self.up_proj(x))  # (..., D)


@Registry.feedforward.register("GELU")
class GELU(nn.Module):
    """Two maps and the exact GELU between them, as in gpt_neox.py (Hendrycks and Gimpel 2016)."""

    def __init__(self, in_dim: int, hidden_dim: int, up_bias=False, down_bias=False):
        super().__init__()
        self.in_dim = in_dim
        self.up_proj = nn.Linear(in_dim, hidden_dim, bias=up_bias)
        self.down_proj = nn.Linear(hidden_dim, in_dim, bias=down_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))  # (..., D)


@Registry.feedforward.register("MixtureOfExperts")
class MixtureOfExperts(nn.Module):
    """E copies of a feed-forward, `expert`, of which a token passes through the A that the router prefers.

    Their results are added, weighted by the softmax of the router's scores over these A (Jiang et al. 2024,
    section 2.1). Of four experts, two:

    >>> scores, chosen = torch.tensor([1.0, 3.0, 0.0, 3.0]).topk(2)
    >>> chosen.sort().values, scores.softmax(dim=-1)
    (tensor([1, 3]), tensor([0.5000, 0.5000]))
    """

    def __init__(self, in_dim: int, expert: nn.Module, num_experts: int, num_active_experts: int):
        super().__init__()
        if num_active_experts > num_experts:
            raise ValueError(f"num_active_experts is {num_active_experts}, of num_experts {num_experts}")
        check_widths(in_dim, {"expert": expert})
        self.in_dim, self.num_experts, self.num_active = in_dim, num_experts, num_active_experts
        self.router = nn.Linear(in_dim, num_experts, bias=False)
        self.experts = nn.ModuleList(deepcopy(expert) for _ in range(num_experts))

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
        # Whom no token chose does not run; while a tracer is at work, who knows no count, all do.
        out = [expert(group) for expert, group in groups if torch.compiler.is_compiling() or len(group)]
        return torch.cat(out).index_select(0, order.argsort()).unflatten(0, chosen.shape)  # (t, A, D)


@Registry.normalization.register("RMSNorm")
class RMSNorm(nn.Module):
    """Differs from qwen3: it is registered, and its width has the name that files give it."""

    def __init__(self, in_dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(in_dim))
        self.in_dim, self.eps = in_dim, eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * x32.type_as(x)


@Registry.normalization.register("LayerNorm")
class LayerNorm(nn.Module):
    """Mean 0 and variance 1, then a scale and a shift for each feature, as in gpt2.py."""

    def __init__(self, in_dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(in_dim)), nn.Parameter(torch.zeros(in_dim))
        self.in_dim, self.eps = in_dim, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.in_dim,), self.weight, self.bias, self.eps)


@Registry.embedding.register("VocabEmbedding")
def VocabEmbedding(num_embeddings: int, embedding_dim: int) -> nn.Embedding:
    return nn.Embedding(num_embeddings, embedding_dim)


@Registry.head.register("LMHead")
def LMHead(in_dim: int, out_dim: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(in_dim, out_dim, bias=bias)


@Registry.sampler.register("SimpleSampler")
class SimpleSampler:
    """The most probable token of each row or, with a temperature, a draw from the softmax.

    Why noise draws: with -log(Exponential) added to each logit, the largest is one drawn from the softmax
    (Gumbel). What run.py offers is in models/utils/sampling.py.
    """

    def __init__(self, top_k: int | None = None):
        self.top_k = top_k

    def __call__(self, logits: Tensor, temperature: float = 0.0) -> Tensor:
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[..., -1:]  # (B, 1)
            logits = logits.masked_fill(logits < least, -math.inf)
        if temperature:
            logits = logits.float() / temperature - torch.empty_like(logits).exponential_().log()
        return logits.argmax(dim=-1)  # (B,)


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


def read_section(config: "str | Path | dict", name: str) -> dict:
    """A section, "model" or "model.attention", of a .cfg: a path, its text, or what was read before."""
    sections = config
    if not isinstance(config, dict):
        text = config if "\n" in str(config) else Path(config).read_text(encoding="utf-8")
        try:
            sections = confection.Config().from_str(text)
        except (ValueError, configparser.Error) as error:
            raise ValueError(f"the .cfg cannot be read: {' '.join(str(error).split())}") from None
    for part in name.split("."):
        if not isinstance(sections.get(part), dict):
            raise ValueError(f"the .cfg has no section [{name}]; there are: {', '.join(sections)}")
        sections = sections[part]
    return sections


def with_width(section: dict, width: int) -> dict:
    """A section with in_dim, wherever it or a section in it does not say it."""
    inner = {name: with_width(value, width) for name, value in section.items() if is_component(value)}
    return {**section, "in_dim": section.get("in_dim", width), **inner}


def is_component(value) -> bool:
    return isinstance(value, dict) and any(name.startswith("@") for name in value)


def kind_at(place: str) -> str:
    """Which kind of component belongs into model.attention.q_norm, ..."""
    name = place.split(".")[-1]
    return "normalization" if name.endswith("norm") else "feedforward" if name == "expert" else name


def build(section: dict, where: str):
    """What a section names, made of its other fields; sections among them are built first."""
    component, fields = read_fields(section, where)
    try:
        made = component(**fields)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"[{where}] {error}") from None
    if "in_dim" in fields:
        made.in_dim = fields["in_dim"]  # for check_widths; a component of your own need not keep it
    return made


def read_fields(section: dict, where: str):
    """The component that a section names, of the kind that belongs there, and what it is called with."""
    kind = kind_at(where)
    named = [name[1:] for name in section if name.startswith("@")]
    if len(named) != 1 or named[0] not in KINDS or (kind in KINDS and named[0] != kind):
        due = f"@{kind}" if kind in KINDS else "@ and one of " + ", ".join(KINDS)
        raise ValueError(f"[{where}] names {', '.join(named) or 'no component'}, where {due} is expected")
    try:
        component = vars(Registry)[named[0]].get(section["@" + named[0]])
    except ValueError as error:
        raise ValueError(f"[{where}] {error}") from None

    fields = {}
    for name, value in section.items():
        if isinstance(value, dict) and (is_component(value) or kind_at(name) in KINDS):
            fields[name] = build(value, f"{where}.{name}")
        elif not name.startswith("@"):
            fields[name] = {"True": True, "False": False}.get(str(value), value)  # in quotes, too
    check_fields(component, fields, where)
    return component, fields


PLAIN = {bool, int, float, str, list, dict, NoneType}


def check_fields(component, fields: dict, where: str):
    """Each field is one that the component takes, of the type that it says, and none is missing."""
    known = inspect.signature(component).parameters
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"[{where}] unknown field {name!r}; {component.__name__} has {', '.join(known)}")
        wanted = known[name].annotation
        wanted = type(known[name].default) if wanted is inspect.Parameter.empty else wanted
        kinds = set(get_args(wanted) or [wanted])
        fits = type(value) in kinds or (type(value) is int and float in kinds)
        if type(value) in PLAIN and kinds <= PLAIN | {nn.Module} and not fits:
            said = " or ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"[{where}] {name} is {value!r}, where {said} is expected")
        if type(value) in (int, float) and not 0 < value < 2**31:
            raise ValueError(f"[{where}] {name} is {value!r}, where a number above 0 is expected")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in fields:
            raise ValueError(f"[{where}] {name} is missing; {component.__name__} needs it")


def read_scaling(fields: dict | None) -> RopeScaling | None:
    if fields is None:
        return None
    check_fields(RopeScaling, fields, "rope_scaling")
    return RopeScaling(**fields)


def check_widths(width: int, parts: dict[str, nn.Module]):
    """Parts that do not fit each other are found where they meet, not in the first forward pass."""
    for name, part in parts.items():
        found = vars(part).get("in_dim", width)
        if found != width:
            raise ValueError(f"{name} has in_dim {found}, where {width} features come in")
