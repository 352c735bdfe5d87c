"""Check that a saved checkpoint is whole, and that plain transformers says what the model said when it was saved.

    python -m experiments.verify results/runs/.../checkpoint

`verify_files.py` looks at the files, `verify_fresh.py` loads the model, in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments import verify_fresh
from experiments.cli import argument_parser
from experiments.verify_fresh import ADAPTER_FOLDER, Check


class CheckpointError(ValueError):
    """Error for a folder without a checkpoint."""


def main() -> None:
    """Prints the table; exits with 1 if a check failed."""
    parser = argument_parser("experiments.verify", __doc__)
    parser.add_argument("checkpoint", type=Path, help="folder with config.json, *.safetensors and plan.json")
    folder = parser.parse_args().checkpoint
    try:
        checks = verify(folder)
    except CheckpointError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    _show(checks, folder)
    raise SystemExit(1 if any(check.ok is False for check in checks) else 0)


def verify(folder: Path) -> list[Check]:
    """Checks the files in this process and the model in a fresh one.

    Raises:
        CheckpointError: if `folder` holds no checkpoint.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"No folder {folder.absolute()}. Give the checkpoint folder of a run or of save_checkpoint."
        )
    if not (folder / "config.json").is_file():
        near = [near for near in (folder / "checkpoint", folder.parent) if (near / "config.json").is_file()]
        hint = f"Did you mean {near[0]}?" if near else "Give a folder written by save_checkpoint."
        raise CheckpointError(f"No checkpoint in {folder.absolute()}: it has no config.json. {hint}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{(folder / 'config.json').absolute()} is damaged: {error}. Save it again.") from error
    # Imported here: it takes seconds, which the errors above need not wait for.
    from experiments.verify_files import checks_of_files, read_probe

    checks = list(checks_of_files(folder, config))
    probe, check = read_probe(folder)
    checks.append(check)
    adapter_probe = None
    if (folder / ADAPTER_FOLDER).is_dir():
        adapter_probe, check = read_probe(folder / ADAPTER_FOLDER, "adapter probe")
        checks.append(check)
    return checks + _in_fresh_process(folder, probe, adapter_probe)


def _in_fresh_process(folder: Path, probe: dict[str, Any] | None, adapter_probe: dict[str, Any] | None) -> list[Check]:
    """Runs `verify_fresh.py` in a fresh process."""
    from gradpruner.checkpoints.probe import NUM_NEW_TOKENS, TEXT

    request = {
        "folder": str(folder.absolute()),
        "probe": probe,
        "text": TEXT,
        "num_new_tokens": NUM_NEW_TOKENS,
        "adapter_probe": adapter_probe,
    }
    done = subprocess.run(
        fresh_command(),
        input=json.dumps(request),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=folder,  # no package of this project can be imported from here
        check=False,
    )
    try:
        return [Check(**check) for check in json.loads(done.stdout)]
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [Check("fresh process", False, f"ended with code {done.returncode}: {last}")]


def fresh_command() -> list[str]:
    """Returns the command of the fresh process: a JSON request on its stdin, a JSON list of checks on its stdout."""
    return [sys.executable, "-I", "-X", "utf8", str(Path(verify_fresh.__file__).resolve())]


def _show(checks: list[Check], folder: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(str(folder)))
    table.add_column("check", no_wrap=True)
    table.add_column("ok", no_wrap=True)
    table.add_column("details", overflow="fold")
    marks = {True: "[green]yes[/]", False: "[bold red]NO[/]", None: "-"}
    for check in checks:
        table.add_row(check.name, marks[check.ok], escape(check.details))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a pipe has no width, and its columns must not be cut
    console.print(table)
    failed = [check.name for check in checks if check.ok is False]
    console.print(f"[bold red]Failed:[/] {', '.join(failed)}" if failed else "[green]The checkpoint is good.[/]")


if __name__ == "__main__":
    main()
