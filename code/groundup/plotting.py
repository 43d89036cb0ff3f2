"""One house style for every figure in the book.

Here: the style, and the kinds of figure that many pages draw: a heat map over
tokens, a matrix with its numbers, runs with their spread, tokens in colour. Each
helper draws on an Axes and returns it.

Figures are transparent SVGs. Ink is one mid-grey that reads on white and on black;
the site replaces it by the colour of the text around the figure.
"""

from collections.abc import Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from numpy.typing import ArrayLike

INK = "#787d86"  # contrast with white and with #121212 both above 4
GRID = "#787d8640"
# Told apart under the common colour-vision deficiencies; contrast at least 3 with
# white and with the dark page.
SERIES = ("#3b82f6", "#d9660a", "#178f68", "#cc3f95", "#8b6cef", "#8a7a00")
MAGNITUDE, SIGNED = "viridis", "RdBu_r"


def use_book_style() -> None:
    """Set the book's matplotlib style; inside a notebook, draw SVG.

    The one place that decides how figures look and how they are stored: the same
    in the book, in a notebook and in a script.
    """
    if _in_notebook():
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None})
    mpl.rcParams.update(
        {
            "figure.figsize": (6.0, 3.6),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "svg.fonttype": "path",  # the reader may not have the font
            "svg.hashsalt": "groundup",  # the same figure gives the same bytes
            "font.size": 11,
            "axes.titlesize": 11,
            "axes.labelsize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": mpl.cycler(color=SERIES),
            "axes.titlecolor": INK,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "grid.color": GRID,
            "lines.linewidth": 1.8,
            "image.cmap": MAGNITUDE,
            "legend.frameon": False,
        }
    )


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return get_ipython() is not None


def visible(token: str) -> str:
    """Return token with its white space made visible.

    Example: `visible("a b\\n")` is `"a␣b↵"`.
    """
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


def heatmap(
    values: ArrayLike,
    *,
    ax: Axes | None = None,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    row_label: str = "query",
    column_label: str = "key",
    signed: bool = False,
    limits: tuple[float, float] | None = None,
    colorbar: str | None = None,
) -> Axes:
    """Draw a matrix as colours, with a token beside each row and column.

    Args:
        values: matrix (rows, columns); NaN is left blank.
        ax: where to draw; a new figure if None.
        rows: tokens down the side; white space is made visible. None: positions.
        columns: tokens along the bottom. None: positions.
        row_label: what the rows are.
        column_label: what the columns are.
        signed: use the diverging map, centred at zero.
        limits: values of the two ends of the colour map; the data's if None.
        colorbar: its label; no colour bar if None.
    """
    values = _as_matrix(values)
    ax = ax or plt.subplots()[1]
    low, high = limits or _limits(values, signed)
    image = ax.imshow(
        values,
        cmap=SIGNED if signed else MAGNITUDE,
        vmin=low,
        vmax=high,
        aspect="auto" if rows is None and columns is None else "equal",
        interpolation="nearest",
    )
    _token_ticks(ax, rows, columns, values.shape)
    ax.set(xlabel=column_label, ylabel=row_label)
    ax.spines[:].set_visible(False)
    if colorbar is not None:
        bar = ax.figure.colorbar(image, ax=ax, label=colorbar, shrink=0.85)
        bar.outline.set_visible(False)
    return ax


def matrix(
    values: ArrayLike,
    *,
    ax: Axes | None = None,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    title: str = "",
    form: str = ".2f",
    signed: bool | None = None,
    limits: tuple[float, float] | None = None,
) -> Axes:
    """Draw a small matrix with its numbers written in the cells.

    Args:
        values: matrix (rows, columns); NaN is left blank, -inf is written -∞.
        ax: where to draw; a new figure if None.
        rows: names down the side.
        columns: names along the top.
        title: name of the matrix.
        form: format of a number.
        signed: use the diverging map; None: if a finite value is negative.
        limits: values of the two ends of the colour map; the data's if None.
    """
    values = _as_matrix(values)
    if ax is None:
        height, width = values.shape
        ax = plt.subplots(figsize=(0.7 * width + 1, 0.5 * height + 0.9))[1]
    finite = values[np.isfinite(values)]
    if signed is None:
        signed = bool((finite < 0).any())
    low, high = limits or _limits(values, signed)
    colours = mpl.colormaps[SIGNED if signed else MAGNITUDE]
    ax.imshow(
        np.where(np.isfinite(values), values, np.nan),
        cmap=colours,
        vmin=low,
        vmax=high,
        aspect="auto",
    )
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        share = np.clip((value - low) / (high - low), 0, 1) if high > low else 0.5
        ink = _ink_on(colours(share)) if np.isfinite(value) else INK
        text = "∞" if value > 0 else "-∞"
        if np.isfinite(value):
            text = format(value, "z" + form)  # z: what rounds to zero has no sign
        ax.text(column, row, text, ha="center", va="center", color=ink, fontsize=10)
    _token_ticks(ax, rows, columns, values.shape)
    if rows is None:
        ax.set_yticks([])
    if columns is None:
        ax.set_xticks([])
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title)
    return ax


