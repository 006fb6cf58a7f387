"""What lies at input.path: its files, its rows, and the bytes that addresses name."""
