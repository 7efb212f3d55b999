"""The engine as the page at / shows it: what the steps did, who has which blocks, and what is kept.

    {"steps": [[["12", "prefill", 64], ["9", "decode", 1]], ...],     for each step: text, kind, tokens fed
     "rows": [{"id": "9", "state": "running", "prompt": 40, "tokens": 52, "stored": 51, "blocks": [3, 4, 9]}],
     "kept": [17, 18],                            unused blocks that a prompt may still find again
     "totals": engine.statistics()}

No text is in it: who watches does not read what others write.
Proof: tests/test_app.py.
"""

from runs_serve.engine import Engine


class LiveEngine(Engine):
    """An engine that also says what its last step did: `work`, a list of [text, kind, tokens fed]."""

    work = ()

    def step(self):
        self.work = []
        return super().step()

    def read(self, rows, counts):
        for row, count in zip(rows, counts):
            kind = "prefill" if row.num_cached < len(row.request.prompt) else "decode"
            self.work.append([name_of(row.number, row.choice), kind, count])
        return super().read(rows, counts)


def name_of(number, choice):
    """What a text is called on the page: the number of its request, with a letter from the second on.

    >>> name_of(12, 0), name_of(12, 1)
    ('12', '12b')
    """
    return f"{number}{'abcdefghijklmnop'[choice] if choice else ''}"


def picture(engine, steps):
    """Between two steps, in the thread of the engine."""
    rows = [
        {
            "id": name_of(row["request"], row["choice"]),
            "state": "running" if row["is_running"] else "waiting",
            "prompt": row["num_prompt"],
            "tokens": row["num_tokens"],
            "stored": row["num_cached"],
            "blocks": row["blocks"],
        }
        for row in engine.picture()
    ]
    return {"steps": steps, "rows": rows, "kept": list(engine.blocks.unused), "totals": engine.statistics()}
