"""Datasets: rows of any source in, prompts and reference completions out. One file and one YAML per dataset."""

from gradpruner.tasks.arc_easy import ArcEasy
from gradpruner.tasks.base import DataError, Example, Task, fingerprint
from gradpruner.tasks.hellaswag import HellaSwag
from gradpruner.tasks.jsonl import JsonLines
from gradpruner.tasks.piqa import Piqa
from gradpruner.tasks.winogrande import Winogrande

__all__ = [
    "ArcEasy",
    "DataError",
    "Example",
    "HellaSwag",
    "JsonLines",
    "Piqa",
    "Task",
    "Winogrande",
    "fingerprint",
]
