"""Reports about the address book that is in force, to the log and the metrics."""

import time
from collections.abc import Mapping

import structlog

from whaled.addressbook.loading import idle_rules
from whaled.config.meters import ConfigMeter
from whaled.config.sections import DetectionSettings
from whaled.whales import bookkeys
from whaled.whales.labels import AddressBook

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class BookReports:
    """Reports what a new address book contains, and what is doubtful about it and the backend's network."""

    def __init__(self, meter: ConfigMeter) -> None:
        self._meter = meter
        # The backend's network, empty while it is unknown.
        self._network = ""

    def report(self, settings: DetectionSettings, book: AddressBook, origins: Mapping[str, str]) -> None:
        """Log what a book that is now in force contains, and what is doubtful about it."""
        if settings.books:
            self._meter.book_read(time.time())
            logger.info(
                "address_book_read",
                files=settings.books,
                addresses=len(book.owners),
                owners=book.owners.labels,
                addresses_with_several=book.owners.several,
            )
            for note in book.owners.notes:
                logger.warning("address_book_doubtful", problem=note)
            for fault in idle_rules(settings, book, origins):
                logger.warning("watch_rule_idle", problem=str(fault))
        self._compare_networks(book)

    def on_network(self, network: str, book: AddressBook) -> None:
        """Note the backend's network. If it changed, compare it with the addresses of the book."""
        if network != self._network:
            self._network = network
            self._compare_networks(book)

    def _compare_networks(self, book: AddressBook) -> None:
        """Log a warning if the book has addresses of another network than the backend's."""
        elsewhere = bookkeys.elsewhere(book.owners.networks, self._network)
        if elsewhere:
            logger.warning("address_book_network_mismatch", backend=self._network, addresses=elsewhere)
