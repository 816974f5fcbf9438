"""Authentication: tokens, signing keys, and the files and texts that contain them.

What enters: credentials from clients, the key ring's file or a secret from the environment, and commands that issue
tokens, revoke them or rotate keys. What leaves: grants (`gate.Gate`), or TokenError with the reason for the logs; new
tokens; key rings. State: the key ring in force; in memory only, the families of refreshed tokens (`families`); in the
access database (`store`), revocations, the register of issued tokens and the audit log. This package never sends
anything to a client, never limits the rate of failures (`gateway` does), never logs a secret, and never lets a token
choose its algorithm.
"""
