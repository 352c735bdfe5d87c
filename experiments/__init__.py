"""Command-line entry points; the only package that imports hydra and wandb."""

from experiments.devices import take_gpu

take_gpu()  # here, because workers of a sweep import this package before torch
