"""One run of a job on Ray: its checks, cluster, dataflow, faults, progress, tracking and metrics."""
