"""The sources of transactions, one package each. `whaled/source.py` describes what a source has to provide.

Only `service` imports a source, to wire it: detection and backfill work with the values of `whaled/source.py`.
"""
