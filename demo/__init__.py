"""The demo: a small LLaVA that was really trained, the synthetic world it knows, and a corpus to caption."""
