"""The watch list: which transactions match, by whom and by how much."""

from pathlib import Path

import pytest

from kit.transactions import ADDRESSES, spent, transaction
from kit.whales import BTC, NOW
from whaled.addressbook.loading import read_address_book
from whaled.config.sections import DetectionSettings, WatchRule
from whaled.errors import ConfigError
from whaled.model import Input, Market, Output, OwnerType, Source, Transaction, Whale
from whaled.whales.detect import Detector, Rules
from whaled.whales.labels import AddressBook

HOT, COLD, TREASURY, LANDS, NOBODY = ADDRESSES
BOOK_TEXT = f"Kraken,{HOT},exchange\nKraken,{COLD},exchange\nTreasury,{TREASURY},government\nLands,{LANDS},government\n"
BOOK = AddressBook.parse(BOOK_TEXT, "book.csv")


def pays(address: str, value: int) -> Output:
    return Output(value, f"script of {address}", address)


def takes(address: str, value: int) -> Input:
    return spent(value, f"script of {address}", address)


def detector(*watch: WatchRule, threshold_btc: float | None = 100.0) -> Detector:
    return Detector(Rules.of(DetectionSettings(threshold_btc=threshold_btc, watch=watch)), BOOK)


def found_by(detector: Detector, found: Transaction) -> tuple[str, ...]:
    """The rules in the alert, none where there is no alert."""
    whale: Whale | None = detector.assess(found, market=Market(), now=NOW, source=Source.LIVE)
    return whale.alert.matched_rules if whale is not None else ()


GOVERNMENTS = WatchRule(name="governments", types=(OwnerType.GOVERNMENT,))


def test_one_satoshi_from_or_to_a_watched_owner_is_an_alert() -> None:
    watching = detector(GOVERNMENTS)
    assert found_by(watching, transaction([pays(TREASURY, 1)])) == ("watch:governments",)
    assert found_by(watching, transaction([pays(NOBODY, 1)], [takes(LANDS, 2)])) == ("watch:governments",)
    assert found_by(watching, transaction([pays(NOBODY, 99 * BTC)], [takes(HOT, 99 * BTC)])) == ()
    assert watching.minimum_sat == 0


@pytest.mark.parametrize(("difference", "expected"), [(-1, ()), (0, ("watch:kraken",))])
def test_the_amount_is_what_a_label_pays_or_receives_in_all(difference: int, expected: tuple[str, ...]) -> None:
    watching = detector(WatchRule(name="kraken", labels=("Kraken",), threshold_btc=10))
    received = transaction([pays(HOT, 4 * BTC), pays(COLD, 6 * BTC + difference), pays(NOBODY, 50 * BTC)])
    paid = transaction([pays(NOBODY, 9 * BTC)], [takes(HOT, 4 * BTC), takes(COLD, 6 * BTC + difference)])
    assert found_by(watching, received) == expected
    assert found_by(watching, paid) == expected
    assert watching.minimum_sat == 10 * BTC


def test_every_label_of_an_address_is_watched_and_its_amount_counted_once() -> None:
    book = AddressBook.parse(f"Kraken,{HOT},exchange\nKraken 8,{HOT},exchange\nLost,{HOT},government\n", "book.csv")
    for rule in (
        WatchRule(name="x", labels=("Kraken 8",), threshold_btc=10),
        WatchRule(name="x", labels=("Kraken", "Kraken 8"), types=(OwnerType.GOVERNMENT,), threshold_btc=10),
    ):
        watching = Detector(Rules.of(DetectionSettings(watch=(rule,))), book)
        assert found_by(watching, transaction([pays(HOT, 10 * BTC)])) == ("watch:x",)
        assert found_by(watching, transaction([pays(HOT, 10 * BTC - 1)])) == ()


def test_labels_are_not_added_up_nor_are_both_sides() -> None:
    watching = detector(WatchRule(name="states", types=(OwnerType.GOVERNMENT,), threshold_btc=10))
    assert found_by(watching, transaction([pays(TREASURY, 6 * BTC), pays(LANDS, 6 * BTC)])) == ()
    assert found_by(watching, transaction([pays(TREASURY, 6 * BTC)], [takes(TREASURY, 7 * BTC)])) == ()


def test_an_alert_names_all_rules_in_the_order_of_the_configuration() -> None:
    watching = detector(
        WatchRule(name="b", labels=("Treasury",)), WatchRule(name="never", labels=("Lands",)), GOVERNMENTS
    )
    found = transaction([pays(TREASURY, 100 * BTC)])
    assert found_by(watching, found) == ("threshold_btc", "watch:b", "watch:governments")


def test_an_input_that_is_not_known_is_open_until_it_is() -> None:
    watching = detector(GOVERNMENTS)
    unknown = transaction([pays(NOBODY, 5)])
    assert found_by(watching, unknown) == ()
    assert watching.is_open(unknown)
    assert not watching.is_open(transaction([pays(NOBODY, 5)], [takes(HOT, 6)]))


def test_only_what_a_watch_rule_can_match_is_open() -> None:
    watching = detector(WatchRule(name="states", types=(OwnerType.GOVERNMENT,), threshold_btc=10))
    assert not watching.is_open(transaction([pays(NOBODY, 10 * BTC - 2)], fee_sat=1))
    assert watching.is_open(transaction([pays(NOBODY, 10 * BTC - 1)], fee_sat=1))
    assert watching.is_open(transaction([pays(NOBODY, 1)], fee_sat=None))
    assert not Detector(Rules(100 * BTC)).is_open(transaction([pays(NOBODY, 1)], fee_sat=None))


def test_without_any_other_rule_only_the_watched_are_alerted() -> None:
    watching = detector(GOVERNMENTS, threshold_btc=None)
    assert found_by(watching, transaction([pays(NOBODY, 1000 * BTC)], [takes(HOT, 1001 * BTC)])) == ()
    assert found_by(watching, transaction([pays(TREASURY, BTC)])) == ("watch:governments",)


def read(path: Path, *watch: WatchRule) -> AddressBook:
    path.write_text(BOOK_TEXT)
    return read_address_book(DetectionSettings(address_book=str(path), watch=watch))


def test_a_label_that_is_not_in_the_book_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    path = tmp_path / "book.csv"
    assert read(path, WatchRule(name="k", labels=("Kraken", "Lands"))) == BOOK
    with pytest.raises(ConfigError) as refused:
        read(path, WatchRule(name="k", labels=("Kraken",)), WatchRule(name="t", labels=("Lands", "Tresury", "kraken?")))
    assert [str(fault) for fault in refused.value.faults] == [
        f"detection.watch[1].labels[1]: no label 'Tresury' in {path}; did you mean 'Treasury'?",
        f"detection.watch[1].labels[2]: no label 'kraken?' in {path}; did you mean 'Kraken'?",
    ]
