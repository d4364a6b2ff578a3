"""What bench.py calls: how it measures, the workloads, and the peers. Read it when you measure speed or memory.

    measure.py      alternating pairs, memory, operations, versions and device of a figure
    gpu.py          all that needs a GPU, in nine minutes
    scale.py        8 to 512 GPUs and 100,000 hours, calculated from measured pieces
    checkouts.py    two checkouts against each other: what got slower
    live.py         many conversations at once with serve.py, in real time
    peers.py        small models of each family, ours and the peers'
    workloads.py    a training step, a generation; the minimum work of each
"""
