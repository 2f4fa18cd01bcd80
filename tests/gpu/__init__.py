"""What only a GPU can tell; `python -m tests.gpu --help` says more."""
