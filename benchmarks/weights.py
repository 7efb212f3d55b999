"""The same random weights for everybody, each in the files that it reads, and what they should say.

Speed does not depend on the values of weights, but whether two programs compute the same does: every one is
drawn, biases and norms too, in a scale that lets signals neither die nor grow. They are rounded to bf16 at
once, so that fp32 and bf16 hold the same numbers.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.zoo import Encoder, bytes_read_per_token
from conversion.convert import convert
from conversion.tables import to_hf_config, to_hf_state
from models import config_to_dict, create_model, load_config, load_model
from models.utils.command_line import DTYPES
from models.utils.machine import dtype_named
from models.utils.quantize import quantization_of


class Writer:
    def __init__(self, config, folder, threads):
        if threads:
            torch.set_num_threads(threads)
        self.config, self.folder = config, Path(folder)

    def write(self, weights, gguf_kinds, draft):
        """Folders hf-DTYPE for transformers, DTYPE, int8 and int4 for us, files KIND.gguf for llama.cpp:

        gguf_kinds: {kind of weights: what GGUF calls it} of those that llama.cpp is given.

        draft: whether a drafter is wanted; it is written beside, in folders of the same names.
        Returns, for each file of the peers, how many of its bytes a decoded token reads.
        """
        sizes = self.write_model({}, self.folder, weights, gguf_kinds)
        if draft:
            self.write_model(draft_fields(*load_config(self.config)), self.folder / "draft", weights, {})
        return sizes

    def write_model(self, overrides, folder, weights, gguf_kinds):
        model_name, _ = load_config(self.config)
        model = redrawn(create_model(self.config, **overrides))
        for dtype in dict.fromkeys(["float32", *(name for name in weights if name in DTYPES)]):
            write_hf(model_name, model, folder / f"hf-{dtype}", dtype_named(dtype))
        for kind in weights:
            quantization = None if kind in DTYPES else quantization_of(kind, None)
            dtype = dtype_named(kind if kind in DTYPES else "bfloat16")
            source = folder / "hf-float32"
            convert(source, folder / kind, dtype, progress=False, model=model_name, quantization=quantization)
        num_weights = bytes_read_per_token(model) // 4
        sizes = {f"transformers {name}": num_weights * dtype_named(name).itemsize for name in DTYPES}
        for kind, gguf_kind in gguf_kinds.items():
            from benchmarks.gguf_file import matrix_bytes_read, write_gguf

            path = folder / f"{gguf_kind}.gguf"
            write_gguf(path, model_name, model, gguf_kind)
            sizes[f"llama.cpp {kind}"] = matrix_bytes_read(path)
        return sizes

    @torch.inference_mode()
    def reference(self, prompt, new_tokens):
        """What fp32 says greedily, in `transformers` where it is there: the tokens.

        The logits that led to each of them are written to reference.npy: (new_tokens, V).
        """
        source, tokens = self.folder / "hf-float32", torch.tensor([prompt])
        if importlib.util.find_spec("transformers"):
            from transformers import AutoModelForCausalLM

            peer = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
            options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
            said = peer.generate(
                tokens, pad_token_id=0, output_logits=True, return_dict_in_generate=True, **options
            )
            tokens, logits = said.sequences, torch.cat(said.logits)
        else:
            model = load_model(convert(source, progress=False))
            for _ in range(new_tokens):
                logits = model(tokens)[0, len(prompt) - 1 :]
                tokens = torch.cat([tokens, logits[-1:].argmax(dim=-1, keepdim=True)], dim=1)
        np.save(self.folder / "reference.npy", logits.numpy())
        return tokens[0, len(prompt) :].tolist()

    def one_pass_reference(self, prompt):
        """The same of a model that answers in one pass: no tokens, and logits (1, V)."""
        source = self.folder / "hf-float32"
        if importlib.util.find_spec("transformers"):
            from benchmarks.transformers_peer import TransformersEncoder

            subject = TransformersEncoder(source, None, "cpu", "float32")
        else:
            subject = Encoder(convert(source, progress=False), None, "cpu", "float32")
        subject.load()
        np.save(self.folder / "reference.npy", [subject.logits(prompt)])
        return []


@torch.no_grad()
def redrawn(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:  # a bias, or a norm: about what it begins with (0 for 1 + w)
            noise = 0.1 * noise + parameter.mean()
        else:
            noise *= parameter.shape[-1] ** -0.5
        parameter.copy_(noise.bfloat16())
    return model.eval()


def write_hf(model_name, model, folder, dtype):
    """The model in the layout of Hugging Face."""
    folder.mkdir(parents=True)
    fields = config_to_dict(model_name, model.config)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    save_file(to_hf_state(model_name, fields, state), folder / "model.safetensors", {"format": "pt"})
    config = {**to_hf_config(model_name, fields), "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))


def draft_fields(model_name, config):
    """The fields in which a drafter differs: a third of the width, a sixth of the layers, a tied head.

    (An output matrix of its own would outweigh the layers.)
    """
    fields = config_to_dict(model_name, config)
    heads = max(1, fields.get("num_heads", 1) // 3)
    head_dim = fields.get("head_dim", config.d_model // fields.get("num_heads", 3))
    wanted = {
        "d_model": heads * head_dim,
        "num_heads": heads,
        "num_kv_heads": heads,
        "num_layers": max(1, config.num_layers // 6),
        "d_ff": max(32, fields.get("d_ff", 0) // 96 * 32),
        "tied_head": True,
    }
    return {name: value for name, value in wanted.items() if name in fields}
