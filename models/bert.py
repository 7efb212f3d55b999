"""BERT: the encoder alone, which reads a text in one pass, each token seeing what stands on both sides of it.

New against gpt2:
- every token attends to every other, so there is no causal mask and no cache; padding is masked instead
- LayerNorm after each addition (post-LN), as in the Transformer of 2017, and after the embeddings
- a second table says which of two texts a token belongs to
- it does not write: it is trained to guess hidden tokens (runs_train/masked_language_model.py), and a head
  on top of it answers what it is used for
Paper: Devlin et al. 2019, sections 3 and 3.1, appendix A.

    tokens, segments (B, T)
      x = embed_norm(token_embed(tokens) + segment_embed(segments) + pos_embed(0 .. T - 1))
      repeat L times:
        x = attn_norm(x + attn(x))    H heads, each softmax(q k^T / sqrt(d)) v, over all that is no padding
        x = ffn_norm(x + ffn(x))      down_proj(gelu(up_proj(x)))
      hidden = x (B, T, D)
      pooled = pooler(hidden) (B, D), a map and tanh of the first token, [CLS]
    head: None             hidden
          "masked_lm"      lm_head(hidden) (B, T, V): the token at each place, also where [MASK] hides it
          "next_sentence"  next_sentence_head(pooled) (B, 2): the second text follows the first, or does not
          "pretraining"    masked_lm's logits; next_sentence_head(pooler(hidden)) is there as well
          "sequence"       classifier(pooled) (B, Y): a label for the whole text, or Y numbers
          "tokens"         classifier(hidden) (B, T, Y): a label for each token

Shapes: B batch, T positions, d width of a head (D / H).
Proof: tests/test_bert.py, against `transformers`. Picture: python show_structure.py bert-base-uncased
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Differs from gpt2: segments, a choice of activations, a pooler, and the head with its labels."""

    vocab_size: int  # V: 30,522 in the uncased BERT, 28,996 in the cased one
    max_seq_len: int  # M: 512, the length of the position table and so a hard limit
    num_segments: int  # rows of the segment table: 2
    d_model: int  # D: 768 in BERT base (110 M parameters)
    num_layers: int  # L: 12 in BERT base
    num_heads: int  # H: 12 in BERT base, a divisor of D
    d_ff: int  # f: 4 D in every published size
    norm_eps: float  # keeps LayerNorm from dividing by zero
    activation: str  # "gelu" in BERT; some of its relatives have "gelu_new" or "relu"
    dropout: float  # after embeddings and sublayers, on attention weights, before a classifier; training only
    pooler: bool  # whether there is a pooler; next_sentence, sequence and pretraining need it
    head: str | None  # "masked_lm", "pretraining", "next_sentence", "sequence", "tokens", or None
    num_labels: int | None  # Y: the labels of the heads "sequence" and "tokens"; None with the others

    def __post_init__(self):
        assert self.d_model % self.num_heads == 0, "num_heads must divide d_model"
        assert self.activation in ("gelu", "gelu_new", "relu"), "activation is gelu, gelu_new or relu"
        heads = (None, "masked_lm", "pretraining", "next_sentence", "sequence", "tokens")
        assert self.head in heads, f"head is {', '.join(map(str, heads))}"
        labels = self.head in ("sequence", "tokens")
        assert labels == (self.num_labels is not None), "num_labels goes with the heads sequence and tokens"
        reads_pooler = self.head in ("pretraining", "next_sentence", "sequence")
        assert self.pooler or not reads_pooler, f"the head {self.head} needs the pooler"


