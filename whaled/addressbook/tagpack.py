"""GraphSense TagPacks: YAML with fields common to all tags, and a list `tags` whose entries may have their own.

The format is that of the TagPack tool's schema (tagpack_schema.yaml). The file is read as a stream of YAML events,
because packs have hundreds of thousands of tags. Common fields may also follow the tags, so the file is read twice.
"""

from collections.abc import Callable, Iterator
from typing import Any, TextIO

import yaml

from whaled.addressbook.rows import LabelFileError, Options, Report, Row
from whaled.model import OwnerType

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Concepts of GraphSense's taxonomy that determine the type of an owner. Others do not: the type is then `--type` or
# `other`.
TYPES = {
    "exchange": OwnerType.EXCHANGE,
    "defi_custody": OwnerType.CUSTODIAN,
    "miner": OwnerType.MINER,
    "mining_service": OwnerType.MINER,
    **dict.fromkeys(
        (
            "service", "wallet_service", "escrow_wallet", "ico_wallet", "filesharing", "market", "messaging_service",
            "mixing_service", "coinjoin", "gambling", "shop", "faucet", "payment_processor", "atm", "hosting", "vpn",
            "nameservice", "defi", "defi_lending", "defi_dex", "defi_bridge", "defi_staking", "search_engine",
        ),
        OwnerType.SERVICE,
    ),
}  # fmt: skip
_NULLS = {"", "~", "null", "Null", "NULL"}
Fields = dict[str, Any]


def rows(opened: Callable[[], TextIO], options: Options, report: Report, *, is_whole: bool = True) -> Iterator[Row]:
    """Yield a row for each tag of a Bitcoin address.

    `opened` opens the file and is called twice. `is_whole` states that the last line ends with a line break. Raises
    LabelFileError for a file that is not a TagPack, is not valid YAML, or ends within a tag.
    """
    with opened() as file:
        header = _header(_Events(file))
    line = 0
    with opened() as file:
        for line, tag in _tags(_Events(file)):
            report.read += 1
            if isinstance(tag, str):
                report.blame(line, tag)
                continue
            row = _row(line, {**header, **tag}, options, report)
            if row is not None:
                yield row
    if not is_whole:
        report.require_usable(line)


def _row(line: int, fields: Fields, options: Options, report: Report) -> Row | None:
    if fields.get("address") is None:
        report.leave_out("tags of transactions" if fields.get("tx_hash") is not None else "tags without an address")
        return None
    for name in ("currency", "network"):
        chain = fields.get(name) or fields.get("currency") or fields.get("network")
        if not isinstance(chain, str):
            report.blame(line, "the tag has no `currency`, nor do the common fields")
            return None
        if chain.strip().upper() != "BTC":
            report.leave_out(f"tags in {chain.strip().upper()[:20]}")
            return None
    return report.row(
        line,
        label=options.label or fields.get("label"),
        key=fields["address"],
        type=_type(fields) or options.type or OwnerType.OTHER,
        source=options.source or fields.get("source"),
        date=fields.get("lastmod"),
        confidence=fields.get("confidence"),
    )


def _type(fields: Fields) -> OwnerType | None:
    concepts = fields.get("concepts")
    named = [fields.get("category"), *(concepts if isinstance(concepts, list) else [concepts])]
    return next((TYPES[concept] for concept in named if isinstance(concept, str) and concept in TYPES), None)


class _Events:
    """The events of a YAML stream. Raises LabelFileError if it is not valid YAML."""

    def __init__(self, file: TextIO) -> None:
        self._events = yaml.parse(file, Loader=_LOADER)

    def next(self) -> Any:
        try:
            return next(self._events)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"line {mark.line + 1}: " if mark is not None else ""
            raise LabelFileError(
                f"{place}not YAML: {error.problem or error.context}; was the file cut short?"
            ) from error
        except (yaml.YAMLError, UnicodeError) as error:
            raise LabelFileError(f"not YAML: {error}") from error

    def top(self) -> Any:
        """Return the first event of the document's content."""
        event = self.next()
        while isinstance(event, yaml.StreamStartEvent | yaml.DocumentStartEvent):
            event = self.next()
        return event

    def skip(self, event: Any) -> None:
        """Consume the rest of the node that an event begins."""
        depth = 0
        while True:
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth == 0:
                return
            event = self.next()

    def value(self, event: Any) -> str | list[str] | None:
        """Consume the node that an event begins. Return a text or a list of texts; None for anything else."""
        if isinstance(event, yaml.ScalarEvent):
            is_null = not event.style and event.value in _NULLS
            return None if is_null else str(event.value)
        if not isinstance(event, yaml.SequenceStartEvent):
            self.skip(event)
            return None
        found = []
        while not isinstance(event := self.next(), yaml.SequenceEndEvent):
            if isinstance(event, yaml.ScalarEvent):
                found.append(str(event.value))
            else:
                self.skip(event)
        return found

    def mapping(self) -> Fields:
        """Return the fields of a mapping whose start event has been consumed."""
        found: Fields = {}
        while not isinstance(event := self.next(), yaml.MappingEndEvent):
            key = self.value(event)
            value = self.value(self.next())
            if isinstance(key, str) and value is not None:
                found[key] = value
        return found


def _pairs(events: _Events) -> Iterator[tuple[str, Any]]:
    """Yield the keys of the document, each with the first event of its value, which the caller must consume."""
    top = events.top()
    if not isinstance(top, yaml.MappingStartEvent):
        raise LabelFileError("not a TagPack: expected fields like `title:` and `tags:`")
    while not isinstance(event := events.next(), yaml.MappingEndEvent):
        key = events.value(event)
        yield key if isinstance(key, str) else "", events.next()


def _header(events: _Events) -> Fields:
    found: Fields = {}
    has_tags = False
    for key, event in _pairs(events):
        if key == "tags":
            has_tags = True
            events.skip(event)
        elif key == "header" and isinstance(event, yaml.MappingStartEvent):
            found |= events.mapping()
        elif key == "header":
            raise LabelFileError(
                f"line {event.start_mark.line + 1}: `header` includes another file, which is not followed: write its "
                "fields here"
            )
        elif (value := events.value(event)) is not None:
            found[key] = value
        if key == "actors":
            raise LabelFileError("this is an ActorPack: it has no addresses")
    if not has_tags:
        raise LabelFileError("not a TagPack: it has no `tags:`")
    return found


def _tags(events: _Events) -> Iterator[tuple[int, Fields | str]]:
    """Yield the line of each tag with its fields, or with a fault."""
    for key, event in _pairs(events):
        if key != "tags" or not isinstance(event, yaml.SequenceStartEvent):
            events.skip(event)
            continue
        while not isinstance(start := events.next(), yaml.SequenceEndEvent):
            line = start.start_mark.line + 1
            if isinstance(start, yaml.MappingStartEvent):
                yield line, events.mapping()
            else:
                events.skip(start)
                yield line, "not a tag: expected fields like `address:` and `label:`"
