"""Repeats the experiments of the OTPrune paper: computes them in pieces, concludes from the pieces, writes a page."""
