"""What a sample is asked before a corpus is paid for: the estimate, the gate, the canary."""
