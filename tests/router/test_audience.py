"""An audience can only be narrowed."""

from hypothesis import given
from hypothesis import strategies as st

from router import Audience

GRANTS = st.sampled_from(["view", "chat", "edit", "staff"])
SESSIONS = st.sampled_from(["s1", "s2", "s3"])
TESTS = st.fixed_dictionaries(
    {},
    optional={
        "holding": GRANTS,
        "lacking": GRANTS,
        "without": st.frozensets(SESSIONS),
        "only": st.frozensets(SESSIONS),
    },
)


@given(st.lists(TESTS, max_size=4), TESTS, SESSIONS, st.frozensets(GRANTS))
def test_narrowing_never_lets_anybody_in(before, test, session, grants):
    audience = Audience("t")
    for earlier in before:
        audience = audience.narrowed(**earlier)
    narrowed = audience.narrowed(**test)
    assert not narrowed.includes(session, grants) or audience.includes(session, grants)


@given(TESTS, TESTS)
def test_the_order_of_narrowing_does_not_matter(one, other):
    audience = Audience("t")
    assert audience.narrowed(**one).narrowed(**other) == audience.narrowed(**other).narrowed(**one)


@given(st.frozensets(GRANTS))
def test_splitting_by_a_grant_reaches_each_person_exactly_once(grants):
    audience = Audience("t")
    parts = [audience.narrowed(holding="staff"), audience.narrowed(lacking="staff")]
    assert sum(part.admits(grants) for part in parts) == 1
