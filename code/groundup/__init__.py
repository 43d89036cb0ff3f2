"""The tested code behind *LLMs from the Ground Up*.

One subpackage a part, one module a page. Each part imports only from the parts
before it:

* `foundations` (Part 0): the machine, gradients, data files.
* `transformer` (Part 1): from positions to a stacked Transformer block.

Beside the parts: `plotting` draws the figures, `pages` reads and runs the pages,
`bench` holds the benchmarks, and `cli` is the `groundup` command.
"""
