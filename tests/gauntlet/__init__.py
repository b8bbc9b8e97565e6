"""Every kind of data that nnU-Net trains on, with every class of fault thrown at it: `python -m tests.gauntlet`.

    __main__.py   the options, and the order of things
    trainer.py    the trainer: deterministic, short, and obedient to orders
    orders.py     what both processes know of each other: names of variables, and orders
    faults.py     what is thrown at a training, and what proves that it struck
    training.py   nnU-Net's own `nnUNetv2_train` of one kind, watched to its end
    outcome.py    two trainings compared: Dice, summary, weights, batches
    table.py      what is shown

Each kind is trained twice with the same seed: undisturbed, and with the faults. Both must end with nnU-Net's own
`summary.json`, and everything in them must be equal. A fault that did not strike is a failure as well.
"""
