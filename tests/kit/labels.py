"""Label files of other programs, as texts."""

from pathlib import Path

from kit.books import address

A, B, C, D = (address(number) for number in range(4))
KEY = "0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798"
TXID = "f91d0a8a78462bc59398f2c5d7a84fcff491c26ba54c4833478b202796c8aafd"
# As the test vectors of BIP 329, with what wallets add.
BIP329 = f"""{{ "type": "tx", "ref": "{TXID}", "label": "Transaction", "origin": "wpkh([d34db33f/84'/0'/0'])" }}
{{ "type": "addr", "ref": "{A}", "label": "Cold, \\"old\\"", "origin": "wpkh([d34db33f/84'/0'/0'])" }}
{{"type":"addr","ref":"{B}","label":"Rent\\u2028 \\u00fcber\\nmonth","keypath":"/1/123","heights":[800000,800001]}}
{{ "type": "addr", "ref": "{C}", "label": "" }}
{{ "type": "addr", "ref": "{C}" }}
{{ "type": "pubkey", "ref": "{KEY}", "label": "#1 key" }}
{{ "type": "pubkey", "ref": "{KEY[2:]}", "label": "x-only" }}
{{ "type": "input", "ref": "{TXID}:0", "label": "Input" }}
{{ "type": "output", "ref": "{TXID}:1", "label": "Output", "spendable": false }}
{{ "type": "output", "ref": "{TXID}:2", "label": "Output", "spendable": "false" }}
{{ "type": "xpub", "ref": "xpub661MyMwAqRbcFtXgS5sYJABqqG9YLmC4Q1Rdap9gSE8Nqtw", "label": "Extended" }}
{{ "type": "silent", "ref": "sp1", "label": "of a later version" }}

{{ "type": "addr", "ref": "{A[:-1]}z", "label": "mistyped" }}
{{ "type": "addr", "ref": 7, "label": "a number" }}
{{ "type": "addr", "ref": "{D}", "label": "no end
"""
# As packs of the public repository look.
TAGPACK = f"""title: Example wallets
creator: Somebody
description: >
  Wallets that an exchange
  published
confidence: service_data
category: exchange
source: https://exchange.example/proof
lastmod: 2022-11-16
is_cluster_definer: true
tags:
- address: '{A}'
  currency: BTC
  label: 'Exchange: reserve #1'
- address: {B}
  label: "Pool, old"
  currency: BTC\x20
  category: miner
  source: https://pool.example/list#main
  lastmod: '2019-08-06'
  confidence: forensic
- label: Mixer
  address: {C}
  currency: BTC
  category: ~
  concepts:
  - sanction
  - mixing_service
  context: '{{"validated": true}}'
- address: '0xbe0eb53f46cd790cd13851d5eff43d12404d33e8'
  currency: ETH
  label: reserve ETH
- tx_hash: {TXID}
  currency: BTC
  label: a transaction
- address: {D}
  currency: BTC
- address: {D}
  label: without a currency
- address: {D[:-1]}z
  currency: BTC
  label: mistyped
- just a text
label: Exchange
"""
WALLETEXPLORER = f""""#Wallet Huobi.com. Updated to block 523401"
address,balance,incoming txs,last used in block
{A},0.,4,520000
{B},1.5,2,521000
"#Wallet Huobi.com-2 (00004f8abc). Updated to block 523402 (2018-05-20 13:07:31)"
address,balance,incoming txs,last used in block
{C},0.00000001,1,

{C[:-1]}z,0,1,1
"""


def written(directory: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = directory / name
    path.write_bytes(text.encode(encoding))
    return path
