"""What exports a validation's predictions, in processes that may die or hang.

    pool.py      decides who does what next, and what a death leads to; the pool that nnU-Net's method is given
    job.py       one call: where it stands, and what it has cost
    process.py   one export process as the trainer sees it, and what the two say to each other
    worker.py    what runs in it
    call.py      a function that is to be called there, and what the names of its parameters tell
    outputs.py   its files: written in a folder of their own, then moved to their place
    records.py   deaths and final errors in words
    standin.py   what stands for `multiprocessing` in nnU-Net's modules
    ledger.py    which cases are exported already, with which weights

Nothing here imports nnU-Net.
"""
