"""TensorBoard serves our event files; its picture, where there is a browser."""

import io
import json
import shutil
import socket
import subprocess
import sys
import urllib.request
from contextlib import closing

import matplotlib.pyplot as plt
import numpy as np
import pytest

from groundup.scaling import tensorboard_screen
from groundup.scaling.tensorboard_screen import (
    CONFIG,
    LEAST_DRAWN,
    drawn_share,
    make,
    photograph,
    serve,
)
from groundup.scaling.tracking import TensorBoard


def png(dots):
    file = io.BytesIO()
    plt.imsave(file, dots, format="png")
    return file.getvalue()


def test_tensorboard_reads_what_we_logged_and_is_gone_afterwards(tmp_path):
    with closing(TensorBoard(tmp_path / "a run")) as tracker:
        tracker.start({"lr": 0.1})
        for step in (0, 5):
            tracker.log(step, {"loss": 4.0 - step / 2})
    with serve(tmp_path) as address:
        data = address + "data/plugin/scalars/"
        with urllib.request.urlopen(data + "tags") as answer:
            assert list(json.load(answer)) == ["a run"]
        with urllib.request.urlopen(data + "scalars?run=a%20run&tag=loss") as answer:
            points = [row[1:] for row in json.load(answer)]
        assert points == [[0, 4.0], [5, 1.5]]
    port = int(address.rstrip("/").rpartition(":")[2])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_tensorboard_that_ends_at_once_is_told_with_its_words(tmp_path, monkeypatch):
    start = subprocess.Popen

    def ends(command, **options):
        return start([sys.executable, "-c", "print('no such plugin')"], **options)

    monkeypatch.setattr(tensorboard_screen.subprocess, "Popen", ends)
    with (
        pytest.raises(RuntimeError, match="did not start: no such plugin"),
        serve(tmp_path),
    ):
        pass


def test_drawn_share_by_hand():
    """Two dots of eight have a colour; white, black and grey are none."""
    dots = np.ones((2, 4, 3))
    dots[0, 0], dots[0, 1] = (0.2, 0.3, 0.6), (1.0, 0.5, 0.0)
    dots[1, 0], dots[1, 1] = 0.0, 0.5
    assert drawn_share(png(dots)) == 0.25


def test_without_playwright_or_browser_the_message_says_what_is_missing(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "playwright.sync_api", None)
        with pytest.raises(ImportError, match=r"pip install groundup\[dev\]"):
            photograph("http://127.0.0.1:1/", CONFIG)
    pytest.importorskip("playwright")
    monkeypatch.setattr(tensorboard_screen.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="no browser on the path"):
        photograph("http://127.0.0.1:1/", CONFIG)


def test_a_picture_without_curves_is_refused(monkeypatch):
    monkeypatch.setattr(tensorboard_screen, "watched_run", lambda *arguments: None)
    monkeypatch.setattr(tensorboard_screen, "serve", lambda folder: closing(Blank()))
    blank = png(np.ones((4, 4, 3)))
    monkeypatch.setattr(
        tensorboard_screen, "photograph", lambda address, config: (blank, "1")
    )
    with pytest.raises(RuntimeError, match=r"shows no curve: 0\.00%"):
        make(CONFIG)


class Blank:
    def close(self):
        pass


@pytest.mark.browser
def test_the_picture_shows_curves_and_is_small_enough_for_a_page():
    pytest.importorskip("playwright")
    if not any(map(shutil.which, tensorboard_screen.CHROMIUM)):
        pytest.skip("no Chromium on the path")
    found = make(CONFIG)
    assert drawn_share(found["screen.png"]) > LEAST_DRAWN
    assert len(found["screen.png"]) < 300_000
    assert set(found["versions"]) == {"tensorboard", "chromium"}
