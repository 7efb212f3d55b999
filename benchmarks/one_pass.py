"""What subjects do alike whose model answers in one pass: BERT on texts, a Vision Transformer on images.

They are asked as decoders are, for one answer to each of some prompts. Arithmetic is the limit here and not
memory: a weight that is read is used for every token, or every patch, of all prompts.
"""

import torch

from benchmarks.clock import synchronized


class OnePass:
    """Logits and times of what `answers(inputs)` computes."""

    @torch.inference_mode()
    def logits(self, prompt):
        """Of the labels, or where every token has logits those of the first."""
        logits = self.answers(self.inputs([prompt]))[0]
        return logits.reshape(-1, logits.shape[-1])[0].float().tolist()

    @torch.inference_mode()
    def run(self, prompts, new_tokens):
        """As Eager.run in zoo.py; no tokens come out, and one time."""
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
