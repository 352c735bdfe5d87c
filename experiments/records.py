"""The records that a report is made of: those of finished runs in one or more folders, or the committed ones."""

import json
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from experiments.cli import command_of
from experiments.paths import path_settings
from experiments.places import home
from experiments.recording import HISTORY_FILE
from gradpruner.files import content_hash
from gradpruner.record import RunRecord

RUNS = "results/runs"
RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Found:
    """The records of a report.

    Attributes:
        where: the folders that they are in, for messages.
        records: finished ones, by file.
        problems: one line per record that cannot be shown, and one that says where the records are from.
        label: what to say beside every table; empty for runs of the user.
    """

    where: str
    records: dict[Path, RunRecord]
    problems: list[str]
    label: str = ""


def find_records(cfg: DictConfig, committed: str) -> Found:
    """Returns the records in `runs_dir`; if that is not given, those of finished runs, or else the committed ones.

    Args:
        cfg: the config.
        committed: folder of the committed records that take the place of missing runs, in `results/records`.

    Raises:
        ValueError: if there is none, or if one of several folders has none.
    """
    folders = [Path(home(RUNS))] if cfg.runs_dir is None else path_settings(cfg, "runs_dir")
    where = ", ".join(str(folder.absolute()) for folder in folders)
    try:
        return Found(where, *read_records(*folders))
    except ValueError as error:
        folder = RESULTS / "records" / committed
        if cfg.runs_dir is not None or not folder.is_dir():
            raise
        records, problems = read_records(folder)
        said = f"{error}\nShown instead: the {len(records)} committed records in {folder}."
        label = f"Of the committed records in {folder.relative_to(RESULTS.parent)}, not of runs in {home(RUNS)}"
        return Found(str(folder), records, [said, *problems], label)


def read_records(*folders: Path) -> tuple[dict[Path, RunRecord], list[str]]:
    """Reads all records below these folders, one of which may lie in another.

    Returns:
        The finished records by file, and one line per record that failed or cannot be read.

    Raises:
        ValueError: if one of the folders has no finished record.
    """
    records: dict[Path, RunRecord] = {}
    problems: dict[str, None] = {}
    seen: dict[str, Path] = {}  # a copy of a run would count as another seed
    for folder in folders:
        finished, others = _records_below(folder)
        problems.update(dict.fromkeys(others))
        for path, record in finished.items():
            first = seen.setdefault(content_hash(record.to_dict()), path)
            if first == path:
                records[path] = record
            elif first.resolve() != path.resolve():
                problems[f"Not shown: {path} is a copy of {first}. Delete one of them."] = None
    return records, list(problems)


def _records_below(folder: Path) -> tuple[dict[Path, RunRecord], list[str]]:
    """Returns the finished records of a folder by file, and one line per other record.

    Raises:
        ValueError: if there is no finished one.
    """
    finished, others = {}, []
    for path in sorted(folder.rglob("*.json")):
        try:
            if path.is_dir() or path.name == HISTORY_FILE:
                continue
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or "schema_version" not in data:
                continue  # another JSON file, such as a plan
            record = RunRecord.from_dict(data, path)
        except (OSError, ValueError, RecursionError) as error:
            others.append(f"Not shown: {path}: {error}")
            continue
        if record.status == "finished":
            finished[path] = record
        else:
            others.append(f"Not shown: {path} has status {record.status} ({record.error}). Run it again.")
    if not finished:
        raise ValueError(
            f"There is no finished run to report, searched {folder.absolute()} for record.json and other records. Run "
            f"something first, for example `{' '.join(command_of('experiments.run'))} experiment=quickstart`, or set "
            "runs_dir." + "".join(f"\n{problem}" for problem in others)
        )
    return finished, others
