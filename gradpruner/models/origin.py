"""Where a model comes from: its id on the Hub and its licence, for the card of what is made from it."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from yaml import YAMLError  # type: ignore[import-untyped]

from gradpruner.messages import one_line
from gradpruner.models.hub import use_cache_without_hub

logger = logging.getLogger(__name__)

CARD = "README.md"
PLAN = "plan.json"  # only checkpoints of this project have one
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Origin:
    """Origin of a model; None where it is not known.

    Attributes:
        hub_id: id on the Hub of the model, or of the one that it was made from.
        license: its licence as the Hub names it, `apache-2.0`; `other` if `license_name` names it.
        license_name: name of a licence that the Hub has no name for.
        license_link: address of such a licence.
    """

    hub_id: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


# Packaged models have no card.
PACKAGED = {"packaged:smollm2-135m": Origin("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}


def find_origin(path: str, revision: str | None = None) -> Origin:
    """Returns the origin of a model as its own card gives it.

    Args:
        path: Hub id, folder, or a packaged or random model, as in `ModelSpec.path`.
        revision: of a Hub model.
    """
    if path in PACKAGED:
        return PACKAGED[path]
    folder = Path(path)
    if path and folder.is_dir():
        metadata = _read(folder / CARD) if (folder / CARD).is_file() else {}
        base = metadata.get("base_model") if (folder / PLAN).is_file() else None
        return Origin(base if isinstance(base, str) else None, *_license(metadata))
    if not HUB_ID.fullmatch(path):
        return Origin()
    use_cache_without_hub()
    try:
        card = Path(hf_hub_download(path, CARD, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        logger.info("The licence of %s is not known here: %s", path, one_line(error))
        return Origin(path)
    return Origin(path, *_license(_read(card)))


def _read(card: Path) -> dict[str, Any]:
    """Returns the metadata of a card; empty if it has none that can be read."""
    try:
        return metadata_load(card) or {}
    except (ValueError, YAMLError) as error:
        logger.info("The metadata of %s cannot be read: %s", card, one_line(error))
        return {}


def _license(metadata: dict[str, Any]) -> tuple[str | None, ...]:
    values = (metadata.get(key) for key in ("license", "license_name", "license_link"))
    return tuple(value if isinstance(value, str) else None for value in values)
