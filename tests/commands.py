"""Runs an entry point of hydra's in the test's process: importing everything anew takes ten times as long."""

import io
import logging
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest


def call(main, *arguments):
    """Returns exit status, output and errors of `main` with these arguments."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["command", *arguments])
        # Hydra's logging setup closes all handlers known to `logging`; absl's, which rouge-score brings, then closes
        # the stderr of whoever imported it first: here pytest's own, and no later test could run.
        patch.setattr(logging, "_handlerList", [])
        try:
            main()
        except SystemExit as error:
            code = error.code or 0
        finally:
            root.handlers, root.level = handlers, level  # hydra sets its own
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())
