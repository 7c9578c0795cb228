"""That the net is awake: a router that was broken on purpose is noticed, and what breaks it still fits the code."""

import pytest

from tests.simulation.mutation import MUTATIONS, Mutation, Stale, hunt, mutated

KNOWN = {"known-left-out": ("memory", 1, 12), "position-past-held": ("memory", 1, 4)}
"""Mutations that these few seeds find; the whole hunt is `python -m tests.simulation.mutation`."""
BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", KNOWN)
def test_a_broken_router_is_noticed(name: str) -> None:
    assert hunt(BY_NAME[name], *KNOWN[name]).seed is not None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_mutation_fits_the_code_as_it_is(mutation: Mutation) -> None:
    with mutated(mutation) as folder:
        assert mutation.old not in (folder / "router" / mutation.file).read_text(encoding="utf-8")


def test_a_mutation_that_fits_nothing_says_so() -> None:
    stale = Mutation("stale", "hub.py", "no such line\n", "", "nothing")
    with pytest.raises(Stale, match=r"stale: router/hub\.py has this 0 times"), mutated(stale):
        pass
