"""Who acknowledged a critical event, and who did not."""

from router.receipt import Receipt, Receipts


async def test_it_tells_who_acknowledged_and_who_is_missing():
    receipts = Receipts()
    receipts.open("t", "m")
    receipts.acknowledged("t", "m", "ada")
    assert await receipts.wait("t", "m", {"ada", "grace"}, 0.0) == Receipt(["ada"], ["grace"])


async def test_the_same_id_in_another_topic_is_another_message():
    receipts = Receipts()
    receipts.open("t", "m")
    receipts.acknowledged("other", "m", "ada")
    assert (await receipts.wait("t", "m", {"ada"}, 0.0)).missing == ["ada"]


async def test_a_publisher_that_asks_again_is_told_of_those_who_had_acknowledged_and_who_did_since():
    receipts = Receipts()
    receipts.open("t", "m")
    receipts.acknowledged("t", "m", "ada")
    await receipts.wait("t", "m", {"ada", "bob", "cy"}, 0.0)
    receipts.acknowledged("t", "m", "bob")
    receipts.open("t", "m")
    assert await receipts.wait("t", "m", {"ada", "bob", "cy"}, 0.0) == Receipt(["ada", "bob"], ["cy"])
