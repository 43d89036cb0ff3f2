"""Random states: what follows is what would have followed."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.scaling.checkpointing import load, save
from groundup.scaling.random_state import random_state, restore_random_state

DRAWS = {
    "torch": lambda g: torch.rand(3).tolist(),
    "torch normal": lambda g: torch.randn(5).tolist(),
    "dropout": lambda g: torch.nn.functional.dropout(torch.ones(9)).tolist(),
    "python": lambda g: [random.random(), random.randrange(10**30)],
    "python gauss": lambda g: random.gauss(),  # draws two, keeps one
    "numpy": lambda g: np.random.rand(3).tolist(),  # noqa: NPY002
    "numpy gauss": lambda g: np.random.randn(),  # noqa: NPY002
    "own": lambda g: torch.randint(10**9, (4,), generator=g).tolist(),
    "own normal": lambda g: torch.randn(3, generator=g).tolist(),
}
plans = st.lists(st.sampled_from(sorted(DRAWS)), max_size=8)


@pytest.fixture(autouse=True)
def _own_random_numbers():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002


@settings(max_examples=60)
@given(before=plans, after=plans, seed=st.integers(0, 2**32 - 1))
def test_after_a_restore_the_same_follows(before, after, seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    own = torch.Generator().manual_seed(seed)
    for name in before:
        DRAWS[name](own)
    state = random_state(batches=own)
    expected = [DRAWS[name](own) for name in after]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    other = torch.Generator()
    restore_random_state(state, batches=other)
    assert [DRAWS[name](other) for name in after] == expected


def test_it_survives_a_checkpoint(tmp_path):
    own = torch.Generator().manual_seed(5)
    state = random_state(a=own, b=own)
    path = save(tmp_path, 0, {"w": torch.ones(2), **state}, {})
    # The type checker of these tests draws from `random` too: go back before drawing.
    restore_random_state(state, a=own, b=torch.Generator())
    expected = [draw(own) for draw in DRAWS.values()]
    a, b = torch.Generator(), torch.Generator()
    restore_random_state(load(path).tensors, a=a, b=b)
    assert [draw(a) for draw in DRAWS.values()] == expected
    assert not torch.equal(a.get_state(), b.get_state())  # a has gone on, b has not


def test_taking_it_draws_nothing_and_shares_nothing():
    own = torch.Generator().manual_seed(5)
    first, again = random_state(own=own), random_state(own=own)
    assert all(torch.equal(first[n], again[n]) or n.endswith("gauss") for n in first)
    kept = first["random/of/own"].clone()
    torch.rand(9, generator=own)
    assert torch.equal(first["random/of/own"], kept)


def test_refuses_what_does_not_fit_and_changes_nothing():
    own = torch.Generator()
    state = random_state(batches=own)
    ahead = random_state(batches=own)["random/torch"]
    torch.rand(700)
    here = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"random/of/batches has no generator"):
        restore_random_state(state)
    with pytest.raises(ValueError, match=r"random/of/noise is missing"):
        restore_random_state(state, batches=own, noise=torch.Generator())
    del state["random/numpy"]
    with pytest.raises(ValueError, match=r"random/numpy is missing"):
        restore_random_state(state, batches=own)
    assert torch.equal(torch.get_rng_state(), here)
    assert not torch.equal(here, ahead)
