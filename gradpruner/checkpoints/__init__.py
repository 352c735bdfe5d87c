"""Saving checkpoints, and pruning saved ones. Imports nothing, because `streaming` must run within 500 MB."""
