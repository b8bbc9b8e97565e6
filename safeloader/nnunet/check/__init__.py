"""What `safeloader check` does before a long training.

cases.py       what is wrong with one preprocessed case, if anything
inspection.py  all cases, read by processes that may die of them      reader.py  what runs in those processes
ledger.py      which cases were found good, so that a check goes on where it was
batches.py     real batches: time and memory of a worker, and how many workers to take
"""
