"""The registry of benchmarks: who enters, who is found, how a claim reads."""

import math

import pytest

from groundup import bench
from groundup.bench import Claim


@pytest.fixture
def registry(monkeypatch):
    empty: dict = {}
    monkeypatch.setattr(bench, "BENCHMARKS", empty)
    return empty


def test_register_returns_the_function_and_enters_it(registry):
    @bench.register("attention")
    def attention(quick):
        return [Claim("cached decoding", 3.0, 2.0)]

    assert registry == {"attention": attention}
    assert attention(True)[0].what == "cached decoding"


def test_a_name_is_given_once(registry):
    bench.register("attention")(lambda quick: [])
    with pytest.raises(ValueError, match="'attention' is registered twice"):
        bench.register("attention")(lambda quick: [])
    assert len(registry) == 1


def test_find_lists_the_names_there_are(registry):
    with pytest.raises(ValueError, match=r"'x'; there are: none yet"):
        bench.find("x", registry)
    measure = bench.register("b")(lambda quick: [])
    bench.register("a")(lambda quick: [])
    assert bench.find("b", registry) is measure
    with pytest.raises(ValueError, match=r"'x'; there are: a, b"):
        bench.find("x", registry)


@pytest.mark.parametrize(
    ("ratio", "holds"), [(2.0, True), (2.1, True), (1.999, False), (math.nan, False)]
)
def test_a_claim_holds_from_its_target_on(ratio, holds):
    assert Claim("speed", ratio, 2.0).holds is holds


def test_the_line_of_a_claim():
    line = Claim("tokens per second", 12.3456, 10.0).line("loop")
    assert line == "loop tokens per second ratio 12.3 target 10"


def test_discover_imports_the_bench_module_of_each_part(
    registry, tmp_path, monkeypatch
):
    book = tmp_path / "toybook_for_discover"
    for part in ("one", "two", "without"):
        (book / part).mkdir(parents=True)
        (book / part / "__init__.py").touch()
    (book / "__init__.py").touch()
    (book / "loose.py").write_text("raise SystemExit('not a part: not imported')")
    (book / "without" / "other.py").write_text("raise SystemExit('not imported')")
    for part in ("one", "two"):
        (book / part / "bench.py").write_text(
            f"from groundup.bench import register\n"
            f"register('{part}')(lambda quick: [])\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert sorted(bench.discover("toybook_for_discover")) == ["one", "two"]


def test_discover_finds_those_of_the_book():
    assert {"attention", "decode", "loss", "train-step"} <= set(bench.discover())


def table_file(tmp_path, block=""):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{bench.START}\n{block}{bench.END}\nafter\n")
    return path


def test_the_table_is_written_between_its_marks(tmp_path):
    path = table_file(tmp_path)
    claims = [Claim("speed", 2.5, 2.0, "5 ms for 12"), Claim("memory", 1.234, 2.0)]
    bench.write_table(path, {"cache": claims}, "Measured on: an abacus.")
    assert path.read_text() == (
        f"before\n{bench.START}\n{bench.HEAD}\n"
        "| `cache` | speed | 2.5 | 2 | 5 ms for 12 |\n"
        "| `cache` | memory | **1.23** | 2 |  |\n\n"
        f"Bold: target missed. Measured on: an abacus.\n{bench.END}\nafter\n"
    )


def test_rows_of_other_benchmarks_stay_and_old_ones_go(tmp_path):
    path = table_file(tmp_path)
    bench.write_table(
        path, {"b": [Claim("x", 1.0, 1.0)], "c": [Claim("y", 2.0, 1.0)]}, "old"
    )
    bench.write_table(
        path, {"b": [Claim("x", 3.0, 1.0)], "a": [Claim("z", 4.0, 1.0)]}, "new"
    )
    rows = [line for line in path.read_text().splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[2] for row in rows] == ["4", "3", "2"]
    assert "last year" not in path.read_text()
    assert path.read_text().count(bench.HEAD) == 1


def test_a_file_without_the_marks_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("nothing here\n")
    with pytest.raises(ValueError, match="must hold the lines <!-- bench -->"):
        bench.write_table(path, {"a": [Claim("x", 1.0, 1.0)]}, "")
    assert path.read_text() == "nothing here\n"
