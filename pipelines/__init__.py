"""The captioning dataflow on Ray Data: one file per stage."""
