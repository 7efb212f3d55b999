"""Vectors of texts: what /v1/embeddings answers, for every encoder that reads text.

An encoder has a state for each token (`hidden`). The files that sentence-transformers leaves beside a
checkpoint say how they become one vector; where there are none it is their mean. A vector has the length 1,
so that the product of two is the cosine of their angle. A head for something else is left out.

Shapes: B texts, T tokens, D features.
Proof: tests/test_app.py, against `transformers`.
"""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from models.utils.errors import UserError
from runs_ar.generate import NOT_FINITE, check_vocabulary
from runs_encoder.bert import BATCH_SIZE, pool, read_pooling


class Embedder:
    """model: with hidden(tokens, attention_mask=...), which a checkpoint's class offers or does not."""

    def __init__(self, checkpoint, model):
        self.config, self.tokenizer, self.model = checkpoint.config, checkpoint.tokenizer, model
        self.pooling = read_pooling(checkpoint.folder)

    def encode(self, texts):
        """Token ids of each; a text that is a list of ids already is taken as it is."""
        inputs = [self.tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
        for number, ids in enumerate(inputs):
            check_vocabulary(self.config, ids)
            if len(ids) > self.config.max_seq_len:
                raise UserError(
                    f"text {number} has {len(ids)} tokens, the model only {self.config.max_seq_len} "
                    "positions; give a shorter one, or several"
                )
        return inputs

    @torch.inference_mode()
    def vectors(self, inputs):
        """A list of D numbers for each list of token ids."""
        device = next(self.model.parameters()).device
        vectors = []
        for start in range(0, len(inputs), BATCH_SIZE):
            rows = [torch.tensor(ids) for ids in inputs[start : start + BATCH_SIZE]]
            tokens = pad_sequence(rows, batch_first=True).to(device)  # (B, T)
            mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
            hidden = self.model.hidden(tokens, attention_mask=mask.to(device)).float().cpu()  # (B, T, D)
            vectors += [pool(states[: len(row)], self.pooling) for states, row in zip(hidden, rows)]
        if not all(vector.isfinite().all() for vector in vectors):
            raise UserError(NOT_FINITE)
        return [F.normalize(vector, dim=-1).tolist() for vector in vectors]
