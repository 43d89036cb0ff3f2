"""Part 0: what everything else stands on.

The four stages of an assistant in miniature, the reader's machine, gradients by
hand; and the helpers that later parts use: data files, Shakespeare, a short fit.
"""
