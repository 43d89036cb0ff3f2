"""Part 4: longer, larger and restartable runs, and the laws of their loss."""
