"""The Transformer of 2017: an encoder reads the source, a decoder writes the target, attention joins the two.

New against the networks before it, which read one token after the other:
- attention alone carries what one token knows to another, for all tokens at once
- it has several heads, each of which attends in a way of its own
- sinusoids are added to the embeddings, since attention itself sees no order
Paper: Vaswani et al. 2017, "Attention Is All You Need". Here the reading order begins. opus-mt checkpoints
(Marian) load into this page.

    source (B, T), padded on the right
      x = token_embed(source) * sqrt(D) + sinusoids(positions)
      each encoder layer:
        x = attn_norm(x + attn(x))          H heads, each softmax(q k^T / sqrt(d)) v; pads are not attended to
        x = ffn_norm(x + ffn(x))            down_proj(relu(up_proj(x)))
    memory = x
    target (B, T), which begins with a start token and lacks its last token ("shifted right")
      x = token_embed(target) * sqrt(D) + sinusoids(positions)
      each decoder layer:
        x = attn_norm(x + attn(x))          no look ahead: to itself and to what stands before it
        x = cross_norm(x + cross_attn(x))   q from the target; k and v from the memory, without its pads
        x = ffn_norm(x + ffn(x))
    logits (B, T, V) = lm_head(x), whose matrix is token_embed's

Config also offers what the paper does not have: a window, ALiBi, RoPE, a shortened memory. Model.options and
the last lines of Model.encode bring them in, the end of this page holds them: skip it at first.

Shapes: B batch, T positions in this call, S positions attended, d width of a head (D / H), n length of the
    memory, w pairs of features.
Proof: tests/test_transformer.py. Picture: python show_structure.py transformer-base
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    vocab_size: int  # V: 37,000 in the paper; source, target and output share it
    max_seq_len: int  # M: the longest source or target in training; for callers, sinusoids have no limit
    d_model: int  # D: 512 in the paper's base model, 1,024 in its big one
    num_encoder_layers: int  # 6 in the paper
    num_decoder_layers: int  # 6 in the paper
    num_heads: int  # H: 8 in the base model, 16 in the big one, a divisor of D
    d_ff: int  # f: 4 D in both
    norm_eps: float  # keeps LayerNorm from dividing by zero
    dropout: float  # after the embeddings and after each sublayer, in training only
    activation: str  # relu in the paper, silu (also called swish) in most opus-mt checkpoints, or gelu
    scale_embedding: bool  # whether embeddings are multiplied by sqrt(D), as in the paper
    output_bias: bool  # False in the paper, True in Marian
    pad_id: int  # the token that fills up short sources; in Marian also the first token of every target
    # Beyond the paper and all published checkpoints:
    positions: str  # sinusoidal in the paper, or alibi, or rope
    window: int | None  # how far self-attention reaches to either side; None: everywhere
    cross_downsample: int  # the decoder attends to means of this many encoder states; 1: to each state

    def __post_init__(self):
        assert self.d_model % self.num_heads == 0, "num_heads must divide d_model"
        assert self.activation in ACTIVATIONS, f"activation must be one of {', '.join(ACTIVATIONS)}"
        assert self.positions in ("sinusoidal", "alibi", "rope"), "positions: sinusoidal, alibi or rope"
        assert self.d_model % 2 == 0, "d_model must be even, since sinusoids come in pairs"
        assert self.positions != "rope" or self.d_model // self.num_heads % 2 == 0, "RoPE turns pairs"
        assert 0 <= self.pad_id < self.vocab_size, "pad_id must be a token of the vocabulary"


class Model(nn.Module):
    """To train, call the model itself. To write a target, encode the source once, then decode step by step:

    cache = model.new_cache(model.encode(source), num_slots)
    logits = model.decode(first_tokens, None, cache)        # fills slots 0 to T - 1
    logits = model.decode(next_token, positions, cache)     # positions (B, 1): the slots that these fill
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder_layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))
        self.decoder_layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_decoder_layers))
        # One matrix serves the source, the target and the output (section 3.4).
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=config.output_bias)
        self.lm_head.weight = self.token_embed.weight

    def forward(
        self,
        source: Tensor,  # (B, S)
        target: Tensor,  # (B, T)
    ) -> Tensor:
        """The whole pass, as in training: logits for the token that follows each token of the target.

        A target that shall become "1987 - 03" is shifted right by its start token, so that each place
        predicts the token after it, and all of them at once:

            target          <s>     1987    -
            predicts        1987    -       03
        """
        cache = self.new_cache(self.encode(source), num_slots=0)
        return self.decode(target, None, cache)  # (B, T, V)

    def encode(self, source: Tensor) -> "Memory":
        """What the decoder reads of the source (B, T), whose shorter rows end in pads: a state per token."""
        B, T = source.shape
        positions = torch.arange(T, device=source.device).expand(B, T)  # (B, T)
        real = source != self.config.pad_id
        mask = real[:, None, None].expand(B, 1, T, T)  # (B, 1, T, T)
        mask, relative = self.options(mask, positions)

        x = self.embed(source, positions)  # (B, T, D)
        for layer in self.encoder_layers:
            x = layer(x, mask, relative)
        if self.config.cross_downsample > 1:
            return shorten(x, real, self.config.cross_downsample)
        return Memory(x, real)

    def decode(self, tokens: Tensor, positions: Tensor | None, cache: "Cache") -> Tensor:
        """Logits for the token that follows each token; arguments as for hidden."""
        return self.lm_head(self.hidden(tokens, positions, cache))  # (B, T, V)

    def hidden(
        self,
        tokens: Tensor,  # (B, T)
        positions: Tensor | None,  # (B, T) or None
        cache: "Cache",
    ) -> Tensor:
        """What lm_head reads. Generation calls this and applies the head only where it picks a token.

        positions: the slots of the cache where the tokens go, 0 <= position < num_slots; each token attends
            to all slots up to its own, which must have been written. None: these are the target's first T.
        cache: from new_cache; the keys and values of these tokens are written into it, in place.
        """
        B, T = tokens.shape
        if positions is not None and not cache.past:
            raise ValueError("positions are slots of a cache; this one has none: give new_cache num_slots")
        S = T if positions is None else cache.past[0].k.shape[2]
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)  # (B, T)
        mask = causal_mask(positions, S)  # (B, 1, T, S)
        mask, relative = self.options(mask, positions)

        x = self.embed(tokens, positions)  # (B, T, D)
        memory_mask = cache.memory_mask[:, None, None]  # (B, 1, 1, n)
        for n, layer in enumerate(self.decoder_layers):
            past = cache.past[n] if cache.past else None
            x = layer(x, mask, relative, positions, past, cache.memory[n], memory_mask)
        return x

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.token_embed(tokens)  # (B, T, D)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.d_model)
        if self.config.positions == "sinusoidal":
            x = x + torch.cat(sinusoids(positions, self.config.d_model), dim=-1).type_as(x)
        return self.dropout(x)

    def options(
        self,
        mask: Tensor,  # (B, 1, T, S): True = attend
        positions: Tensor,  # (B, T)
    ) -> tuple[Tensor, "Alibi | Rope | None"]:
        """What self-attention is told beyond the paper, in whose model it is this mask, and None."""
        config, S, relative = self.config, mask.shape[-1], None
        if config.window is not None:
            mask = window_mask(mask, positions, config.window)
        if config.positions == "alibi":
            relative = alibi(positions, S, config.num_heads, self.token_embed.weight.dtype)
        if config.positions == "rope":
            relative = rotations(positions, S, config.d_model // config.num_heads)
        return mask, relative

    def new_cache(self, memory: "Memory", num_slots: int) -> "Cache":
        """The memory's keys and values, computed once, and room for those of `num_slots` target tokens.

        num_slots = 0: nothing of the target is kept, which is right for a single whole pass.
        """
        B, D, H = memory.states.shape[0], self.config.d_model, self.config.num_heads
        shape = (B, H, num_slots, D // H)
        zeros = memory.states.new_zeros
        past = [LayerCache(k=zeros(shape), v=zeros(shape)) for _ in self.decoder_layers if num_slots]
        projected = [
            LayerCache(*layer.cross_attn.keys_values(memory.states)) for layer in self.decoder_layers
        ]
        return Cache(tuple(past), tuple(projected), memory.mask)

    @torch.no_grad()
    def init_weights(self):
        """Fresh weights for training, of which the paper says nothing: Xavier for the matrices (Glorot and
        Bengio 2010, eq. 16), and D ** -0.5 for the embedding, which times sqrt(D) has variance 1."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name == "token_embed.weight":
                nn.init.normal_(parameter, std=self.config.d_model**-0.5)
            else:
                nn.init.xavier_uniform_(parameter)


class EncoderLayer(nn.Module):
    """Sublayer, dropout, add, norm: post-LN (sections 3.1 and 5.4).

    The sum lets a sublayer say only what it changes; the norm after it gives x the same size in each layer.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.attn = Attention(config)
        self.attn_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.ffn = FeedForward(config)
        self.ffn_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, relative):
        k, v = self.attn.keys_values(x)  # each (B, H, T, d)
        x = self.attn_norm(x + self.dropout(self.attn(x, k, v, mask, relative)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class DecoderLayer(nn.Module):
    """An encoder layer with cross-attention between its two sublayers."""

    def __init__(self, config: Config):
        super().__init__()
        self.attn = Attention(config)
        self.attn_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.cross_attn = Attention(config)
        self.cross_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.ffn = FeedForward(config)
        self.ffn_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, relative, positions, past, memory, memory_mask):
        k, v = self.attn.keys_values(x)  # each (B, H, T, d)
        if past is not None:
            past.write(k, v, positions)
            # Decoding reads every slot; a target's first call reads only the T it wrote.
            S = mask.shape[-1]
            k, v = past.k[:, :, :S], past.v[:, :, :S]  # each (B, H, S, d)

        x = self.attn_norm(x + self.dropout(self.attn(x, k, v, mask, relative)))
        x = self.cross_norm(x + self.dropout(self.cross_attn(x, *memory, memory_mask)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class Attention(nn.Module):
    """Multi-head attention (eq. 1 and section 3.2.2): within a sequence, or from target to memory.

    Each query takes a mean of the values, weighted by how well their keys match it. Why heads: one mean
    blends all that it attends to, while H means of d features each can look at H places. Why sqrt(d): q . k
    is a sum of d products, so its spread grows with sqrt(d); divided by it, softmax stays soft at any width.
    Here d is 4, and q . k is 2 and 4: the second value gets three quarters of the weight.

    >>> q, k = torch.tensor([[1.0, 1, 0, 0]]), torch.tensor([[2.0, 0, 0, 0], [2.0, 2, 0, 0]])
    >>> (q @ k.mT / math.sqrt(4)).softmax(dim=-1)
    tensor([[0.2689, 0.7311]])

    The paper's projections have no biases; these have them, as Marian's do.
    """

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.o_proj = nn.Linear(D, D)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        k: Tensor,  # (B, H, S, d)
        v: Tensor,  # (B, H, S, d)
        mask: Tensor,  # (..., S): True = attend
        relative: "Alibi | Rope | None" = None,
    ) -> Tensor:
        q = self.heads(self.q_proj(x))  # (B, H, T, d)
        if isinstance(relative, Rope):
            q, k = rotate(q, *relative.of_q), rotate(k, *relative.of_k)
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, S)
        if isinstance(relative, Alibi):
            scores = scores + relative.bias
        # Not minus infinity: a pad may have nothing to attend to, and softmax of nothing is NaN.
        scores = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        probs = scores.softmax(dim=-1)
        out = probs @ v  # (B, H, T, d)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, D)

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.k_proj(states)), self.heads(self.v_proj(states))  # each (B, H, T, d)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, d)


class FeedForward(nn.Module):
    """Two linear maps with an activation between them (eq. 2), the same for every token by itself."""

    def __init__(self, config: Config):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ff)
        self.down_proj = nn.Linear(config.d_ff, config.d_model)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.up_proj(x))  # (B, T, f)
        return self.down_proj(x)  # (B, T, D)


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


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


