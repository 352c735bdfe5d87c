"""What must be said beside numbers: of a method, by its name, and of an accuracy that shows nothing.

Tables say the former of older records, too, so it is not read from these.
"""

from collections.abc import Mapping
from typing import Any

_SAT = (
    "SAT: no code of its authors exists, so schedule and formulas are ours. With a dense tail it ends level with "
    "dense here, in the paper 3 to 5 points below; sat_constant, without one, is the other end of the range"
)
CAVEATS = {"sat": _SAT, "sat_constant": _SAT}


def weak_accuracy(result: Mapping[str, Any], reference: Mapping[str, Any] | None, method: str) -> str | None:
    """Returns a warning if an accuracy is not above that of always giving the most frequent label, else None.

    Above means by more than one standard error.

    Args:
        result: metrics of the run.
        reference: metrics of the dense model after the same fine-tune, if it was run.
        method: name of the run's method.
    """
    if not _is_weak(result):
        return None
    what = (
        f"Accuracy {result['accuracy']:.3f} ±{result['accuracy_stderr']:.3f} is not above that of always giving the "
        f"most frequent label, {result['majority_accuracy']:.3f}."
    )
    if reference is not None and _is_weak(reference):
        return (
            f"{what} Nor is that of the dense model after the same fine-tune: look at the rows (`gradpruner preview`), "
            "at dataset.prompt and dataset.answer_as, and train for more steps (finetune.epochs)."
        )
    other = "" if method == "gradpruner_plus" else ", use method=gradpruner_plus"
    return f"{what} Train for more steps (finetune.epochs){other} or prune less (sparsity)."


def _is_weak(metrics: Mapping[str, Any]) -> bool:
    known = {"accuracy", "accuracy_stderr", "majority_accuracy"} <= set(metrics)
    return known and metrics["accuracy"] - metrics["accuracy_stderr"] <= metrics["majority_accuracy"]
