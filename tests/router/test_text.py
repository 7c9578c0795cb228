"""Texts that come in pieces: nobody is shown one without its beginning."""

from router import Append, Event, Plugin, Policy
from router.testing import envelope
from router.text import Texts, text_of, without_torn


class Piece(Event, frozen=True, tag="piece"):
    text: str
    of: str = "s"
    index: int | None = None
    last: bool = False


class Said(Event, frozen=True, tag="said"):
    number: int


piece = Plugin(Piece, Policy(deliver=Append(by=("of",), field="text", ends="last", index="index")))
said = Plugin(Said)


def pieces(*events):
    return [envelope(piece if isinstance(event, Piece) else said, event, seq=i) for i, event in enumerate(events, 1)]


def kept(*events, breaks=()):
    whole, given = without_torn(pieces(*events), breaks)
    return [getattr(each.event, "text", "said") for each in whole], given


TEXT = text_of(pieces(Piece(text=""))[0])


def test_a_text_that_may_have_begun_before_is_left_out_and_all_else_is_kept():
    assert kept(Piece(text="a"), Said(number=1), Piece(text="b")) == (["said"], frozenset())


def test_what_comes_after_the_end_of_a_text_is_the_beginning_of_another():
    events = (Piece(text="a"), Piece(text="b", last=True), Piece(text="c"), Piece(text="d"))
    assert kept(*events) == (["c", "d"], {TEXT})


def test_a_piece_that_counts_as_the_first_begins_a_text():
    assert kept(Piece(text="a", index=0), Piece(text="b", index=1)) == (["a", "b"], {TEXT})


def test_of_a_text_with_a_hole_nothing_is_kept_not_even_its_beginning():
    events = (Piece(text="a", index=0), Piece(text="b", index=1), Piece(text="d", index=3), Said(number=1))
    assert kept(*events, breaks=(2,)) == (["said"], frozenset())


def test_a_text_that_ended_before_a_hole_and_one_that_began_after_it_are_whole():
    events = (
        Piece(text="a", index=0),
        Piece(text="b", last=True),
        Piece(text="x", of="other"),
        Piece(text="c", of="new", index=0),
    )
    assert kept(*events, breaks=(2,)) == (["a", "b", "c"], {text_of(pieces(Piece(text="", of="new"))[0])})


def test_whoever_was_not_given_the_beginning_is_told_with_each_piece_and_no_more_after_the_end():
    texts = Texts()
    first, second, last = pieces(Piece(text="a"), Piece(text="b"), Piece(text="c", last=True))
    assert texts.follow(first) == frozenset()
    texts.tear("late")
    assert texts.follow(second) == {"late"}
    assert texts.torn("late") == {TEXT}
    assert texts.follow(last) == {"late"}
    assert texts.follow(first) == frozenset()
    assert texts.torn("late") == set()


def test_whoever_has_gone_lacks_nothing():
    texts = Texts()
    texts.follow(pieces(Piece(text="a"))[0])
    texts.tear("late")
    texts.forget("late")
    assert texts.follow(pieces(Piece(text="a"))[0]) == frozenset()
