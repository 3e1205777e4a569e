"""Linear layer over a 4-bit weight."""