def sinusoids(positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Sine and cosine of position / 10000^(2i / width) for the i-th of width / 2 pairs (section 3.5).

    The paper interleaves them, sin, cos, sin, cos; here all sines come first, then all cosines, as in Marian.
    Added to embeddings, their order is no more than a numbering, since all that reads them is learned.
    In fp32 whatever the weights' dtype: bf16 has 8 bits of precision and cannot tell position 256 from 257.

    >>> torch.cat(sinusoids(torch.tensor([0, 1, 2]), width=4), dim=-1)
    tensor([[ 0.0000,  0.0000,  1.0000,  1.0000],
            [ 0.8415,  0.0100,  0.5403,  0.9999],
            [ 0.9093,  0.0200, -0.4161,  0.9998]])
    """
    exponent = torch.arange(0, width, 2, device=positions.device) / width  # (w,)
    angles = positions[..., None] / 10_000.0**exponent  # (..., w)
    return angles.sin(), angles.cos()


class Memory(NamedTuple):
    """What the encoder made of the source, and which of it is no padding."""

    states: Tensor  # (B, n, D)
    mask: Tensor  # (B, n): True = attend


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


class Cache(NamedTuple):
    """What the decoder attends to. Every tensor has the batch first, so that beams can reorder its rows."""

    past: tuple[LayerCache, ...]  # per layer, of the target's tokens; written by decode
    memory: tuple[LayerCache, ...]  # per layer, of the memory
    memory_mask: Tensor  # (B, n)


# Beyond the paper -------------------------------------------------------------------------------------------


def distances(positions: Tensor, num_slots: int) -> Tensor:
    """How far each query stands from each key, before or after it."""
    slots = torch.arange(num_slots, device=positions.device)  # (S,)
    return (positions[:, None, :, None] - slots).abs()  # (B, 1, T, S)


def window_mask(mask: Tensor, positions: Tensor, window: int) -> Tensor:
    """The mask without what stands further away than `window`."""
    return mask & (distances(positions, mask.shape[-1]) <= window)


class Alibi(NamedTuple):
    """The further away a key, the lower its score, by a slope for each head (Press et al. 2022, section 3).

    The paper has a decoder alone; in the encoder here the distance counts to both sides.
    """

    bias: Tensor  # (B, H, T, S): added to the scores


def alibi(positions: Tensor, num_slots: int, num_heads: int, dtype: torch.dtype) -> Alibi:
    slopes = alibi_slopes(num_heads, positions.device)  # (H, 1, 1)
    return Alibi((-slopes * distances(positions, num_slots)).to(dtype))


def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """From 2^(-8 / H) on, a geometric sequence with the same ratio."""
    h = torch.arange(1, num_heads + 1, device=device)[:, None, None]  # (H, 1, 1)
    return 2.0 ** (-8 * h / num_heads)


class Rope(NamedTuple):
    """q and k turn by angles that grow with their positions, so that scores tell how far apart they stand."""

    of_q: tuple[Tensor, Tensor]  # each (B, 1, T, w): cosines and sines
    of_k: tuple[Tensor, Tensor]  # each (S, w)


def rotations(positions: Tensor, num_slots: int, head_dim: int) -> Rope:
    """The angles are those of the sinusoids, here of a head's width (Su et al. 2021, section 3.2.2)."""
    q_sin, q_cos = sinusoids(positions[:, None], head_dim)  # each (B, 1, T, w)
    k_sin, k_cos = sinusoids(torch.arange(num_slots, device=positions.device), head_dim)  # each (S, w)
    return Rope((q_cos, q_sin), (k_cos, k_sin))


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


def shorten(states: Tensor, real: Tensor, factor: int) -> Memory:
    """The mean of every `factor` neighbouring states, pads left out."""
    # These means count pads as zeros; divided by the share of what is real, they are those of the rest.
    states = states * real[:, :, None]
    means = F.avg_pool1d(states.mT, factor, ceil_mode=True)  # (B, D, n)
    share = F.avg_pool1d(real[:, None].type_as(states), factor, ceil_mode=True)  # (B, 1, n)
    return Memory((means / share.clamp(min=1e-6)).mT, share[:, 0] > 0)
