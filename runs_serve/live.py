"""The engine as the page at / shows it: what the steps did, who has which blocks, and what is kept.

    {"steps": [[["12", "prefill", 64], ["9", "decode", 1]], ...],     for each step: text, kind, tokens fed
     "rows": [{"id": "9", "state": "running", "prompt": 40, "tokens": 52, "stored": 51, "blocks": [3, 4, 9]}],
     "kept": [17, 18],                                      free blocks that a prompt may still find again
     "totals": {"generated": 812, "reused": 64, "preempted": 0}}

No text is in it: who watches does not read what others write.
Proof: tests/test_app.py.
"""

from runs_serve.engine import Engine


class LiveEngine(Engine):
    """An engine that also says what its last step did: `work`, a list of [text, kind, tokens]."""

    work = ()

    def step(self):
        self.work = []
        return super().step()

    def read(self, rows, counts):
        for row, count in zip(rows, counts):
            kind = "prefill" if row.num_cached < len(row.request.prompt) else "decode"
            self.work.append([name_of(row), kind, count])
        return super().read(rows, counts)


def name_of(sequence):
    """The request's number; with several choices, "12b" is the second of them."""
    if sequence.request.num_choices == 1:
        return str(sequence.number)
    return f"{sequence.number}{'abcdefghijklmnop'[sequence.choice]}"


def picture(engine, steps):
    """Between two steps, in the thread of the engine."""
    scheduler = engine.scheduler
    rows = [row_of(each, "running") for each in scheduler.running]
    rows += [row_of(each, "waiting") for each in scheduler.waiting]
    totals = {"generated": engine.num_tokens_made, "reused": scheduler.num_tokens_found}
    totals |= {"preempted": scheduler.num_preempted}
    return {"steps": steps, "rows": rows, "kept": list(engine.blocks.unused), "totals": totals}


def row_of(sequence, state):
    return {
        "id": name_of(sequence),
        "state": state,
        "prompt": len(sequence.request.prompt),
        "tokens": len(sequence.tokens),
        "stored": sequence.num_cached,
        "blocks": list(sequence.table),
    }
