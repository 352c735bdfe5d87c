"""What is saved, and pruning of saved checkpoints. Imports nothing: `streaming` must start in 500 MB."""