def line_with_spread(
    x: ArrayLike,
    runs: ArrayLike,
    *,
    ax: Axes,
    label: str | None = None,
    color: str | None = None,
    marker: str | None = None,
) -> Axes:
    """Draw the mean of several runs, with their whole range as a band.

    Args:
        x: positions (n,).
        runs: one row a run (runs, n); a single row draws a bare line.
        ax: where to draw.
        label: written at the end of the line, in its colour.
        color: next of the cycle if None.
        marker: of the mean.
    """
    x, runs = np.asarray(x), np.atleast_2d(np.asarray(runs, dtype=float))
    if runs.shape[-1] != len(x):
        raise ValueError(
            f"runs must be (runs, {len(x)}) to match x; got shape {runs.shape}"
        )
    (line,) = ax.plot(x, runs.mean(0), color=color, marker=marker, markersize=4)
    if len(runs) > 1:
        ax.fill_between(
            x, runs.min(0), runs.max(0), color=line.get_color(), alpha=0.22, lw=0
        )
    if label is not None:
        end = float(x[-1]), float(runs.mean(0)[-1])
        label_line(ax, *end, label, color=line.get_color())
    return ax


def label_line(ax: Axes, x: float, y: float, text: str, *, color: str) -> None:
    """Write text just right of the point (x, y) in the colour of its line."""
    ax.annotate(
        text,
        (x, y),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=color,
        annotation_clip=False,
    )


def token_strip(
    tokens: Sequence[str],
    values: ArrayLike | None = None,
    *,
    ax: Axes | None = None,
    per_line: int = 40,
    limits: tuple[float, float] | None = None,
    signed: bool = False,
    colorbar: str | None = None,
) -> Axes:
    """Write tokens one after another, each on its own colour.

    Args:
        tokens: what to write; white space is made visible.
        values: one number a token, as colour. None: neighbours get
            different colours, so that the borders of the tokens show.
        ax: where to draw; a new figure of the right height if None.
        per_line: characters before the strip wraps.
        limits: values of the two ends of the colour map; the data's if None.
        signed: use the diverging map, centred at zero.
        colorbar: its label; no colour bar if None.
    """
    words = [visible(token) for token in tokens]
    spots, column, row = [], 0, 0
    for word in words:
        if column and column + len(word) > per_line:
            column, row = 0, row + 1
        spots.append((column, row))
        column += len(word)
    if ax is None:
        ax = plt.subplots(figsize=(6.0, 0.34 * (row + 1) + 0.25))[1]
    if values is None:
        colours = [to_rgb(SERIES[i % len(SERIES)]) for i in range(len(words))]
        alpha = 0.3
    else:
        values = np.asarray(values, dtype=float)
        if values.shape != (len(words),):
            raise ValueError(
                f"values must hold one number for each of the {len(words)} tokens; "
                f"got shape {values.shape}"
            )
        low, high = limits or _limits(values, signed)
        scale = mpl.cm.ScalarMappable(
            mpl.colors.Normalize(low, high), SIGNED if signed else MAGNITUDE
        )
        colours, alpha = [scale.to_rgba(v)[:3] for v in values], 1.0
        if colorbar is not None:
            bar = ax.figure.colorbar(scale, ax=ax, label=colorbar, pad=0.02)
            bar.outline.set_visible(False)
    for word, (column, row_), colour in zip(words, spots, colours, strict=True):
        box = plt.Rectangle(
            (column, row_ + 0.04), len(word), 0.92, color=colour, alpha=alpha, lw=0
        )
        ax.add_patch(box)
        ink = INK if values is None else _ink_on(colour)
        for offset, letter in enumerate(word):
            ax.text(
                column + offset + 0.5,
                row_ + 0.5,
                letter,
                ha="center",
                va="center",
                family="monospace",
                color=ink,
            )
    ax.set(xlim=(0, per_line), ylim=(row + 1, 0))
    ax.set_axis_off()
    return ax


def _as_matrix(values: ArrayLike) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().float()
    values = np.asarray(values, dtype=float)
    if values.ndim != 2:
        raise ValueError(f"values must be a matrix; got shape {values.shape}")
    return values


def _limits(values: np.ndarray, signed: bool) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    if signed:
        most = float(np.abs(finite).max()) or 1.0
        return -most, most
    return float(finite.min()), float(finite.max())


def _ink_on(colour: Sequence[float]) -> str:
    """Black or white, whichever reads better on colour (WCAG luminance)."""
    rgb = np.asarray(colour[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "#000000" if linear @ [0.2126, 0.7152, 0.0722] > 0.18 else "#ffffff"


def _token_ticks(
    ax: Axes,
    rows: Sequence[str] | None,
    columns: Sequence[str] | None,
    shape: tuple[int, ...],
) -> None:
    for axis, names, count in (
        (ax.yaxis, rows, shape[0]),
        (ax.xaxis, columns, shape[1]),
    ):
        if names is None:
            continue
        if len(names) != count:
            raise ValueError(
                f"{'rows' if axis is ax.yaxis else 'columns'} must name each of "
                f"{count}; got {len(names)}"
            )
        axis.set_ticks(range(count), [visible(name) for name in names])
        axis.set_tick_params(length=0)
