"""`transformers` as a subject: the same weights in its own layout, run by its `generate`."""

import json
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.clock import synchronized
from benchmarks.one_pass import OnePass
from models.utils.errors import UserError
from models.utils.machine import dtype_named, keep_freed_memory


class Transformers:
    def __init__(self, folder, threads, device, dtype):
        keep_freed_memory()
        if threads:
            torch.set_num_threads(threads)
        self.folder, self.device, self.dtype = folder, torch.device(device), dtype_named(dtype)

    def about(self):
        return {"threads": torch.get_num_threads()}

    def load(self):
        self.model, loaded = self.model_class().from_pretrained(
            self.folder, dtype=self.dtype, output_loading_info=True, local_files_only=True
        )
        if any(loaded.values()):
            raise UserError(f"the weights do not fit transformers: {loaded}")
        self.model.to(self.device).eval()

    def model_class(self):
        return AutoModelForCausalLM

    @torch.inference_mode()
    def logits(self, prompt):
        return self.model(torch.tensor([prompt], device=self.device)).logits[0, -1].float().tolist()

    @torch.inference_mode()
    def run(self, prompts, new_tokens):
        """As Eager.run in zoo.py. Prompts of different lengths are padded on the left, as it asks for.

        Where each prompt has a length of its own to reach, all go on to the longest, and are cut off then.
        """
        counts = new_tokens if isinstance(new_tokens, list) else [new_tokens] * len(prompts)
        longest = max(len(prompt) for prompt in prompts)
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        clock = Clock()
        started = synchronized(self.device)
        output = self.model.generate(
            torch.tensor(padded, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            max_new_tokens=max(counts),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=clock,
        )
        times = [when - started for when in clock.times[1:]]
        rows = [row[:count] for row, count in zip(output[:, longest:].tolist(), counts)]
        return {"tokens": rows, "times": times}


class TransformersEncoder(OnePass, Transformers):
    """A model that answers in one pass."""

    def model_class(self):
        (name,) = json.loads((Path(self.folder) / "config.json").read_text())["architectures"]
        return getattr(transformers, name)

    def answers(self, inputs):
        return self.model(inputs)[0]


class Clock:
    """A streamer for generate: it is handed the prompt first, then each token."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        pass
