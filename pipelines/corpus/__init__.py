"""The corpus at input.path: its files, its rows, and the images that its URIs name."""
