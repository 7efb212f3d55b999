"""Measuring models that answer in one pass: BERT on texts of one length, a Vision Transformer on images.

zoo.py and transformers_peer.py each have a subject of this kind; this is what both do alike. They are asked
as decoders are, for one answer to each of some prompts. For a batch of them arithmetic is the limit, and not
memory: a weight that is read is used for every token, or every patch, of all prompts.
"""

import torch

from benchmarks.clock import synchronized


class OnePass:
    """What a subject is asked for, by its `answers(inputs)`; it has a model, a device and a dtype."""

    @torch.inference_mode()
    def logits(self, prompt):
        """The logits (N,) of a prompt's labels; where each of its tokens has logits, those of the first."""
        logits = self.answers(self.inputs([prompt]))[0]
        return logits.reshape(-1, logits.shape[-1])[0].float().tolist()

    @torch.inference_mode()
    def run(self, prompts, new_tokens):
        """As Eager.run in zoo.py; no tokens come out, and one time, that of the model alone."""
        inputs = self.inputs(prompts)
        started = synchronized(self.device)
        self.answers(inputs)
        return {"tokens": [[] for _ in prompts], "times": [synchronized(self.device) - started]}

    def inputs(self, prompts):
        """Token ids (B, T), or images (B, C, h_px, w_px), each drawn from the number that is its prompt."""
        config = self.model.config
        if not hasattr(config, "image_size"):
            return torch.tensor(prompts, device=self.device)
        shape = config.num_channels, config.image_size, config.image_size
        images = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for (seed,) in prompts]
        return torch.stack(images).to(self.device, self.dtype)
