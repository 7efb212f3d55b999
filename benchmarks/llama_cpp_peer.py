"""llama.cpp as a subject, by the C functions that llama-cpp-python hands through.

Its own loop in Python copies all logits for every token and goes through a chain of samplers; here a step is
one llama_decode for all texts, as llama.cpp's server makes it, and one argmax for each, so that what is timed
is llama.cpp. A call holds the next token of every text that is being written and then, of those that are not
read yet, as many tokens as fit; who ends makes room for who waits.
"""

import ctypes
import time
from dataclasses import dataclass, field

import llama_cpp
import numpy as np

CHUNK = 512  # tokens of a call, llama.cpp's default
MOST = 256  # texts at once that llama.cpp allows
GGML_TYPE_F32, ERROR = 0, 4  # ggml.h


class LlamaCpp:
    """num_slots: tokens of the longest text; num_texts: of those that are asked for at once."""

    def __init__(self, file, threads, num_slots, num_texts=1):
        self.file, self.threads = file, threads
        self.num_slots, self.num_texts = num_slots, min(num_texts, MOST)
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
        options.n_ctx, options.n_seq_max = self.num_slots * self.num_texts, self.num_texts
        options.n_batch = options.n_ubatch = CHUNK
        options.kv_unified = True  # eight texts take a third to a half of the time that they take apart
        options.n_threads = options.n_threads_batch = self.threads
        if self.file.endswith("F32.gguf"):  # the cache too, which is F16 otherwise
            options.type_k = options.type_v = GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no room for {self.num_slots} tokens with {self.file}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)

    def logits(self, prompt):
        """As Eager.logits in zoo.py."""
        llama_cpp.llama_memory_clear(self.memory, False)
        text = Text(prompt, number=0)
        while text.num_unread > 1:
            self.decode([(text, min(CHUNK, text.num_unread - 1))])
        return self.decode([(text, 1)])[0].tolist()

    def run(self, prompts, new_tokens):
        """As Eager.run in zoo.py, for all prompts at once."""
        counts = new_tokens if isinstance(new_tokens, list) else [new_tokens] * len(prompts)
        texts = [Text(prompt, count) for prompt, count in zip(prompts, counts)]
        waiting, running, numbers, times = list(texts), [], list(range(self.num_texts)), []
        llama_cpp.llama_memory_clear(self.memory, False)
        started = time.perf_counter()
        while waiting or running:
            while waiting and numbers:
                running.append(waiting.pop(0))
                running[-1].number = numbers.pop()
            made = self.step(running)
            if made:
                times.append(time.perf_counter() - started)
            for text in made:
                if len(text.made) == text.num_wanted:
                    running.remove(text)
                    numbers.append(text.number)
                    llama_cpp.llama_memory_seq_rm(self.memory, text.number, -1, -1)
        return {"tokens": [text.made for text in texts], "times": times}

    def step(self, running):
        """A call of the model; the texts that have one token more now."""
        parts, room = [], CHUNK
        for text in sorted(running, key=lambda text: text.num_unread):  # those that are written come first
            if count := min(text.num_unread, room):
                parts.append((text, count))
                room -= count
        logits = self.decode(parts)
        made = [(text, row) for (text, _), row in zip(parts, logits) if text.num_unread == 0]
        for text, row in made:
            text.made.append(int(row.argmax()))
        return [text for text, _ in made]

    def decode(self, parts):
        """Feed the next `count` tokens of each text; the logits behind the last one of each."""
        batch, n = self.batch, 0
        for text, count in parts:
            for place, token in enumerate(text.next_tokens(count), start=text.num_read):
                batch.token[n], batch.pos[n], batch.logits[n] = token, place, False
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, text.number
                n += 1
            batch.logits[n - 1] = True
            text.num_read += count
        batch.n_tokens = n
        status = llama_cpp.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode ended with status {status}")
        ends = np.cumsum([count for _, count in parts]) - 1
        pointers = [llama_cpp.llama_get_logits_ith(self.context, int(end)) for end in ends]
        return [np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)) for pointer in pointers]


@dataclass(eq=False)
class Text:
    prompt: list
    num_wanted: int = 1  # new tokens
    number: int | None = None  # of its sequence in llama.cpp
    num_read: int = 0
    made: list = field(default_factory=list)

    @property
    def num_unread(self):
        return len(self.prompt) + len(self.made) - self.num_read

    def next_tokens(self, count):
        return [*self.prompt, *self.made][self.num_read :][:count]
