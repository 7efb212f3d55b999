"""A layout of its own, for a page of the test that adds pages: no model of transformers is built like it."""

from conversion.config_fields import DECODER, HFType, renamed
from conversion.tensor_table import Layout, table

LAYOUT = Layout(
    prefix="backbone.",
    tied=lambda config: {"lm_head.weight": "token_embed.weight"},
    rows=table("""
        token_embed.weight                   backbone.embeddings.weight
        layers.{n}.norm.weight               backbone.layers.{n}.norm.weight
        layers.{n}.mixer.q_proj.weight       backbone.layers.{n}.mixer.c_proj.weight
        layers.{n}.mixer.k_proj.weight       backbone.layers.{n}.mixer.b_proj.weight
        layers.{n}.mixer.v_proj.weight       backbone.layers.{n}.mixer.x_proj.weight
        layers.{n}.mixer.keep_proj.{p}       backbone.layers.{n}.mixer.a_proj.{p}
        layers.{n}.mixer.gate_proj.weight    backbone.layers.{n}.mixer.z_proj.weight
        layers.{n}.mixer.o_proj.weight       backbone.layers.{n}.mixer.out_proj.weight
        final_norm.weight                    backbone.norm_f.weight
        lm_head.weight                       lm_head.weight
    """),
)

RECURRENCE = HFType(
    model="recurrence",
    used={
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "d_state": "state_size",
        "norm_eps": "layer_norm_epsilon",
    },
    defaults={
        "vocab_size": 50288,
        "max_position_embeddings": 2048,
        "hidden_size": 768,
        "num_hidden_layers": 24,
        "state_size": 128,
        "layer_norm_epsilon": 1e-5,
    },
    must_equal={**DECODER, "tie_word_embeddings": (True,)},
    inert=set(),
)

HF_TYPES = {"strange_recurrence": RECURRENCE}


def to_hf_config(config):
    return {
        "architectures": ["StrangeRecurrenceForCausalLM"],
        "model_type": "strange_recurrence",
        **renamed(RECURRENCE, config),
    }
