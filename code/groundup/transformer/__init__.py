"""Part 1: the Transformer block, one idea a module.

Positions, attention in NumPy, one causal head, many heads, the feed-forward layer,
residuals with normalisation, and the block that puts them together.
"""
