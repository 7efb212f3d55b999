"""What the server counts, in Prometheus' text format, which is lines of `name{labels} value`.

    # HELP zoo_tokens_made_total Tokens written.
    # TYPE zoo_tokens_made_total counter
    zoo_tokens_made_total 1250

A counter only grows; whoever watches takes differences and so knows rates. A gauge is what there is now. A
histogram counts in bins that contain each other: le="0.1" holds all that took at most 0.1 seconds.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/
Proof: tests/test_app.py.
"""

from collections import Counter

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64)
# Of the engine: name in Engine.statistics(), name here, what it is. What ends in _total only grows.
OF_ENGINE = [
    ("num_waiting", "zoo_waiting", "Texts that wait for a place."),
    ("num_running", "zoo_running", "Texts that are being written."),
    ("num_blocks", "zoo_blocks", "Blocks of keys and values."),
    ("num_blocks_in_use", "zoo_blocks_in_use", "Blocks that texts use now."),
    ("num_blocks_known", "zoo_blocks_known", "Blocks in no use, kept for a prompt that begins alike."),
    ("num_steps", "zoo_steps_total", "Steps of the engine."),
    ("num_tokens_read", "zoo_tokens_read_total", "Tokens that the model has read."),
    ("num_tokens_made", "zoo_tokens_made_total", "Tokens written."),
    ("num_tokens_sought", "zoo_tokens_sought_total", "Tokens of texts as they were admitted."),
    ("num_tokens_found", "zoo_tokens_found_total", "Those of them whose blocks were known: not read again."),
    ("num_preempted", "zoo_preempted_total", "Texts that had to wait again as blocks ran out."),
    ("num_drafts", "zoo_drafts_total", "Tokens drafted by prompt lookup."),
    ("num_drafts_accepted", "zoo_drafts_accepted_total", "Drafts that the model would have written too."),
]


class Histogram:
    """
    >>> seconds = Histogram((0.1, 1))
    >>> seconds.add(0.05), seconds.add(3)
    (None, None)
    >>> print(*seconds.lines("wait"), sep=chr(10))
    wait_bucket{le="0.1"} 1
    wait_bucket{le="1"} 1
    wait_bucket{le="+Inf"} 2
    wait_sum 3.05
    wait_count 2
    """

    def __init__(self, bounds):
        self.bounds, self.counts = bounds, [0] * len(bounds)
        self.sum, self.count = 0.0, 0

    def add(self, value):
        self.sum += value
        self.count += 1
        for n, bound in enumerate(self.bounds):
            self.counts[n] += value <= bound

    def lines(self, name):
        bins = [*zip(self.bounds, self.counts), ("+Inf", self.count)]
        yield from (f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in bins)
        yield from (f"{name}_sum {self.sum}", f"{name}_count {self.count}")


class Metrics:
    """Written by the event loop alone, so that no lock is needed."""

    def __init__(self):
        self.answers = Counter()  # (endpoint, HTTP status)
        self.batch = Histogram(ROWS)
        self.first_token, self.per_token = Histogram(SECONDS), Histogram(SECONDS)

    def text(self, statistics=None):
        """What /metrics shows; statistics: of the engine, where the model is a decoder."""
        answers = [({"endpoint": e, "status": s}, n) for (e, s), n in sorted(self.answers.items())]
        families = [("zoo_answers_total", "Answers, by endpoint and HTTP status.", answers)]
        if statistics:
            families += [(name, about, [({}, statistics[theirs])]) for theirs, name, about in OF_ENGINE]
            families += [
                ("zoo_batch_rows", "Texts that a step worked on.", self.batch),
                ("zoo_time_to_first_token_seconds", "From request to first token.", self.first_token),
                ("zoo_time_per_token_seconds", "From a text's token to its next.", self.per_token),
            ]
        lines = []
        for name, about, samples in families:
            is_histogram = isinstance(samples, Histogram)
            kind = "histogram" if is_histogram else "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            if is_histogram:
                lines += samples.lines(name)
            else:
                lines += [f"{name}{labelled(labels)} {value}" for labels, value in samples]
        return "\n".join(lines) + "\n"


def labelled(labels):
    """
    >>> labelled({"endpoint": "/v1/models", "status": 200})
    '{endpoint="/v1/models",status="200"}'
    """
    pairs = ",".join(f'{name}="{escaped(str(value))}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def escaped(value):
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
