"""Write a commented my.yaml and two small data files, to start from.

    gradpruner init my-project
    cd my-project
    gradpruner run --config my.yaml

The data are made up: messages to a shop, each with one of four topics. No pattern of a training message is that of a
test message.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.cli import argument_parser, command_of
from gradpruner.files import user_path, write_text

STARTER = Path(__file__).resolve().parent / "starter"
CONFIG = "my.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argument_parser("experiments.init", __doc__)
    parser.add_argument("folder", metavar="FOLDER", nargs="?", default=".", help="folder to write to (default: here)")
    given = parser.parse_args(arguments).folder
    try:
        files = write_starter(user_path(given))
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print("Written: " + ", ".join(map(str, files)))
    enter = "" if given == "." else f"cd {shlex.quote(given)} && "
    for what, module in (("See the rows", "experiments.preview"), ("Run it", "experiments.run")):
        print(f"{what}: {enter}{' '.join(command_of(module))} --config {CONFIG}")
    return 0


def write_starter(folder: Path) -> list[Path]:
    """Writes the files into a folder, which is made if there is none; returns their paths.

    Raises:
        ValueError: if one of them exists.
    """
    texts = {file.name: file.read_text(encoding="utf-8") for file in sorted(STARTER.iterdir()) if file.is_file()}
    if existing := [name for name in texts if (folder / name).exists()]:
        raise ValueError(
            f"init overwrites nothing, got {folder.absolute()}, which has {', '.join(existing)}. Give another folder: "
            f"{' '.join(command_of('experiments.init'))} FOLDER."
        )
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


if __name__ == "__main__":
    sys.exit(main())
