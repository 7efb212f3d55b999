"""Marian at Hugging Face (Helsinki-NLP/opus-mt-*): its tensors, and the fields of its config.json.

A file of Marian's may hold the one embedding matrix four times and the sinusoids, which are no parameters,
twice. The bias of the head hangs on no module there: final_logits_bias, a row of shape (1, V).
"""

import torch

from conversion.config_fields import HFType, activation_named, renamed, words
from conversion.tensor_table import Computed, Layout, rope_frequencies, table
from models.utils.errors import UserError


def position_table(config):
    """(M, D): of each position all sines, then all cosines."""
    angles = torch.arange(config["max_seq_len"])[:, None] * rope_frequencies(10_000, config["d_model"])
    return torch.cat([angles.sin(), angles.cos()], dim=1)


# final_layer_norm: the last norm of a layer, after its feed-forward; encoder_attn: to the encoder's output.
LAYOUT = Layout(
    prefix="model.",
    computed=dict.fromkeys(
        ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"),
        # In fp32 the angle of a late position is a little off, theirs as ours.
        Computed("sines and cosines of the positions, computed", position_table, atol=1e-3),
    ),
    tied=lambda config: {"lm_head.weight": "token_embed.weight"},
    copies={
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
    },
    rows=table("""
        token_embed.weight                      model.shared.weight
        encoder_layers.{n}.attn.q_proj.{p}      model.encoder.layers.{n}.self_attn.q_proj.{p}
        encoder_layers.{n}.attn.k_proj.{p}      model.encoder.layers.{n}.self_attn.k_proj.{p}
        encoder_layers.{n}.attn.v_proj.{p}      model.encoder.layers.{n}.self_attn.v_proj.{p}
        encoder_layers.{n}.attn.o_proj.{p}      model.encoder.layers.{n}.self_attn.out_proj.{p}
        encoder_layers.{n}.attn_norm.{p}        model.encoder.layers.{n}.self_attn_layer_norm.{p}
        encoder_layers.{n}.ffn.up_proj.{p}      model.encoder.layers.{n}.fc1.{p}
        encoder_layers.{n}.ffn.down_proj.{p}    model.encoder.layers.{n}.fc2.{p}
        encoder_layers.{n}.ffn_norm.{p}         model.encoder.layers.{n}.final_layer_norm.{p}
        decoder_layers.{n}.attn.q_proj.{p}      model.decoder.layers.{n}.self_attn.q_proj.{p}
        decoder_layers.{n}.attn.k_proj.{p}      model.decoder.layers.{n}.self_attn.k_proj.{p}
        decoder_layers.{n}.attn.v_proj.{p}      model.decoder.layers.{n}.self_attn.v_proj.{p}
        decoder_layers.{n}.attn.o_proj.{p}      model.decoder.layers.{n}.self_attn.out_proj.{p}
        decoder_layers.{n}.attn_norm.{p}        model.decoder.layers.{n}.self_attn_layer_norm.{p}
        decoder_layers.{n}.cross_attn.q_proj.{p}  model.decoder.layers.{n}.encoder_attn.q_proj.{p}
        decoder_layers.{n}.cross_attn.k_proj.{p}  model.decoder.layers.{n}.encoder_attn.k_proj.{p}
        decoder_layers.{n}.cross_attn.v_proj.{p}  model.decoder.layers.{n}.encoder_attn.v_proj.{p}
        decoder_layers.{n}.cross_attn.o_proj.{p}  model.decoder.layers.{n}.encoder_attn.out_proj.{p}
        decoder_layers.{n}.cross_norm.{p}       model.decoder.layers.{n}.encoder_attn_layer_norm.{p}
        decoder_layers.{n}.ffn.up_proj.{p}      model.decoder.layers.{n}.fc1.{p}
        decoder_layers.{n}.ffn.down_proj.{p}    model.decoder.layers.{n}.fc2.{p}
        decoder_layers.{n}.ffn_norm.{p}         model.decoder.layers.{n}.final_layer_norm.{p}
        lm_head.weight                          lm_head.weight
        lm_head.bias                            final_logits_bias                            row_to_vector
    """),
)


