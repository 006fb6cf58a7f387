"""One run of a job on Ray: check, connect, flow, faults, progress, tracking, numbers."""
