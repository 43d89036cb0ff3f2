"""The benchmark of a step: what it counts, on a model of hand-made sizes."""

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
