"""Vision Transformer (ViT): an encoder that reads an image as a sequence of patches and says what it shows.

New against bert:
- the tokens are patches, not words: squares of an image, flattened and mapped to D features
- a learned class token stands in front of them; the classifier reads its last state
- no padding, so no mask
- LayerNorm before each sublayer, as in GPT-2
- the position table stretches to images of other sizes; all else knows nothing of two dimensions
Paper: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words".

    images (B, C, h_px, w_px)                                     in ViT-B/16: (B, 3, 224, 224)
      patches = unfold(images)                                      224 / 16 = 14, so 14 x 14 = 196 patches
                                                                    of 3 x 16 x 16 = 768 numbers each
      x = [class_token, patch_embed(patches)] + pos_embed           eq. 1: T = 197 tokens of D = 768
      repeat L times:
        x = x + attn(attn_norm(x))    eq. 2: H heads, each softmax(q k^T / sqrt(d)) v, over all patches
        x = x + ffn(ffn_norm(x))      eq. 3: down_proj(gelu(up_proj(x)))
      hidden = final_norm(x)
    logits (B, Y) = classifier(hidden of the class token)           eq. 4

The numbers of an image are what models/utils/image_processor.py makes of its pixels.

Shapes: B batch, h_px rows of pixels, w_px columns of pixels, h rows of patches, w columns of patches, g rows
    and columns of patches in training, P patches (h w), T tokens (P + 1), d width of a head (D / H).
Proof: tests/test_vision_transformer.py, against `transformers`. Picture: python show_structure.py vit-b-16
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Differs from bert: sizes of images and patches in place of a vocabulary and a length, and no heads."""

    image_size: int  # height and width of the images that it was trained on: 224, some of its kin 384
    patch_size: int  # p: 16 in ViT-B/16, a divisor of image_size
    num_channels: int  # C: 3, red, green and blue
    d_model: int  # D: 768 in ViT-B (Base), 1,024 in ViT-L (Large), 1,280 in ViT-H (Huge)
    num_layers: int  # L: 12, 24, 32
    num_heads: int  # H: 12, 16, 16, a divisor of D
    d_ff: int  # f: 4 D in every published size
    norm_eps: float  # keeps LayerNorm from dividing by zero
    qkv_bias: bool  # True in every published size
    dropout: float  # after the embeddings, on the attention weights, after each sublayer; training only
    pooler: bool  # a map and tanh of the class token, left over from the classifier of pre-training
    num_labels: int | None  # Y: 1,000 of ImageNet; None: no classifier

    def __post_init__(self):
        assert self.image_size % self.patch_size == 0, "patch_size must divide image_size"
        assert self.d_model % self.num_heads == 0, "num_heads must divide d_model"
        assert not (self.pooler and self.num_labels), "a classifier reads the class token, and no pooler"


