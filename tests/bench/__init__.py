"""How fast the baked service is, against code without its comforts: `make bench`, or `python -m tests.bench --help`."""
