"""Time and memory of this code against references measured in the same run: `make bench`."""
