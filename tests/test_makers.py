"""The registry of makers: who enters, who is found, with which config."""

import pytest

from groundup import makers
from groundup.makers import Recipe, configure, discover, register

SMALL = {"steps": 1, "device": "cpu"}


@pytest.fixture
def registry(monkeypatch):
    empty: dict = {}
    monkeypatch.setattr(makers, "MAKERS", empty)
    return empty


def test_register_returns_the_maker_and_enters_it(registry):
    @register("one", uses=("groundup.bench",), small=SMALL, full={"steps": 9})
    def make(config): ...

    assert registry == {"one": Recipe(make, {"small": SMALL, "full": {"steps": 9}})}
    assert make.uses == ("groundup.bench",)


def test_refuses_a_second_maker_and_one_without_its_small_preset(registry):
    register("one", small=SMALL)(lambda config: {})
    with pytest.raises(ValueError, match="'one' is registered twice"):
        register("one", small=SMALL)(lambda config: {})
    with pytest.raises(ValueError, match="'two' needs a preset called small"):
        register("two", full=SMALL)


def test_discover_imports_the_recordings_of_each_part(registry, tmp_path, monkeypatch):
    book = tmp_path / "toybook_for_makers"
    for part in ("one", "two", "without"):
        (book / part).mkdir(parents=True)
        (book / part / "__init__.py").touch()
    (book / "__init__.py").touch()
    for part in ("one", "two"):
        (book / part / "recordings.py").write_text(
            "from groundup.makers import register\n"
            f"register('{part}', small={{}})(lambda config: {{}})\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert sorted(discover("toybook_for_makers")) == ["one", "two"]


def test_discover_finds_those_of_the_book():
    assert "scaling_ladder" in discover()


def test_a_config_is_that_of_the_preset_for_the_device():
    recipe = Recipe(lambda config: {}, {"small": SMALL, "full": SMALL | {"steps": 9}})
    assert configure("one", recipe, "small", "cpu") == SMALL
    full = configure("one", recipe, "full", "meta")  # a device that torch always has
    assert full == {"steps": 9, "device": "meta"}
    assert SMALL == {"steps": 1, "device": "cpu"}
    with pytest.raises(ValueError, match=r"one has no preset 'huge'.*: small, full"):
        configure("one", recipe, "huge", "cpu")
    with pytest.raises(ValueError, match="device 'abacus' does not work here"):
        configure("one", recipe, "small", "abacus")
    with pytest.raises(
        ValueError, match="one is computed on the CPU alone; got 'meta'"
    ):
        configure("one", Recipe(recipe.make, {"small": {}}), "small", "meta")
