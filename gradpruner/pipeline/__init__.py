"""One run: `setup` before a weight is loaded, the `stages`, and `run`, their order. Imports nothing itself."""
