"""The colours of the diagrams by role, the same in picture and page: calm, few, a light and a dark set."""

# role -> (fill, line) on a light ground, (fill, line) on a dark one. Neighbours in meaning share a hue.
ROSE = ("#fae4e6", "#c4707b"), ("#43272d", "#d98c96")
YELLOW = ("#faf2cf", "#b39a34"), ("#3b3519", "#cfb95c")
ORANGE = ("#fde7d2", "#cc8440"), ("#432e1b", "#dd9c5d")
BLUE = ("#ddebf8", "#5289bd"), ("#1d3247", "#76a9da")
LAVENDER = ("#e9e6f7", "#8279c0"), ("#2d2a46", "#a49ce0")
GREEN = ("#e0f1e3", "#599a6b"), ("#1e3827", "#7fbd90")
TEAL = ("#daf0ef", "#41928f"), ("#173736", "#66b5b1")
GREY = ("#f1f2f4", "#8a929c"), ("#272b31", "#8d96a1")
PAPER = ("#ffffff", "#5b6470"), ("#1b1f24", "#aab3be")

COLOURS = {
    "embedding": ROSE,
    "head": ROSE,
    "position": TEAL,
    "norm": YELLOW,
    "attention": ORANGE,
    "feed_forward": BLUE,
    "linear": LAVENDER,
    "activation": GREEN,
    "add": PAPER,
    "multiply": PAPER,
    "cache": TEAL,
    "mask": GREY,
    "group": GREY,
    "operation": GREY,
}

# What is not a box: (light, dark).
GROUND = "#ffffff", "#14171b"
TEXT = "#1f2429", "#e6e9ed"
MUTED = "#5c6570", "#98a2ae"
SPINE = "#3b4450", "#c3cbd5"  # the residual stream
