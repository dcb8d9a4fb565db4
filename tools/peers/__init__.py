"""What others wrote, built beside ours with the same weights: one file for each of PEERS in tools/against.py.

Each file has `FILES`, of which a checkout holds the first (or a package by that name is installed), and
`works(folder)`: the works to time, as Work. Only the network's own files are imported: what these import
without need for it (JAX) is replaced by an empty module, in plain sight.
"""
