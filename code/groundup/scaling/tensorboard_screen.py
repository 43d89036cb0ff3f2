"""TensorBoard as a browser shows it: a run, its event files, a picture of the page.

Here: the maker of the recording `tensorboard`. It trains, starts TensorBoard on a free
port of this machine, opens it in a headless Chromium, and cuts out the charts. Left
out: TensorBoard's side panels.

Needs the development package playwright and a Chromium on the path. Page:
book/4-scaling/tracking.md.
"""

import io
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib.image import imread

from groundup.makers import register
from groundup.scaling.sick_runs import ILLNESSES, watched_run
from groundup.scaling.tracking import TensorBoard

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
START_SECONDS, DRAW_SECONDS = 60, 4
# A click scrolls what it clicks into view, and takes the rest with it.
SCROLL_BACK = "for (const e of document.querySelectorAll('*')) e.scrollLeft = 0"
HEIGHT = 1400  # of the window, pixels; the picture ends with the last chart
LEAST_DRAWN = 0.002  # share of coloured dots, below which no curve was drawn
CONFIG = {
    "illness": "bad shard",
    "seed": 0,
    "tags": ["gradient/all", "loss"],
    "width": 560,  # of the window, pixels; the charts are as wide as a phone
    "dots_per_pixel": 2,
}


@register(
    "tensorboard",
    uses=("groundup.scaling.sick_runs", "groundup.scaling.tracking"),
    small=CONFIG,
)
def make(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train a run of that illness and return what TensorBoard shows of it.

    Returns:
        `screen.png`, and a table of versions.

    Raises:
        ImportError: playwright is not installed.
        FileNotFoundError: no Chromium is on the path.
        RuntimeError: TensorBoard did not start, or the picture shows no curve.
    """
    with tempfile.TemporaryDirectory() as folder:
        tracker = TensorBoard(Path(folder, config["illness"]))
        watched_run(ILLNESSES[config["illness"]], config["seed"], tracker)
        with serve(Path(folder)) as address:
            picture, browser = photograph(address, config)
    share = drawn_share(picture)
    if share < LEAST_DRAWN:
        raise RuntimeError(f"the picture shows no curve: {share:.2%} of it is coloured")
    versions = {"tensorboard": version("tensorboard"), "chromium": browser}
    return {"screen.png": picture, "versions": versions}


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Run TensorBoard over folder, on this machine alone; give its address.

    Raises:
        RuntimeError: it ended, or did not answer in time; with what it said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    command += ["--host", "127.0.0.1", "--port", port, "--load_fast", "false"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}/"
            end = time.monotonic() + START_SECONDS
            while not _answers(address):
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"TensorBoard did not start: {log.read()}")
                time.sleep(0.2)
            yield address
        finally:
            server.terminate()
            server.wait()


def photograph(address: str, config: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return a PNG of the charts of some tags, and the browser's version.

    All settings are TensorBoard's own, but that the table below each chart and the
    panel with the settings are closed.

    Raises:
        ImportError: playwright is not installed.
        FileNotFoundError: no Chromium is on the path.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise ImportError(
            "the picture of TensorBoard needs the development package playwright: "
            "pip install groundup[dev]"
        ) from error
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        raise FileNotFoundError(f"no browser on the path: looked for {CHROMIUM}")
    tags = quote("^(" + "|".join(config["tags"]) + ")$")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=list(FLAGS))
        page = browser.new_page(
            viewport={"width": config["width"], "height": HEIGHT},
            device_scale_factor=config["dots_per_pixel"],
            color_scheme="light",
        )
        page.goto(f"{address}?darkMode=false&tagFilter={tags}#timeseries")
        page.click("text=Enable step selection and data table")
        page.click("button:has-text('Settings')")
        page.evaluate(SCROLL_BACK)
        cards = page.locator("metrics-filtered-view card-view")
        page.wait_for_timeout(1000 * DRAW_SECONDS)
        if cards.count() != len(config["tags"]):
            raise RuntimeError(f"{cards.count()} charts for {config['tags']}")
        boxes = [cards.nth(i).bounding_box() for i in range(cards.count())]
        left, top = (min(box[k] for box in boxes) - 8 for k in ("x", "y"))
        right = max(box["x"] + box["width"] for box in boxes) + 8
        bottom = max(box["y"] + box["height"] for box in boxes) + 8
        clip = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        picture, name = page.screenshot(clip=clip), browser.version
        browser.close()
    return picture, name


def drawn_share(picture: bytes) -> float:
    """Return the share of a PNG's dots that have a colour, as curves have."""
    dots = imread(io.BytesIO(picture))[..., :3]
    return float((np.ptp(dots, axis=-1) > 0.1).mean())


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
