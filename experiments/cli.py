"""The command `gradpruner`: its first word picks an entry point, which gets the other arguments.

    gradpruner init my-project
    gradpruner run --config my.yaml

Nothing is imported before the word is known, so that a typo costs no second.
"""

import argparse
import importlib
import os
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from gradpruner.checks import guess

NAME = "gradpruner"
USAGE_ERROR = 2  # exit status, as argparse has it


@dataclass(frozen=True)
class Command:
    """One word behind `gradpruner`.

    Attributes:
        module: its entry point, which `python -m` starts as well.
        summary: what it does, for the help.
    """

    module: str
    summary: str


COMMANDS = {
    "init": Command("experiments.init", "write a commented my.yaml and two small data files, to start from"),
    "doctor": Command("experiments.doctor", "say what this machine has, what is missing, and what that would give"),
    "preview": Command("experiments.preview", "show training rows as the model sees them"),
    "run": Command("experiments.run", "prune, fine-tune and evaluate: one run, or a sweep with -m"),
    "status": Command("experiments.status", "list the cells of a sweep: done, running, failed, missing"),
    "report": Command("experiments.report", "compare finished runs; tables and figures of the paper"),
    "verify": Command("experiments.verify", "check that a saved checkpoint is whole"),
    "prune": Command(
        "experiments.prune_checkpoint", "apply a run's plan to a checkpoint that does not fit into memory"
    ),
    "push": Command("experiments.push_checkpoint", "push a run's checkpoint to the Hugging Face Hub"),
    "demo": Command("experiments.demo", "show the whole way on a tiny random model, in half a minute"),
    "lm-eval-tasks": Command("experiments.lm_eval_tasks", "write a dataset as a task of lm-evaluation-harness"),
}


def main() -> None:
    """Runs the command.

    Raises:
        SystemExit: with 2 if there is no such command, else as its entry point does.
    """
    word, *arguments = sys.argv[1:] or ["--help"]
    if word in ("-h", "--help"):
        print(_help())
        return
    if word in ("-V", "--version"):
        print(version())
        return
    if word not in COMMANDS:
        print(
            f"There is no command {word!r}{guess(word, COMMANDS)}. Known: {', '.join(COMMANDS)}. `{NAME} --help` says "
            "what they do.",
            file=sys.stderr,
        )
        raise SystemExit(USAGE_ERROR)
    sys.argv[1:] = arguments
    add_to_path(Path.cwd())
    status = importlib.import_module(COMMANDS[word].module).main()
    raise SystemExit(status)


def _help() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {word:<{width}}  {command.summary}" for word, command in COMMANDS.items())
    return (
        "Prunes layers that your data do not need, and fine-tunes what is left.\n\n"
        f"Usage: {NAME} COMMAND [ARGUMENTS], {NAME} COMMAND --help, {NAME} --version\n\n{listed}\n\n"
        f"On your own model and data:\n  {NAME} init my-project && cd my-project\n  {NAME} run --config my.yaml"
    )


def version() -> str:
    """Returns name and version of the installed package, on one line."""
    return f"{NAME} {metadata.version(NAME)}"


def command_of(module: str) -> list[str]:
    """Returns how to start an entry point, in the way in which this process was started.

    Args:
        module: the entry point, such as `experiments.run`.
    """
    words = [word for word, command in COMMANDS.items() if command.module == module]
    if Path(sys.argv[0]).stem == NAME and words:
        return [NAME, *words]
    return ["python", "-m", module]


def argument_parser(module: str, docstring: str | None) -> argparse.ArgumentParser:
    """Returns a parser with `--help` out of the docstring of an entry point, and `--version`.

    Args:
        module: the entry point, such as `experiments.verify`.
        docstring: its docstring: paragraphs, of which indented ones are example commands.
    """
    paragraphs = (docstring or "").strip("\n").split("\n\n")
    examples = [paragraph for paragraph in paragraphs if paragraph.startswith("    ")]
    parser = argparse.ArgumentParser(
        prog=" ".join(command_of(module)),
        description="\n\n".join(paragraph.strip() for paragraph in paragraphs if paragraph not in examples),
        epilog="\n".join(["examples:", *examples]) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version())
    return parser


def add_to_path(folder: Path) -> None:
    """Lets Python find a user's own classes in a folder, after everything that is installed.

    The folder comes last, so that a `datasets` folder or an `evaluate.py` in it hides no library.
    """
    if not sys.flags.safe_path and str(folder) not in sys.path:
        sys.path.append(os.path.abspath(folder))


if __name__ == "__main__":
    main()
