"""llama.cpp as a subject, by the C functions that llama-cpp-python hands through.

Its own loop in Python copies all logits for every token and goes through a chain of samplers; here a token is
one llama_decode and one argmax, so that what is timed is llama.cpp.
"""

import ctypes
import time

import llama_cpp
import numpy as np

CHUNK = 512  # tokens of a prompt at once, llama.cpp's default
GGML_TYPE_F32, ERROR = 0, 4  # ggml.h


class LlamaCpp:
    def __init__(self, file, threads, num_slots):
        self.file, self.threads, self.num_slots = file, threads, num_slots
        self.complaints = ""
        self.log = llama_cpp.llama_log_callback(self.listen)
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()

    def listen(self, level, text, user_data):
        if level == ERROR:
            self.complaints += text.decode(errors="replace")

    def about(self):
        return {"system": llama_cpp.llama_print_system_info().decode().strip()}

    def load(self):
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(self.file.encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot read {self.file}: {self.complaints}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = self.num_slots, CHUNK, CHUNK
        options.n_threads = options.n_threads_batch = self.threads
        if self.file.endswith("F32.gguf"):  # the cache too, which is F16 otherwise
            options.type_k = options.type_v = GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no room for {self.num_slots} tokens with {self.file}")
        self.memory = llama_cpp.llama_get_memory(self.context)

    def logits(self, prompt):
        """As Eager.logits in zoo.py."""
        self.prefill(prompt[:-1])
        self.decode(prompt[-1:])
        return self.last_logits().tolist()

    def run(self, prompts, new_tokens):
        """As Eager.run in zoo.py, for one prompt."""
        (prompt,) = prompts
        tokens, times = [], []
        started = time.perf_counter()
        self.prefill(prompt)
        while True:
            tokens.append(int(self.last_logits().argmax()))
            times.append(time.perf_counter() - started)
            if len(tokens) == new_tokens:
                return {"tokens": [tokens], "times": times}
            self.decode(tokens[-1:])

    def prefill(self, prompt):
        llama_cpp.llama_memory_clear(self.memory, False)
        for start in range(0, len(prompt), CHUNK):
            self.decode(prompt[start : start + CHUNK])

    def decode(self, tokens):
        """Feed tokens behind those that the cache holds; logits are made for the last one."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode ended with status {status}")

    def last_logits(self):
        pointer = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))
