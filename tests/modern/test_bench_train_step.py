"""The benchmark of a step: what it counts, on a model of hand-made sizes."""

import subprocess
import sys

from groundup.modern import bench_train_step
from groundup.modern.decoder import Decoder, DecoderConfig


def test_flops_of_a_step_by_hand(monkeypatch):
    """One block, C = 4, F = 16, V = 8: 3·16 + 16 + 3·64 in the block, 32 in the head.

    288 entries cost 6 FLOPs a token each; scores 6·1·T·C. With T = 5 and B = 2 there
    are 10 tokens: 10 · (6 · 288 + 6 · 5 · 4) = 18,480.
    """
    for name, value in {"LAYERS": 1, "WIDTH": 4, "CONTEXT": 5, "BATCH": 2}.items():
        monkeypatch.setattr(bench_train_step, name, value)
    sizes = DecoderConfig(n_vocab=8, d_model=4, n_layers=1, n_heads=2, d_ff=16)
    assert bench_train_step.step_flops(Decoder(sizes)) == 18_480


# The graphs go to a backend that runs them as they are and notes what they call.
COMPILE = """
import torch
from groundup.modern.bench_train_step import compiled
from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.training.gpt import GPT, GPTConfig

def backend(graph, _):
    calls.extend(str(node.target) for node in graph.graph.nodes)
    return graph.forward

sizes = {"n_vocab": 8, "d_model": 8, "n_layers": 1, "n_heads": 2}
ids = torch.arange(5)[None]
for model in (GPT(GPTConfig(context=5, **sizes)), Decoder(DecoderConfig(**sizes))):
    calls, expected = [], model(ids)
    torch.testing.assert_close(compiled(model, backend)(ids), expected)
    assert any("linear" in call for call in calls), calls
    assert not any("cos" in call for call in calls), calls
"""


def test_the_compiled_model_is_the_model_and_computes_no_angle():
    """In a process of its own: the compiler cannot read what checks shapes in tests."""
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
