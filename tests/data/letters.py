"""A reward for the tests: the share of a text's letters that are an e."""


def reward(text, row, is_whole):
    return text.count("e") / max(1, len(text))
