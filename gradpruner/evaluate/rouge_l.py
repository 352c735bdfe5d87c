"""ROUGE-L of generated answers: F1 of the longest common subsequence of words (Lin, 2004), from rouge-score.

An `evaluate` metric, loaded from this file: `evaluate.load("rouge")` would need the Hub. Like that metric, this one
stems words only if asked to; the paper's public evaluation does. rouge-score's own words are runs of the letters a to z
and digits, so text in another script would score 0; `UnicodeTokenizer` finds the same words in ASCII text, and words of
all scripts.
"""

import unicodedata
from typing import Any

import datasets
import evaluate
import regex  # has no types
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

TOKENIZER = "unicode-1"  # name in records; a change of the rules below needs another
# Letters of scripts that put no spaces between words: Chinese, Japanese, and those of South East Asia (Thai, Lao, ...),
# which Unicode gives the line break class SA.
_UNSPACED = r"[[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}\p{LB=SA}]&&[\p{L}\p{Nl}]]"
_WORD = regex.compile(rf"{_UNSPACED}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--{_UNSPACED}]+", regex.V1)


class UnicodeTokenizer(Tokenizer):
    """Tokenizer of any script: words are runs of letters, their marks and digits.

    Where a script puts no spaces between words, every letter with its marks is a word, as in the usual ROUGE of Chinese
    text. Text is compared in Unicode's compatibility form (NFKC), case-folded. ASCII text gets exactly the words of
    rouge-score. Stemming is the Porter stemmer for English that rouge-score applies to words of more than three
    characters; words with other characters than a to z and digits are kept whole.
    """

    def __init__(self, stemming: bool = False) -> None:
        """Makes a tokenizer; `stemming` cuts words to their stems."""
        self._stemmer = DefaultTokenizer(use_stemmer=True) if stemming else None

    def tokenize(self, text: str) -> list[str]:
        """Returns the words of the text, in order."""
        words: list[str] = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
        if self._stemmer is None:
            return words
        return [stem for word in words for stem in (self._stemmer.tokenize(word) if word.isascii() else [word])]


class RougeL(evaluate.Metric):
    """Mean ROUGE-L F1."""

    def __init__(self, stemming: bool = False, **kwargs: Any) -> None:
        """Keeps the arguments.

        Args:
            stemming: compare the stems of words.
            kwargs: arguments of `evaluate.Metric`.
        """
        super().__init__(**kwargs)
        self._stemming = stemming

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 of the longest common subsequence of words, averaged over the pairs.",
            citation="Lin, ROUGE: A package for automatic evaluation of summaries, 2004.",
            inputs_description="predictions and references: lists of strings, of equal length.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        """Returns `rouge_l` in [0, 1], `rouge_l_rows`, one score per pair, `rouge_tokenizer` and `rouge_stemming`."""
        scorer = RougeScorer(["rougeL"], tokenizer=UnicodeTokenizer(self._stemming))
        rows = [
            float(scorer.score(reference, prediction)["rougeL"].fmeasure)
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        how = {"rouge_tokenizer": TOKENIZER, "rouge_stemming": self._stemming}
        return {"rouge_l": sum(rows) / len(rows), "rouge_l_rows": rows, **how}
