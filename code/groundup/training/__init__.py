"""Part 2: from a long text to a trained small language model that writes."""
