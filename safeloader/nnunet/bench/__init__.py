"""What bounds a training: measured on the user's own dataset, for `safeloader bench`.

measured.py     the numbers
one_worker.py   what one worker needs for a batch: reading, decompressing, transforming
pools.py        what all workers make together, with the stock class and with SafeLoader
network.py      what the network takes, measured in a process of its own
steps.py        that process
verdict.py      what the numbers say; pure
"""
