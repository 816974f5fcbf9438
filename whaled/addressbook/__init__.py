"""The operator's address book, and the conversion of other label files into one.

In: the files that `detection.address_book` names; label files (BIP 329, GraphSense TagPack, WalletExplorer).
Out: an `AddressBook` of `whales/`, rows of a new book, or faults with file and line.
State: none. A separate process reads a large book and ends with its result.
It never decides what a label means for a whale, and never writes a file that the configuration names.
"""
