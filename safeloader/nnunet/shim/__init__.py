"""The folder that `nnUNet_extTrainer` names: see `safeloader.nnunet.install`."""
