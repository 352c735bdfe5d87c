"""A tiny model, as settings of `random:llama`, and questions with open answers for it."""

from gradpruner.tasks import Example

CONFIG = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # far from uniform, so that mistakes show
}
EXAMPLES = [
    Example("a", "Question: short?\nAnswer:", " yes", (" yes", " no, never"), 0, " "),
    Example("b", "Question: a much longer one, with five options?\nAnswer:", " c", (" a", " b", " c"), 2, " "),
    Example("c", "Q", " the only long option here", (" x", " the only long option here"), 1, " "),
    Example("d", "Tell me:", " " + "long answer " * 3, (" y", " long"), 1, " "),
    Example("e", "", " from nothing", (" from nothing", " z"), 0, " "),
]
