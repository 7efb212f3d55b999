"""BERT at Hugging Face: its tensors, the fields of its config.json, and the heads that it may have.

Two things say which head a checkpoint has, and need not agree: `architectures` in config.json names a class
of transformers, and the file holds tensors. The published bert-base-uncased names BertForMaskedLM, and holds
the next-sentence head and the pooler too. Here nothing that is stored is dropped: the head is what the file
holds, together with what config.json names (tensors of it that lack are reported as missing).

    cls.predictions.*                          masked_lm
    cls.seq_relationship.*                     next_sentence
    both                                       pretraining
    classifier.*                               sequence or tokens; config.json alone can tell which
    none of these                              None: the hidden states, for a sentence encoder
"""

import torch

from conversion.config_fields import DECODER, HFType, activation_named, highest, num_labels, renamed, words
from conversion.gguf_table import LAYER_NORM, GGUFType
from conversion.tensor_table import Computed, Layout, table
from models.utils.errors import UserError

LAYOUT = Layout(
    prefix="bert.",
    # BertModel, which is the model without a head, is saved without the prefix.
    without_prefix=lambda config: config["head"] is None,
    old_endings={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    computed={
        "bert.embeddings.position_ids": Computed(
            "the numbers 0, 1, 2, ...", lambda config: torch.arange(config["max_seq_len"])[None]
        )
    },
    tied=lambda config: (
        {"lm_head.vocab_proj.weight": "token_embed.weight"}
        if config["head"] in ("masked_lm", "pretraining")
        else {}
    ),
    copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    rows=table("""
        token_embed.weight                   bert.embeddings.word_embeddings.weight
        pos_embed.weight                     bert.embeddings.position_embeddings.weight
        segment_embed.weight                 bert.embeddings.token_type_embeddings.weight
        embed_norm.{p}                       bert.embeddings.LayerNorm.{p}
        layers.{n}.attn.q_proj.{p}           bert.encoder.layer.{n}.attention.self.query.{p}
        layers.{n}.attn.k_proj.{p}           bert.encoder.layer.{n}.attention.self.key.{p}
        layers.{n}.attn.v_proj.{p}           bert.encoder.layer.{n}.attention.self.value.{p}
        layers.{n}.attn.o_proj.{p}           bert.encoder.layer.{n}.attention.output.dense.{p}
        layers.{n}.attn_norm.{p}             bert.encoder.layer.{n}.attention.output.LayerNorm.{p}
        layers.{n}.ffn.up_proj.{p}           bert.encoder.layer.{n}.intermediate.dense.{p}
        layers.{n}.ffn.down_proj.{p}         bert.encoder.layer.{n}.output.dense.{p}
        layers.{n}.ffn_norm.{p}              bert.encoder.layer.{n}.output.LayerNorm.{p}
        pooler.proj.{p}                      bert.pooler.dense.{p}
        lm_head.proj.{p}                     cls.predictions.transform.dense.{p}
        lm_head.norm.{p}                     cls.predictions.transform.LayerNorm.{p}
        lm_head.vocab_proj.weight            cls.predictions.decoder.weight
        lm_head.vocab_proj.bias              cls.predictions.bias
        next_sentence_head.{p}               cls.seq_relationship.{p}
        classifier.{p}                       classifier.{p}
    """),
)

# The classes of transformers: our head, and whether the class has a pooler.
ARCHITECTURES = {
    "BertModel": (None, True),
    "BertForMaskedLM": ("masked_lm", False),
    "BertForPreTraining": ("pretraining", True),
    "BertForNextSentencePrediction": ("next_sentence", True),
    "BertForSequenceClassification": ("sequence", True),
    "BertForTokenClassification": ("tokens", False),
}
PARTS = {
    None: set(),
    "masked_lm": {"cls.predictions"},
    "next_sentence": {"cls.seq_relationship"},
    "pretraining": {"cls.predictions", "cls.seq_relationship"},
    "sequence": {"classifier"},
    "tokens": {"classifier"},
}


def activation(theirs):
    return activation_named(theirs, "hidden_act", "models/bert.py", ("gelu", "gelu_new", "relu"))


def from_names(hf_config, names):
    """Pooler, head and labels. names: of the file's tensors; without them the architecture alone decides."""
    architecture = (hf_config.get("architectures") or ["BertModel"])[0]
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"config.json: models/bert.py does not have {architecture}'s head; it has {known}'s")
    named, pooler = ARCHITECTURES[architecture]
    head = head_of(named, names)
    if names:
        stored = any(name.startswith(("bert.pooler.", "pooler.")) for name in names)
        pooler = stored or head in ("pretraining", "next_sentence", "sequence")
    has_labels = head in ("sequence", "tokens")
    return {"pooler": pooler, "head": head, "num_labels": num_labels(hf_config) if has_labels else None}


def head_of(named, names):
    """The head for the parts that the file holds and those that config.json names."""
    stored = {part for part in set().union(*PARTS.values()) for name in names if name.startswith(part + ".")}
    parts = PARTS[named] | stored
    if "classifier" not in parts:
        return next(head for head, needs in PARTS.items() if needs == parts)
    if named not in ("sequence", "tokens"):
        raise UserError(
            "config.json: there is a classifier, so architectures should name BertForSequenceClassification "
            "(labels for the whole text) or BertForTokenClassification (for each token)"
        )
    return named


BERT_TYPE = HFType(
    model="bert",
    used={
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "num_segments": "type_vocab_size",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "norm_eps": "layer_norm_eps",
        "activation": activation,
        "dropout": highest("hidden_dropout_prob", "attention_probs_dropout_prob"),
    },
    defaults={
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    },
    must_equal={
        **DECODER,
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "position_embedding_type": ("absolute",),
        "tie_word_embeddings": (True,),
    },
    # classifier_dropout acts in training alone. The others stand in Google's files, and no code reads them.
    inert=words("""
        classifier_dropout directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
        pooler_size_per_head pooler_type
    """),
    from_names=from_names,
)

HF_TYPES = {"bert": BERT_TYPE}


def write_gguf(config):
    """llama.cpp has BERT as an encoder of sentences, which are all of segment 0."""
    if config["head"] is not None or config["activation"] != "gelu":
        raise UserError(
            f"llama.cpp has no BERT with the head {config['head']} and {config['activation']}; written as "
            "GGUF are those without a head, which give vectors of sentences, with gelu"
        )
    return {"attention.causal": False, "tokenizer.ggml.token_type_count": config["num_segments"]}


GGUF = {
    "bert": GGUFType(
        ("bert",),
        fields=LAYER_NORM,
        known={"attention.causal", "pooling_type"},
        read=lambda fields, config: {"pooler": False, "head": None},
        write=write_gguf,
        left_out={"pooler.": "tells whether two texts belong together"},
    )
}


def to_hf_config(config):
    classes = {head: name for name, (head, _) in ARCHITECTURES.items()}
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return {
        "architectures": [classes[config["head"]]],
        "model_type": "bert",
        **renamed(BERT_TYPE, config),
        **dict.fromkeys(rates, config["dropout"]),
        "hidden_act": config["activation"],
        "position_embedding_type": "absolute",
        **({"num_labels": config["num_labels"]} if config["num_labels"] else {}),
    }
