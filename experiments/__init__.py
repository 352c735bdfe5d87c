"""Command-line entry points; the only package that imports hydra and wandb."""
