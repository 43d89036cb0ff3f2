"""Two processes that run `two_processes.py` once, for all tests that read of it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from groundup.modern.decoder import Decoder, DecoderConfig
from groundup.scaling.sharded_checkpoint import save_shards

SECONDS = 150  # an idle machine needs 10


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """What the two found, by rank, and the folder that they wrote to."""
    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(5)
    one = Decoder(DecoderConfig(n_vocab=51, d_model=32, n_layers=2, n_heads=2))
    save_shards(folder / "by one", 3, one.state_dict(), {"by": "one"})
    port = str(free_port())
    running = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        script = Path(__file__).with_name("two_processes.py")
        command = [sys.executable, "-W", "error", str(script), str(folder)]
        running.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, text in zip(running, said, strict=True):
        assert process.returncode == 0, text[-4000:]
    results = [json.loads((folder / f"{r}.json").read_text()) for r in range(2)]
    return SimpleNamespace(results=results, folder=folder, one=one.state_dict())