def activation(theirs):
    known = ("silu", "relu", "gelu")
    return activation_named(theirs, "activation_function", "models/transformer.py", known)


def same_in_both(encoder, decoder):
    """Two fields of theirs that are one of ours."""

    def read(theirs):
        if theirs[encoder] != theirs[decoder]:
            both = f"{encoder} {theirs[encoder]} and {decoder} {theirs[decoder]}"
            raise UserError(f"config.json: models/transformer.py has one size for {both}")
        return theirs[encoder]

    return read


def vocab_size(theirs):
    if theirs["decoder_vocab_size"] not in (None, theirs["vocab_size"]):
        sizes = f"vocab_size {theirs['vocab_size']} and decoder_vocab_size {theirs['decoder_vocab_size']}"
        raise UserError(f"config.json: {sizes} differ; models/transformer.py has one vocabulary for both")
    return theirs["vocab_size"]


def from_names(hf_config, names):
    """Whether the head has a bias: the file tells. Published config.json say no, and their files have one."""
    return {"output_bias": "final_logits_bias" in names if names else hf_config.get("add_bias_logits", True)}


MARIAN_TYPE = HFType(
    model="transformer",
    used={
        "vocab_size": vocab_size,
        "max_seq_len": "max_position_embeddings",
        "d_model": "d_model",
        "num_encoder_layers": "encoder_layers",
        "num_decoder_layers": "decoder_layers",
        "num_heads": same_in_both("encoder_attention_heads", "decoder_attention_heads"),
        "d_ff": same_in_both("encoder_ffn_dim", "decoder_ffn_dim"),
        "dropout": "dropout",
        "activation": activation,
        "scale_embedding": "scale_embedding",
        "pad_id": "pad_token_id",
    },
    defaults={
        "vocab_size": 58101,
        "decoder_vocab_size": None,
        "max_position_embeddings": 1024,
        "d_model": 1024,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
        "dropout": 0.1,
        "activation_function": "gelu",
        "scale_embedding": False,
        "pad_token_id": 58100,
    },
    must_equal={
        "is_encoder_decoder": (True,),
        "pruned_heads": ({},),
        "add_cross_attention": (False,),
        "share_encoder_decoder_embeddings": (True,),
        "tie_word_embeddings": (True,),
        "static_position_embeddings": (True,),
        "normalize_before": (False,),
        "normalize_embedding": (False,),
        "add_final_layer_norm": (False,),
    },
    # The dropouts and layerdrops act in training alone, where models/transformer.py does as the paper does.
    inert=words("""
        attention_dropout activation_dropout classifier_dropout classif_dropout encoder_layerdrop
        decoder_layerdrop init_std num_hidden_layers add_bias_logits
    """),
    fixed={"norm_eps": 1e-5, "positions": "sinusoidal", "window": None, "cross_downsample": 1},
    token_ids={
        "decoder_start_token_id": 58100,
        "pad_token_id": 58100,
        "eos_token_id": 0,
        "forced_eos_token_id": 0,
    },
    from_names=from_names,
    generation=words("""
        decoder_start_token_id pad_token_id bos_token_id eos_token_id forced_eos_token_id bad_words_ids
        max_length num_beams length_penalty early_stopping do_sample temperature top_k top_p
    """),
)

HF_TYPES = {"marian": MARIAN_TYPE}


def to_hf_config(config):
    for name, value in MARIAN_TYPE.fixed.items():
        if config[name] != value:
            raise UserError(
                f"Marian, the model of Hugging Face, has {name} {value}; here it is {config[name]}"
            )
    both = {"attention_heads": config["num_heads"], "ffn_dim": config["d_ff"]}
    return {
        "architectures": ["MarianMTModel"],
        "model_type": "marian",
        **renamed(MARIAN_TYPE, config),
        **{f"{half}_{name}": value for name, value in both.items() for half in ("encoder", "decoder")},
        "vocab_size": config["vocab_size"],
        "decoder_vocab_size": config["vocab_size"],
        "activation_function": config["activation"],
        "add_bias_logits": config["output_bias"],
        "static_position_embeddings": True,
        # Marian begins a target with the pad token.
        "decoder_start_token_id": config["pad_id"],
    }
