"""Label files of others, read into rows of an address book: BIP 329, GraphSense TagPacks, WalletExplorer."""