class Model(nn.Module):
    """Differs from gpt2: reads in both directions, embeds segments too, and answers what its head is for."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        D = config.d_model
        self.token_embed = nn.Embedding(config.vocab_size, D)
        self.pos_embed = nn.Embedding(config.max_seq_len, D)
        self.segment_embed = nn.Embedding(config.num_segments, D)
        self.embed_norm = nn.LayerNorm(D, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))

        self.pooler = Pooler(config) if config.pooler else None
        if config.head in ("masked_lm", "pretraining"):
            self.lm_head = MaskedLMHead(config)
            self.lm_head.vocab_proj.weight = self.token_embed.weight
        if config.head in ("next_sentence", "pretraining"):
            self.next_sentence_head = nn.Linear(D, 2)
        if config.head in ("sequence", "tokens"):
            self.classifier = nn.Linear(D, config.num_labels)

    def forward(
        self,
        tokens: Tensor,  # (B, T)
        segments: Tensor | None = None,  # (B, T) or None
        attention_mask: Tensor | None = None,  # (B, T) or None
    ) -> Tensor:
        """The logits of the head, or the hidden states where there is none; arguments as for hidden."""
        x = self.hidden(tokens, segments, attention_mask)  # (B, T, D)
        match self.config.head:
            case "masked_lm" | "pretraining":
                return self.lm_head(x)  # (B, T, V)
            case "next_sentence":
                return self.next_sentence_head(self.pooler(x))  # (B, 2)
            case "sequence":
                return self.classifier(self.dropout(self.pooler(x)))  # (B, Y)
            case "tokens":
                return self.classifier(self.dropout(x))  # (B, T, Y)
        return x

    def hidden(
        self,
        tokens: Tensor,  # (B, T)
        segments: Tensor | None = None,  # (B, T) or None
        attention_mask: Tensor | None = None,  # (B, T) or None
    ) -> Tensor:
        """What the heads read. A row of two texts, with a hidden word, padded for a longer row beside it:

            tokens           [CLS]  a  [MASK]  [SEP]  it  sat  [SEP]  [PAD]
            segments         0      0  0       0      1   1    1      0
            attention_mask   1      1  1       1      1   1    1      0

        segments: 0 for [CLS], the first text and its [SEP], 1 for the second text and its [SEP]; None: all 0.
        attention_mask: bool, True for a token of the text, False for padding; None: no padding. Every row
            must have a token, or its softmax is NaN. What comes out at a padded place means nothing.
        """
        T = tokens.shape[1]
        if self.config.max_seq_len < T:
            raise ValueError(f"{T} tokens are more than the {self.config.max_seq_len} of the position table")
        segments = torch.zeros_like(tokens) if segments is None else segments
        # No token attends to padding.
        mask = None if attention_mask is None else attention_mask[:, None, None, :]  # (B, 1, 1, T) or None

        x = self.token_embed(tokens) + self.segment_embed(segments) + self.pos_embed.weight[:T]  # (B, T, D)
        x = self.dropout(self.embed_norm(x))
        for layer in self.layers:
            x = layer(x, mask)
        return x

    @torch.no_grad()
    def init_weights(self):
        """Fresh weights for training: normal, cut at two standard deviations, as in Google's code."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)


class Layer(nn.Module):
    """Sublayer, add, norm: post-LN (Vaswani et al. 2017, section 3.1).

    Differs from gpt2: the norm stands after the sum, and there is no cache to pass on.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.attn = Attention(config)
        self.attn_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.ffn = FeedForward(config)
        self.ffn_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attn_norm(x + self.dropout(self.attn(x, mask)))
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, eq. 1 and section 3.2.2), in both directions.

    Differs from gpt2: no cache, and a mask only where there is padding.
    Why sqrt(d): q . k is a sum of d products, so its spread grows with sqrt(d); divided by it, softmax stays
    soft at any width.
    """

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.o_proj = nn.Linear(D, D)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        mask: Tensor | None,  # (B, 1, 1, T) or None: True = attend; None = to all
    ) -> Tensor:
        B, T, D = x.shape
        H, d = self.num_heads, D // self.num_heads
        q = self.q_proj(x).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)
        v = self.v_proj(x).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)

        # Dividing q gives the same result, and q is smaller than the scores when T > d.
        scores = (q / math.sqrt(d)) @ k.mT  # (B, H, T, T)
        if mask is not None:
            scores = scores.masked_fill_(~mask, -math.inf)
        probs = self.dropout(scores.softmax(dim=-1))
        out = probs @ v  # (B, H, T, d)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, D))  # (B, T, D)


class FeedForward(nn.Module):
    """Differs from gpt2: Config names the activation; BERT's own is the exact GELU."""

    def __init__(self, config: Config):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ff)
        self.down_proj = nn.Linear(config.d_ff, config.d_model)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        x = activate(self.up_proj(x), self.activation)  # (B, T, f)
        return self.down_proj(x)  # (B, T, D)


def activate(x: Tensor, activation: str) -> Tensor:
    """GELU (Hendrycks and Gimpel 2016, eq. 1): x times the standard normal's cumulative distribution at x.

    "gelu" is exact, by the error function; GPT-2's tanh form of it is called "gelu_new".

    >>> x = torch.tensor([-2.0, 0, 2])
    >>> activate(x, "relu"), activate(x, "gelu")
    (tensor([0., 0., 2.]), tensor([-0.0455,  0.0000,  1.9545]))
    """
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_new" else "none")


class Pooler(nn.Module):
    """One vector for the whole text, from the hidden state of its first token, [CLS].

    Not in the paper, which reads that state as it is, but in Google's code and in the published weights.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x[:, 0]).tanh()  # (B, D)


class MaskedLMHead(nn.Module):
    """Which token stands at each place: a map, the activation, a norm, then a logit for every token.

    vocab_proj's matrix is token_embed's (Model sees to that): a token's logit is its embedding's product with
    x, plus a bias. The paper speaks of an output softmax only; the map before it is in Google's code.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.proj = nn.Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.vocab_proj = nn.Linear(config.d_model, config.vocab_size)
        self.activation = config.activation

    def forward(
        self,
        x: Tensor,  # (..., D): of a whole batch, or of some of its tokens
    ) -> Tensor:
        x = self.norm(activate(self.proj(x), self.activation))
        return self.vocab_proj(x)  # (..., V)
