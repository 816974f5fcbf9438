"""Whales: recognition, description, outcomes, and the client filters that select them.

What enters: transactions, the market, the address book's lines, and a client's filter as JSON. What leaves: alerts
(`detect`), drafts of events (`lifecycle`, `conflicts`), tables of owners (`books`, `owners`), and whether an
event passes a filter (`filters`). State: only the detector's bounded memory of the transactions that it has examined;
an address book and its rules are immutable, and a reload replaces them. This package never reads a socket, file or
clock and never writes to the event log: its callers pass in everything, and append the drafts.
"""
