"""Push a saved checkpoint to the Hugging Face Hub, into a private repository.

    python -m experiments.push_checkpoint RUN_FOLDER/checkpoint ORG/NAME

The repository is made if it does not exist. The examples in its card load the model from there.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.cli import argument_parser
from gradpruner.checkpoints.push import push_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argument_parser("experiments.push_checkpoint", __doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of the checkpoint")
    parser.add_argument("repository", metavar="ORG/NAME", help="repository on the Hub")
    options = parser.parse_args(arguments)
    try:
        print(push_checkpoint(options.folder, options.repository))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