class Model(nn.Module):
    """Differs from bert: embeds patches, puts a class token before them, and stretches the position table."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        D, p, g = config.d_model, config.patch_size, config.image_size // config.patch_size
        self.patch_embed = nn.Linear(config.num_channels * p * p, D)
        self.class_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + g * g, D))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(D, config.norm_eps)
        self.pooler = nn.Linear(D, D) if config.pooler else None
        self.classifier = nn.Linear(D, config.num_labels) if config.num_labels else None

    def forward(
        self,
        images: Tensor,  # (B, C, h_px, w_px)
    ) -> Tensor:
        """A logit for each label; without a classifier the pooler's vector, or else the hidden states."""
        x = self.hidden(images)  # (B, T, D)
        if self.classifier is not None:
            return self.classifier(x[:, 0])  # (B, Y)
        if self.pooler is not None:
            return self.pooler(x[:, 0]).tanh()  # (B, D)
        return x

    def hidden(
        self,
        images: Tensor,  # (B, C, h_px, w_px)
    ) -> Tensor:
        """The class token, then the patches, row by row from the top left."""
        p = self.config.patch_size
        h, w = images.shape[2] // p, images.shape[3] // p

        x = self.patch_embed(unfold(images, p))  # (B, P, D)
        class_token = self.class_token.expand(len(x), -1, -1)  # (B, 1, D)
        x = torch.cat([class_token, x], dim=1)  # (B, T, D)

        x = self.dropout(x + self.positions(h, w))
        for layer in self.layers:
            x = layer(x)
        return self.final_norm(x)

    def positions(self, h: int, w: int) -> Tensor:
        """The position table for h x w patches, stretched where that is not the grid of training.

        The table is seen as an image of g x g pixels with D channels and resized like one (section 3.2); the
        class token stands outside of it.
        """
        g = self.config.image_size // self.config.patch_size
        if (h, w) == (g, g):
            return self.pos_embed

        first, table = self.pos_embed.split([1, g * g], dim=1)  # (1, 1, D), (1, g * g, D)
        grid = table.unflatten(1, (g, g)).movedim(-1, 1)  # (1, D, g, g)
        grid = F.interpolate(grid, size=(h, w), mode="bicubic")  # (1, D, h, w)
        return torch.cat([first, grid.flatten(2).mT], dim=1)  # (1, T, D)

    @torch.no_grad()
    def init_weights(self):
        """Fresh weights for training. The paper gives no scheme; Google's code has Xavier's for matrices
        (uniform, and smaller in wider ones; Glorot and Bengio 2010, eq. 16), and 0.02 for positions."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name in ("class_token", "pos_embed"):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter)


class Layer(nn.Module):
    """Norm, sublayer, add: pre-LN, so that from the embeddings to final_norm x meets nothing but additions.

    Differs from bert: the norm stands before the sublayer, and there is no mask.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.attn_norm(x)))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Attention(nn.Module):
    """Multi-head self-attention (Dosovitskiy et al. 2021, appendix A): every patch sees every other.

    Differs from bert: no mask, since no patch is padding, and q, k and v may lack their biases.
    Why sqrt(d): q . k is a sum of d products, so its spread grows with sqrt(d); divided by it, softmax stays
    soft at any width.
    """

    def __init__(self, config: Config):
        super().__init__()
        D = config.d_model
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(D, D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(D, D)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
    ) -> Tensor:
        B, T, D = x.shape
        H, d = self.num_heads, D // self.num_heads
        q = self.q_proj(x).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)
        v = self.v_proj(x).view(B, T, H, d).transpose(1, 2)  # (B, H, T, d)

        # Dividing q gives the same result, and q is smaller than the scores when T > d.
        scores = (q / math.sqrt(d)) @ k.mT  # (B, H, T, T)
        probs = self.dropout(scores.softmax(dim=-1))
        out = probs @ v  # (B, H, T, d)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, D))  # (B, T, D)


class FeedForward(nn.Module):
    """Differs from bert: always the exact GELU, by the error function."""

    def __init__(self, config: Config):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ff)
        self.down_proj = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.up_proj(x))  # (B, T, f)
        return self.down_proj(x)  # (B, T, D)


def unfold(images: Tensor, patch_size: int) -> Tensor:
    """Cut into squares that do not overlap, row by row; what is left over at the right and below is not seen.

    >>> image = torch.arange(20).view(1, 1, 4, 5)  # one channel, 4 x 5 pixels
    >>> image[0, 0]
    tensor([[ 0,  1,  2,  3,  4],
            [ 5,  6,  7,  8,  9],
            [10, 11, 12, 13, 14],
            [15, 16, 17, 18, 19]])
    >>> unfold(image, 2)
    tensor([[[ 0,  1,  5,  6],
             [ 2,  3,  7,  8],
             [10, 11, 15, 16],
             [12, 13, 17, 18]]])
    """
    p = patch_size
    windows = images.unfold(2, p, p).unfold(3, p, p)  # (B, C, h, w, p, p)
    # A patch's numbers side by side: channel by channel, row by row.
    patches = windows.permute(0, 2, 3, 1, 4, 5).flatten(start_dim=3)  # (B, h, w, C * p * p)
    # The patches one after the other, as words are.
    return patches.flatten(1, 2)  # (B, P, C * p * p)
