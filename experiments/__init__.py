"""Command-line entry points; the only place where hydra and wandb appear."""

import logging

# peft imports it wherever it is installed, and it then warns that an optional kernel is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
