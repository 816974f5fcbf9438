"""Access tokens of trusted issuers (OpenID Connect, OAuth 2.0): their keys, and what a token grants.

Keys are fetched in the background; a verification never waits for the network.
"""
