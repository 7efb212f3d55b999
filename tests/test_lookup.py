"""The proof of runs_ss/lookup.py; that its drafts change no text, tests/test_speculate.py shows."""

import torch

from models.utils.sampling import GREEDY, Sampling
from runs_ss.lookup import LONGEST, Index, LookupDrafter


def found(text, num_tokens=4):
    return Index().continuation(list(text), num_tokens)


def test_what_followed_before_is_drafted():
    assert found("one two, one ") == list("two,")
    assert found("abcXabdYab", 2) == ["d", "Y"], "the last place counts"
    assert found("pabX qabY pab", 1) == ["X"], "the longest run counts, though a shorter one is nearer"
    assert found("xaybxz", 2) == [] and found("x", 2) == [] and found("xyz", 2) == []
    assert found("xaybx", 2) == ["a", "y"]


def test_a_copy_runs_into_itself():
    assert found("zabab", 5) == list("ababa")
    assert found("zaa", 3) == list("aaa")
    assert found("abcabc", 7) == list("abcabca")
    assert found("abab", 0) == []


def brute_force(text, num_tokens):
    """The same, told in another way: try every place, from the end of the text."""
    for length in range(LONGEST, 0, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[len(text) - length :]:
                whole = list(text)
                for place in range(start + length, start + length + num_tokens):
                    whole.append(whole[place])
                return whole[len(text) :]
    return []


def test_an_index_that_grows_with_the_text_finds_what_a_search_finds():
    generator, hits = torch.Generator().manual_seed(0), 0
    for vocab_size in (2, 5, 30):
        text, index = torch.randint(vocab_size, (60,), generator=generator).tolist(), Index()
        size = 1
        while size < len(text):
            expected = brute_force(text[:size], 5)
            assert index.continuation(text[:size], 5) == expected
            hits += bool(expected)
            size += int(torch.randint(1, 6, (), generator=generator))
    assert hits > 20


def test_rows_draft_by_themselves():
    drafter, texts = LookupDrafter(9), [[1, 2, 3, 1], [4, 5, 6], [7, 7]]
    drafter.start(texts, num_slots=20, num_draft_tokens=4)
    draft = drafter.draft(texts, 3, GREEDY, None)
    assert draft.counts == [3, 0, 3] and draft.probs is None
    assert draft.tokens[0].tolist() == [2, 3, 1] and draft.tokens[2].tolist() == [7, 7, 7]

    texts = [[1, 2, 3, 1, 3], [4, 5, 6, 5], [7, 7, 8]]
    draft = drafter.draft(texts, 2, Sampling(), None)
    assert draft.counts == [2, 2, 0] and draft.tokens[0].tolist() == [1, 3]
    assert draft.probs.shape == (3, 2, 9) and draft.probs.sum() == 6
    assert draft.probs.gather(-1, draft.tokens[:, :, None]).min() == 1

    drafter.start([[1, 1]], num_slots=20, num_draft_tokens=4)
    assert drafter.draft([[2, 5, 3]], 2, GREEDY, None).counts == [0], "another text's index was kept"
