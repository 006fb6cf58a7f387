"""The paper's own experiments, run again: what each computes, in pieces; what follows from the pieces; the page."""
