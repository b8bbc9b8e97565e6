"""Leads nnU-Net to SafeLoader's trainers. Written by `safeloader install`; `safeloader install --uninstall` removes it.

nnU-Net imports every module in its search path until one has the class that `-tr` names. This one imports
SafeLoader only if it is asked for a trainer with SafeLoader in its name, so it can't break the search for any other.
"""


def __getattr__(name: str) -> type:
    if "SafeLoader" not in name:
        raise AttributeError(name)
    import safeloader.nnunet.named
    import safeloader.nnunet.trainer

    if name == "nnUNetTrainerSafeLoader":
        return safeloader.nnunet.trainer.nnUNetTrainerSafeLoader
    return safeloader.nnunet.named.answer(name)
