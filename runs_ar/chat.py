"""A conversation: the turns so far, laid out by the checkpoint's own template, are the next prompt.

    messages --template--> token ids --generate--> the assistant's turn, which joins the messages

How turns are marked differs from model to model (Llama 3 writes <|start_header_id|>user<|end_header_id|>
before a turn and <|eot_id|> after it). But each checkpoint carries its template as data, so this page serves
them all. The cache outlives a turn: only what is new since then goes through the model.

Proof: tests/test_generate.py.
"""

from models.utils.errors import UserError
from runs_ar.generate import TextStream, check_prompts, generate_text, keeps_states

# A cache for the whole context of a modern model takes many GB: start small, grow with the conversation.
FIRST_SLOTS = 2048


class Conversation:
    def __init__(self, model, tokenizer, eos_ids=(), system=None):
        """system: what the model is told before the first question; it is never forgotten."""
        self.model, self.tokenizer = model, tokenizer
        self.eos_ids = frozenset(eos_ids) | end_of_turn_ids(tokenizer)
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.num_kept = len(self.messages)
        self.cache, self.num_slots = None, 0
        self.cached = []  # the tokens whose keys and values the cache holds

    def answer(self, text, max_new_tokens, stop_strings=(), on_token=lambda token: None, **options):
        """Yield the answer to the user's `text`, piece by piece; `options` as for generate.

        The caller may leave off in the middle: what was said so far is then the assistant's turn.
        """
        self.messages.append({"role": "user", "content": text})
        said = None
        try:
            prompt = self.fitting_prompt(max_new_tokens)
            check_prompts(self.model.config, [prompt])
            options |= {"max_new_tokens": max_new_tokens, "eos_ids": self.eos_ids}
            options |= {"num_cached": self.prepare_cache(prompt, max_new_tokens), "cache": self.cache}
            stream = TextStream(self.tokenizer, prompt, stop_strings)
            said, tokens = "", []
            for token, piece in generate_text(self.model, prompt, stream, **options):
                # A token is fed, and so cached, when the one after it is asked for.
                self.cached = prompt + tokens
                tokens.append(token)
                on_token(token)
                said += piece
                yield piece
            rest = stream.finish()
            said += rest
            yield rest
        except (Exception, KeyboardInterrupt):
            # In the middle of a step some layers' states have moved on, and others not.
            if keeps_states(self.model):
                self.forget()
            raise
        finally:
            if said is None:
                self.messages.pop()  # a question that cannot be asked is not part of the conversation
            else:
                self.messages.append({"role": "assistant", "content": said.strip()})

    def fitting_prompt(self, max_new_tokens):
        """The conversation as token ids; its oldest turns are forgotten when it outgrows the context."""
        context = self.model.config.max_seq_len
        longest = context - min(max_new_tokens, context // 4)
        prompt = self.tokenizer.encode_chat(self.messages)
        while len(prompt) > longest and len(self.messages) > self.num_kept + 2:
            del self.messages[self.num_kept : self.num_kept + 2]
            prompt = self.tokenizer.encode_chat(self.messages)
        return prompt

    def prepare_cache(self, prompt, max_new_tokens):
        """See that the cache has room; how many of the prompt's first tokens it holds already."""
        context = self.model.config.max_seq_len
        needed = min(len(prompt) + max_new_tokens, context)
        if needed > self.num_slots:
            self.num_slots = min(max(2 * needed, FIRST_SLOTS), context)
            self.forget()
        same = 0
        # The last token is fed again in any case: the first pick reads its hidden state.
        while same < min(len(self.cached), len(prompt) - 1) and self.cached[same] == prompt[same]:
            same += 1
        if same < len(self.cached) and keeps_states(self.model):
            self.forget()  # a state goes on behind the last token that it has read, and nowhere else
            same = 0
        if self.cache is None:
            self.cache = self.model.new_cache(1, self.num_slots)
        # From there on the cache is written over, and an interruption may leave it half done.
        self.cached = prompt[:same]
        return same

    def forget(self):
        self.cache, self.cached = None, []


def end_of_turn_ids(tokenizer):
    """The special token that the template puts after an assistant's turn, as an example shows it."""
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    question = tokenizer.encode_chat(chat[:1])
    whole = tokenizer.encode_chat(chat, add_generation_prompt=False)
    special = set(tokenizer.special_tokens.values())
    return frozenset([token for token in whole[len(question) :] if token in special][:1])


def require_template(tokenizer):
    if not tokenizer.chat_template:
        raise UserError(
            "--chat: this checkpoint has no chat template, so it was not trained to chat; use --prompt"
        )
