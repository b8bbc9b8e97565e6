"""Leads nnU-Net to SafeLoader's trainer. Written by `safeloader install`; `safeloader install --uninstall` removes it.

nnU-Net imports every module in its search path until one has the class that `-tr` names. This one imports
SafeLoader only if it is asked for SafeLoader's trainer, so it can't break the search for any other.
"""


def __getattr__(name: str) -> type:
    if name != "nnUNetTrainerSafeLoader":
        raise AttributeError(name)
    from safeloader.nnunet.trainer import nnUNetTrainerSafeLoader

    return nnUNetTrainerSafeLoader
