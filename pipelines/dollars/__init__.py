"""The dollars of a run: prices of nodes, the bill, the stages that used it, and the spend cap."""
