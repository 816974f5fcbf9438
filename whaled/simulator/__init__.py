"""A simulated mempool.space backend over a simulated Bitcoin node, for the demo, the tests and the measurements.

In: `SimulatorSettings`, calls on a `World`, faults by call or by `POST /simulator/fault`, and client messages. Out: the
backend's WebSocket stream and REST API (in esplora mode also electrs's), and the ground truth of every transaction. It
owns the simulated node (mempool, chain, wallets), the backend process that polls it, and the random sources.
It never connects to another host, writes no files, and shares no code with the client side (whaled.sources), so that
an error in one is not hidden by the same error in the other.
"""
