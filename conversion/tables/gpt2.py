"""GPT-2 at Hugging Face: its tensors, and the fields of its config.json."""

from conversion.config_fields import DECODER, HFType, highest, renamed, spellings, words
from conversion.gguf_table import LAYER_NORM, GGUFType
from conversion.tables import llama
from conversion.tensor_table import Layout, table

# wte, wpe: token and position embeddings; h: layers; ln: norms; c_attn: q, k, v in one; c_fc: the map up.
LAYOUT = Layout(
    prefix="transformer.",
    skipped={
        "transformer.h.{n}.attn.bias": "the causal mask, a triangle of ones",
        "transformer.h.{n}.attn.masked_bias": "what old versions put where the mask is 0",
    },
    # The head is always tied to the embedding.
    tied=lambda config: {"lm_head.weight": "token_embed.weight"},
    rows=table("""
        token_embed.weight                   transformer.wte.weight
        pos_embed.weight                     transformer.wpe.weight
        layers.{n}.attn_norm.{p}             transformer.h.{n}.ln_1.{p}
        layers.{n}.attn.{q,k,v}_proj.weight  transformer.h.{n}.attn.c_attn.weight  transpose+split
        layers.{n}.attn.{q,k,v}_proj.bias    transformer.h.{n}.attn.c_attn.bias    split
        layers.{n}.attn.o_proj.weight        transformer.h.{n}.attn.c_proj.weight  transpose
        layers.{n}.attn.o_proj.bias          transformer.h.{n}.attn.c_proj.bias
        layers.{n}.ffn_norm.{p}              transformer.h.{n}.ln_2.{p}
        layers.{n}.ffn.up_proj.weight        transformer.h.{n}.mlp.c_fc.weight     transpose
        layers.{n}.ffn.up_proj.bias          transformer.h.{n}.mlp.c_fc.bias
        layers.{n}.ffn.down_proj.weight      transformer.h.{n}.mlp.c_proj.weight   transpose
        layers.{n}.ffn.down_proj.bias        transformer.h.{n}.mlp.c_proj.bias
        final_norm.{p}                       transformer.ln_f.{p}
        lm_head.weight                       lm_head.weight
    """),
)


GGUF = {"gpt2": GGUFType(("gpt2",), fields=LAYER_NORM)}

PARALLEL = llama.PARALLEL


def gpt2_d_ff(theirs):
    return theirs["n_inner"] or 4 * theirs["n_embd"]


GPT2_TYPE = HFType(
    model="gpt2",
    used={
        "vocab_size": "vocab_size",
        "max_seq_len": "n_positions",
        "d_model": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "d_ff": gpt2_d_ff,
        "norm_eps": "layer_norm_epsilon",
        "dropout": highest("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    },
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
    },
    must_equal={
        **DECODER,
        "activation_function": spellings("gelu_new"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    # n_ctx gave the size of the mask that n_positions gives now; the others belong to heads for other tasks.
    inert=words("""
        n_ctx n_special predict_special_tokens summary_type summary_use_proj summary_activation
        summary_proj_to_labels summary_first_dropout
    """),
    token_ids={"bos_token_id": 50256, "eos_token_id": 50256},
)

HF_TYPES = {"gpt2": GPT2_TYPE}


def to_hf_config(config):
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **renamed(GPT2_TYPE, config),
        "n_inner": config["d_ff"],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config["dropout"]),
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    }
