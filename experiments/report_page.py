"""What the HTML report shows besides the tables and figures that were asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.rerun_command import rerun_command
from gradpruner.record import RunRecord
from gradpruner.reporting.headline import headline
from gradpruner.reporting.headline_plot import draw_panels
from gradpruner.reporting.page import Runs
from gradpruner.reporting.published import load_published

NAMES = (*(f"table{number}" for number in range(1, 14)), *(f"figure{number}" for number in (1, 2, 5, 6, 7, 8, 9)))


def runs_of_page(
    records: Sequence[RunRecord],
    losses: Mapping[str, Sequence[Mapping[str, float]]],
    paper: Path,
    folder: Path,
    label: str = "",
    problems: Sequence[str] = (),
) -> Runs:
    """Returns what the page shows of these runs, with the headline chart drawn into `folder`.

    Args:
        records: finished records; those of timings alone have no fold, but place models in the chart.
        losses: history of each run's fine-tune, by identity.
        paper: folder of the paper's values.
        folder: folder for pictures.
        label: where the records are from, if they are not the reader's own.
        problems: one line per record that is not shown.
    """
    published = [load_published(paper, name) for name in NAMES]
    chart = headline(records, published)
    return Runs(
        records=[record for record in records if record.finetune],
        label=label,
        problems=problems,
        commands={id(record): rerun_command(record) for record in records if record.finetune},
        losses=losses,
        chart=chart,
        panels=draw_panels(chart, folder) if chart else (),
        published=published,
    )
