"""Time and memory of GradPruner's own ideas against a reference measured in the same run: `make bench`."""
