"""The canonical graph: nodes, programs, signatures, what each value depends on."""
