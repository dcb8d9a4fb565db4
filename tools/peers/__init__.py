"""What others wrote, built beside ours with the same weights: one file for each of PEERS in tools/against.py.

Each file has URL; FILE, by which a checkout is known; PACKAGE, if it can be installed instead; and
`works(folder)`: the works to time, as Work. Only the network's own files are imported: what these import
without need for it (JAX) is replaced by an empty module, in plain sight.
"""
