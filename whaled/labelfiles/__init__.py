"""Importers that convert label files (BIP 329, GraphSense TagPack, WalletExplorer) into rows of an address book."""
