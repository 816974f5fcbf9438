"""Authentication: tokens, signing keys, and the files and texts that contain them.

What enters: credentials from clients, the key ring's file or a secret from the environment, and commands that issue
tokens or rotate keys. What leaves: grants (`tokens.TokenAuthenticator`), or TokenError with the reason for the logs;
new tokens; key rings. State: the key ring in force and, in memory only, the families of refreshed tokens
(`families`). This package never sends anything to a client, never limits the rate of failures (`gateway` does), never
logs a secret, and never lets a token choose its algorithm.
"""
