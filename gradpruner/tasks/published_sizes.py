"""Sizes of the published datasets: rows by split, and lengths of rows in tokens, for estimates without the rows."""

from dataclasses import dataclass

# Lengths are with default prompts and settings.
TOKENIZER = "SmolLM2's tokenizer"


@dataclass(frozen=True)
class PublishedSize:
    """Size of a dataset.

    Attributes:
        num_train: training rows; 0 if there is no such split.
        num_test: test rows; 0 if there is no such split.
        num_choices: choices per row; 0 for open answers.
        tokens: mean tokens per row, of up to 300 rows.
        answer_tokens: mean tokens per answer.
        longest: tokens of the longest of these rows.
        longest_answer: tokens of the longest of their answers.
    """

    num_train: int
    num_test: int
    num_choices: int
    tokens: float
    answer_tokens: float
    longest: int
    longest_answer: int


SIZES = {
    "pubmedqa": PublishedSize(500, 500, 0, 392.0, 50.6, 925, 131),
    "medmcqa": PublishedSize(182_822, 4_183, 4, 63.3, 6.3, 198, 23),
    "billsum": PublishedSize(18_949, 3_269, 0, 1779.8, 212.2, 2048, 833),
    "fingpt": PublishedSize(69_095, 7_677, 3, 59.3, 2.0, 113, 2),  # a tenth is held out, by a hash of the text
    "hellaswag": PublishedSize(39_905, 10_042, 4, 211.9, 30.2, 367, 71),
    "winogrande": PublishedSize(40_398, 1_267, 2, 49.6, 2.3, 71, 7),
    "arc_easy": PublishedSize(2_251, 2_376, 4, 61.9, 5.3, 162, 25),
    "piqa": PublishedSize(16_113, 1_838, 2, 92.6, 24.9, 788, 258),
    "mmlu_clinical_knowledge": PublishedSize(0, 265, 4, 73.5, 10.0, 173, 33),
    "alpaca": PublishedSize(52_002, 0, 0, 118.4, 67.0, 464, 416),
}
