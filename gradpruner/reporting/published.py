"""The paper's published values, from `results/paper/`: one YAML file per table or figure.

A file has a `title`, `notes`, the `axis` of its `columns`, and `blocks` of rows. Block and row together give the
coordinates of a row, under the names of our own settings; the column adds the coordinate of a single value. Methods are
always rows, even where the paper prints them as columns. A figure whose values are not in the text has rows without
values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

Coordinate = str | int | float
KEYS = {"title", "notes", "axis", "columns", "blocks"}


@dataclass(frozen=True)
class PublishedRow:
    """One row of a table or figure.

    Attributes:
        shared: coordinates of all rows of its block, such as `model`, `finetune`, `sparsity`.
        own: coordinates of this row alone: `method`, named as in `conf/method/`, and settings such as `merge_count`.
        values: one value per column, with the printed digits; empty if none are published.
        average: the printed average, or None.
    """

    shared: Mapping[str, Coordinate]
    own: Mapping[str, Coordinate]
    values: tuple[Decimal, ...]
    average: Decimal | None

    @property
    def coordinates(self) -> dict[str, Coordinate]:
        """All coordinates of the row."""
        return {**self.shared, **self.own}


@dataclass(frozen=True)
class Published:
    """One table or figure.

    Attributes:
        label: name in the paper: `Table 1`.
        title: what it shows.
        axis: what the columns vary: `dataset`, a setting, or `quantity` for the efficiency tables.
        columns: values on the axis: datasets, named as in `conf/dataset/`, numbers, or quantities.
        rows: the rows in the paper's order.
        notes: sentences, including what does not add up in the paper.
        elsewhere: models that the paper has in other tables or figures, but not in this one.
    """

    label: str
    title: str
    axis: str
    columns: tuple[Coordinate, ...]
    rows: tuple[PublishedRow, ...]
    notes: tuple[str, ...]
    elsewhere: frozenset[str] = frozenset()

    @property
    def models(self) -> frozenset[str]:
        """Models of the rows."""
        return frozenset(str(row.coordinates["model"]) for row in self.rows if "model" in row.coordinates)

    def select(self, **coordinates: Coordinate) -> list[PublishedRow]:
        """Returns the rows that have these coordinates."""
        return [
            row for row in self.rows if all(row.coordinates.get(key) == value for key, value in coordinates.items())
        ]


def load_published(folder: Path, name: str) -> Published:
    """Reads a file of published values.

    Args:
        folder: folder of the files.
        name: name of the file without its suffix: `table1`, `figure6`.

    Raises:
        ValueError: if there is no such file, or its format is wrong.
    """
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in folder.glob("*.yaml"))) or "none"
        raise ValueError(f"There are no published values {name!r} in {folder}, only: {known}. Name one of those.")
    data = _read(path)
    if not isinstance(data, dict) or "title" not in data or not data.keys() <= KEYS:
        keys = sorted(data) if isinstance(data, dict) else data
        raise ValueError(
            f"{path} must have a title and may have {', '.join(sorted(KEYS - {'title'}))}, got {keys}. Correct it."
        )
    columns = tuple(_plain(column) for column in data.get("columns", []))
    models = {str(block.get("model")) for block in data.get("blocks", [])}
    everywhere = {model for other in folder.glob("*.yaml") for model in _models(other)}
    return Published(
        label=f"{name.rstrip('0123456789').capitalize()} {name.lstrip('abcdefghijklmnopqrstuvwxyz')}",
        title=data["title"],
        axis=data.get("axis", ""),
        columns=columns,
        rows=tuple(
            _row(row, block, len(columns), path) for block in data.get("blocks", []) for row in block.get("rows", [])
        ),
        notes=tuple(data.get("notes", [])),
        # A table that names no model is about any.
        elsewhere=frozenset() if models == {"None"} else frozenset(everywhere - models),
    )


@cache
def _read(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader=_Loader)


def _models(path: Path) -> list[str]:
    """Returns the models of a file, or none for a file that is not in the format."""
    data = _read(path)
    blocks = data.get("blocks", []) if isinstance(data, dict) else []
    return [str(block["model"]) for block in blocks if "model" in block]


class _Loader(yaml.SafeLoader):
    """Loader that reads numbers with a point as decimals, so that 0.860 keeps its digits and averages are exact."""


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> Decimal:
    return Decimal(str(loader.construct_scalar(node)))


_Loader.add_constructor("tag:yaml.org,2002:float", _decimal)


def _row(row: Mapping[str, Any], block: Mapping[str, Any], num_columns: int, path: Path) -> PublishedRow:
    values = row.get("values", [])
    if "method" not in row:
        raise ValueError(f"Every row of {path} must have a method, got {dict(row)}. Add it.")
    if len(values) not in (0, num_columns) or not all(isinstance(value, Decimal) for value in values):
        raise ValueError(
            f"A row of {path} must have one number with a point for each of {num_columns} columns, or none, got "
            f"{[str(value) for value in values]} for {row['method']}. Correct the row."
        )
    return PublishedRow(
        shared={key: _plain(value) for key, value in block.items() if key != "rows"},
        own={key: _plain(value) for key, value in row.items() if key not in ("values", "average")},
        values=tuple(values),
        average=row.get("average"),
    )


def _plain(value: Any) -> Coordinate:
    """Returns decimals as floats, because coordinates are compared with settings."""
    coordinate: Coordinate = float(value) if isinstance(value, Decimal) else value
    return coordinate
