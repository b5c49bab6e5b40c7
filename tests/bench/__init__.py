"""The speed of the baked service, beside code without its comforts: `make bench`, or `python -m tests.bench --help`."""
