"""The Vision Transformer at Hugging Face: its tensors, and the fields of its config.json.

The checkpoints of Google and their kin come in two forms: ViTForImageClassification with a classifier, and
ViTModel without one (vit-*-in21k), whose pooler is what is left of the classifier of pre-training. The file's
tensors say whether there is a pooler, which config.json does not.
"""

from conversion.config_fields import HFType, highest, num_labels, renamed, spellings
from conversion.tensor_table import Layout, table
from models.utils.errors import UserError

# layernorm_after stands before the feed-forward: its name says what comes before it.
LAYOUT = Layout(
    prefix="vit.",
    # ViTModel, which is the model without a classifier, is saved without the prefix.
    without_prefix=lambda config: config["num_labels"] is None,
    rows=table("""
        patch_embed.weight         vit.embeddings.patch_embeddings.projection.weight      squares_to_rows
        patch_embed.bias           vit.embeddings.patch_embeddings.projection.bias
        class_token                vit.embeddings.cls_token
        pos_embed                  vit.embeddings.position_embeddings
        layers.{n}.attn_norm.{p}   vit.encoder.layer.{n}.layernorm_before.{p}
        layers.{n}.attn.q_proj.{p} vit.encoder.layer.{n}.attention.attention.query.{p}
        layers.{n}.attn.k_proj.{p} vit.encoder.layer.{n}.attention.attention.key.{p}
        layers.{n}.attn.v_proj.{p} vit.encoder.layer.{n}.attention.attention.value.{p}
        layers.{n}.attn.o_proj.{p} vit.encoder.layer.{n}.attention.output.dense.{p}
        layers.{n}.ffn_norm.{p}    vit.encoder.layer.{n}.layernorm_after.{p}
        layers.{n}.ffn.up_proj.{p} vit.encoder.layer.{n}.intermediate.dense.{p}
        layers.{n}.ffn.down_proj.{p} vit.encoder.layer.{n}.output.dense.{p}
        final_norm.{p}             vit.layernorm.{p}
        pooler.{p}                 vit.pooler.dense.{p}
        classifier.{p}             classifier.{p}
    """),
)


def from_names(hf_config, names):
    """Pooler and labels. names: of the file's tensors; without them the architecture alone decides."""
    (architecture,) = hf_config.get("architectures") or ["ViTForImageClassification"]
    if architecture not in ("ViTForImageClassification", "ViTModel"):
        raise UserError(
            f"config.json: models/vision_transformer.py has no head for {architecture}; "
            "it has those of ViTForImageClassification and ViTModel"
        )
    if architecture == "ViTForImageClassification":
        return {"pooler": False, "num_labels": num_labels(hf_config)}
    pooler = not names or any(name.endswith("pooler.dense.weight") for name in names)
    return {"pooler": pooler, "num_labels": None}


VIT_TYPE = HFType(
    model="vision_transformer",
    used={
        "image_size": "image_size",
        "patch_size": "patch_size",
        "num_channels": "num_channels",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "norm_eps": "layer_norm_eps",
        "qkv_bias": "qkv_bias",
        "dropout": highest("hidden_dropout_prob", "attention_probs_dropout_prob"),
    },
    defaults={
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    must_equal={
        "is_encoder_decoder": (False,),
        "pruned_heads": ({},),
        "hidden_act": spellings("gelu"),
        "pooler_act": ("tanh",),
    },
    # The pooler's shape is checked where there is one. encoder_stride belongs to a head that fills in pixels.
    inert={"encoder_stride", "pooler_output_size"},
    from_names=from_names,
)

HF_TYPES = {"vit": VIT_TYPE}


def to_hf_config(config):
    labels = {"num_labels": config["num_labels"]} if config["num_labels"] else {}
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return {
        "architectures": ["ViTForImageClassification" if labels else "ViTModel"],
        "model_type": "vit",
        **renamed(VIT_TYPE, config),
        **dict.fromkeys(rates, config["dropout"]),
        "hidden_act": "gelu",
        **labels,
    }
