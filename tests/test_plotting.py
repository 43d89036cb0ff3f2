"""Figures are looked at by people; here is what can be checked without eyes."""

import colorsys
import io

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb

from groundup import plotting


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.setattr(mpl, "rcParams", mpl.rcParams.copy())
    mpl.use("agg")
    plotting.use_book_style()
    yield
    plt.close("all")


def luminance(colour):
    """Relative luminance of WCAG 2.1."""
    rgb = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in to_rgb(colour)
    ]
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#121212"])
def test_colours_can_be_seen_in_both_themes(page):
    assert contrast(plotting.INK, page) >= 4
    for colour in plotting.SERIES:
        assert contrast(colour, page) >= 3, colour


def test_series_are_told_apart_with_colour_deficiency():
    """Simulated by the linear-light matrices of Machado et al. (2009), severity 1."""
    matrices = {
        "protan": [
            [0.152, 1.053, -0.205],
            [0.115, 0.786, 0.099],
            [-0.004, -0.048, 1.052],
        ],
        "deutan": [
            [0.367, 0.861, -0.228],
            [0.280, 0.673, 0.047],
            [-0.012, 0.043, 0.969],
        ],
    }
    for name, matrix in matrices.items():
        seen = []
        for colour in plotting.SERIES[:4]:
            rgb = np.clip(np.array(matrix) @ np.array(to_rgb(colour)) ** 2.2, 0, 1)
            seen.append(rgb ** (1 / 2.2))
        for i, one in enumerate(seen):
            for other in seen[:i]:
                assert np.abs(one - other).max() > 0.08, name


def test_the_same_figure_gives_the_same_bytes():
    def draw():
        fig, ax = plt.subplots()
        ax.plot([1, 2], [3, 4])
        out = io.BytesIO()
        fig.savefig(out, format="svg", metadata={"Date": None})
        return out.getvalue()

    first = draw()
    assert first == draw()
    assert plotting.INK.encode() in first  # what the site replaces by its own ink


def test_visible_shows_white_space():
    assert plotting.visible("a b\n\t") == "a␣b↵⇥"


def test_heatmap_shows_the_values_and_names_the_tokens():
    values = torch.tensor([[0.1, 0.2], [0.3, 0.4]], requires_grad=True)
    ax = plotting.heatmap(values, rows=["a ", "b"], columns=["c", "d"])
    np.testing.assert_allclose(ax.images[0].get_array(), values.detach())
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a␣", "b"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")


def test_signed_maps_are_centred_at_zero():
    ax = plotting.heatmap([[-1.0, 4.0]], signed=True)
    assert ax.images[0].get_clim() == (-4.0, 4.0)


def test_matrix_writes_every_number_in_readable_ink():
    values = np.array([[0.0, 1.25], [-np.inf, np.nan]])
    ax = plotting.matrix(values, rows=["p", "q"])
    assert [t.get_text() for t in ax.texts] == ["0.00", "1.25", "-∞"]
    signed = plotting.matrix([[-0.001, -0.009]])
    assert [t.get_text() for t in signed.texts] == ["0.00", "-0.01"]
    colours = mpl.colormaps[plotting.MAGNITUDE]
    for text, share in zip(ax.texts[:2], (0.0, 1.0), strict=True):
        assert contrast(text.get_color(), to_hex(colours(share))) >= 4.5


@pytest.mark.parametrize("share", np.linspace(0, 1, 21))
@pytest.mark.parametrize("name", [plotting.MAGNITUDE, plotting.SIGNED])
def test_ink_reads_on_every_colour_of_both_maps(name, share):
    colour = to_hex(mpl.colormaps[name](share))
    assert contrast(plotting._ink_on(to_rgb(colour)), colour) >= 4.5


def test_spread_is_the_range_of_the_runs():
    _, ax = plt.subplots()
    plotting.line_with_spread([0, 1], [[1.0, 2.0], [3.0, 6.0]], ax=ax, label="both")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [2.0, 4.0])
    band = ax.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1.0, 6.0)
    assert ax.texts[0].get_text() == "both"
    assert to_hex(ax.texts[0].get_color()) == to_hex(ax.lines[0].get_color())


def test_strip_writes_all_letters_and_wraps_between_tokens():
    ax = plotting.token_strip(["To ", "be, ", "or"], per_line=8)
    assert "".join(t.get_text() for t in ax.texts) == "To␣be,␣or"
    rows = [round(t.get_position()[1] - 0.5) for t in ax.texts]
    assert rows == [0] * 7 + [1] * 2


def test_strip_colours_follow_the_values():
    ax = plotting.token_strip(["a", "b"], [0.0, 1.0])
    colours = [patch.get_facecolor() for patch in ax.patches]
    expected = [mpl.colormaps[plotting.MAGNITUDE](v) for v in (0.0, 1.0)]
    np.testing.assert_allclose(colours, expected)
    hues = [colorsys.rgb_to_hsv(*c[:3])[0] for c in colours]
    assert hues[0] != hues[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plotting.heatmap([1.0, 2.0]), "values must be a matrix"),
        (
            lambda: plotting.heatmap([[1.0]], rows=["a", "b"]),
            "rows must name each of 1",
        ),
        (
            lambda: plotting.token_strip(["a"], [1.0, 2.0]),
            "one number for each of the 1",
        ),
        (
            lambda: plotting.line_with_spread([0, 1], [[1.0]], ax=plt.gca()),
            r"runs must be \(runs, 2\)",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
