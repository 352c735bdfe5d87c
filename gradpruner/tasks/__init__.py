"""Datasets: rows of any source in, prompts and reference completions out. One file and one YAML per dataset."""

from gradpruner.tasks.alpaca import Alpaca
from gradpruner.tasks.arc_easy import ArcEasy
from gradpruner.tasks.base import ChatExample, DataError, Example, Task, fingerprint
from gradpruner.tasks.billsum import BillSum
from gradpruner.tasks.fingpt import FinGpt
from gradpruner.tasks.hellaswag import HellaSwag
from gradpruner.tasks.jsonl import JsonLines
from gradpruner.tasks.medmcqa import MedMcqa
from gradpruner.tasks.mmlu_clinical_knowledge import MmluClinicalKnowledge
from gradpruner.tasks.piqa import Piqa
from gradpruner.tasks.pubmedqa import PubMedQa
from gradpruner.tasks.winogrande import Winogrande

__all__ = [
    "Alpaca",
    "ArcEasy",
    "BillSum",
    "ChatExample",
    "DataError",
    "Example",
    "FinGpt",
    "HellaSwag",
    "JsonLines",
    "MedMcqa",
    "MmluClinicalKnowledge",
    "Piqa",
    "PubMedQa",
    "Task",
    "Winogrande",
    "fingerprint",
]
