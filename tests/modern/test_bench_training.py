"""The benchmarks of training: what they count, on models of hand-made sizes."""

import pytest

from groundup.modern import bench_training
from groundup.modern.decoder import Decoder, DecoderConfig


def test_flops_of_a_step_by_hand(monkeypatch):
    """One block, C = 4, F = 16, V = 8: 3·16 + 16 + 3·64 in the block, 32 in the head.

    288 entries cost 6 FLOPs a token each; scores 6·1·T·C. With T = 5 and B = 2 there
    are 10 tokens: 10 · (6 · 288 + 6 · 5 · 4) = 18,480.
    """
    for name, value in {"LAYERS": 1, "WIDTH": 4, "CONTEXT": 5, "BATCH": 2}.items():
        monkeypatch.setattr(bench_training, name, value)
    sizes = DecoderConfig(n_vocab=8, d_model=4, n_layers=1, n_heads=2, d_ff=16)
    assert bench_training.step_flops(Decoder(sizes)) == 18_480


def test_spread_is_mean_and_range_in_bits():
    """ln 2 nats are one bit."""
    bit = 0.6931471805599453
    assert bench_training._spread([bit, 2 * bit, 3 * bit]) == "2.000 (1.000 to 3.000)"


def test_both_models_of_the_loss_benchmark_are_near_in_size():
    gpt, decoder = (
        sum(p.numel() for p in bench_training._loss_model(name).parameters())
        for name in ("GPT", "Decoder")
    )
    assert decoder == pytest.approx(gpt, rel=0.05)
