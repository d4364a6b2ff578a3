"""What bench.py calls: how things are measured, what is measured, and the peers beside us.

    measure.py      alternating pairs, memory, operations, where a figure comes from
    peers.py        small models of each family, ours and the peers'
    workloads.py    a training step, a generation; the work each needs at least
"""
