"""Part 3: the modern decoder, one change at a time, down to real weights."""
