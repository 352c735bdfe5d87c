"""BERTScore F1 of generated answers (Zhang et al., arXiv:1904.09675), from the library bert-score.

An `evaluate` metric, loaded from this file with the encoder as arguments. No IDF weights and no rescaling, as the paper
names neither. An empty answer scores 0, where the library would fail; text is cut after the encoder's 512 tokens.
"""

import logging
from typing import Any

import datasets
import evaluate
from bert_score import BERTScorer

logger = logging.getLogger("gradpruner.evaluate.bertscore_f1")  # `evaluate` loads a copy under another name

MAX_TOKENS = 512  # positions of BERT, RoBERTa and MiniLM
PAIRS_AT_ONCE = 64  # the library keeps the embeddings of all texts of a call


class BertScoreF1(evaluate.Metric):
    """Mean BERTScore F1."""

    def __init__(self, encoder: str, num_layers: int, device: str = "cpu", **kwargs: Any) -> None:
        """Loads nothing yet.

        Args:
            encoder: folder of the encoder, or its Hub id.
            num_layers: the layer whose output is compared, counted from 1.
            device: torch device to run on.
            kwargs: arguments of `evaluate.Metric`.
        """
        super().__init__(**kwargs)
        self._encoder, self._num_layers, self._device = encoder, num_layers, device

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 of the greedily matched contextual embeddings of tokens, averaged over the pairs.",
            citation="Zhang et al., BERTScore: Evaluating text generation with BERT, 2020.",
            inputs_description="predictions and references: lists of strings, of equal length.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        """Returns `bertscore_f1`, and `bertscore_f1_rows`, one score per pair."""
        scorer = BERTScorer(model_type=self._encoder, num_layers=self._num_layers, device=self._device)
        tokenizer = scorer._tokenizer
        # Some tokenizers have no maximum, and the number that stands for none overflows.
        tokenizer.model_max_length = min(MAX_TOKENS, tokenizer.model_max_length)
        pairs = list(zip(predictions, references, strict=True))
        filled = [index for index, pair in enumerate(pairs) if all(text.strip() for text in pair)]
        rows = [0.0] * len(pairs)
        for start in range(0, len(filled), PAIRS_AT_ONCE):
            chunk = filled[start : start + PAIRS_AT_ONCE]
            # One text per batch: the library orders texts by a hash that differs between processes, and with padding
            # that order would change the last digits.
            _, _, f1 = scorer.score([pairs[i][0] for i in chunk], [pairs[i][1] for i in chunk], batch_size=1)
            for index, value in zip(chunk, f1.tolist(), strict=True):
                rows[index] = value
        if len(filled) < len(pairs):
            logger.warning("%d of %d answers are empty and score 0", len(pairs) - len(filled), len(pairs))
        long = sum(len(text) > MAX_TOKENS and self._is_long(tokenizer, text) for pair in pairs for text in pair)
        if long:
            logger.warning("%d texts are over the encoder's %d tokens and were cut for BERTScore", long, MAX_TOKENS)
        return {"bertscore_f1": sum(rows) / len(rows), "bertscore_f1_rows": rows}

    @staticmethod
    def _is_long(tokenizer: Any, text: str) -> bool:
        return len(tokenizer(text, truncation=False, verbose=False).input_ids) > MAX_TOKENS
