"""Command-line entry points; the only place where hydra and wandb appear."""
