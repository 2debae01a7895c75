"""What tests and benchmarks share: the edge cases, the tolerances with their reasons, the timer."""
