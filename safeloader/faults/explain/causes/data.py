"""R2: the preprocessed data can't be read."""

from __future__ import annotations

from typing import Final

from safeloader.faults.explain.model import Cause, Sign, Weight

_READING: Final = r":load_case$|:load_pickle$|:load_and_combine|lib[/\\]npyio|_npyio_impl|blosc2|:generate_train_batch$"
_RETRIES: Final = (
    "SafeLoader reads the case again, later and later. If it stays unreadable it is quarantined loudly (at most 5 % of "
    "the cases), and its name is in the log."
)
_ANEW: Final = (
    "Otherwise preprocess anew: delete `$nnUNet_preprocessed/DATASET/nnUNetPlans_CONFIG` and run `nnUNetv2_preprocess "
    "-d DATASET -c CONFIG`."
)

CAUSES: Final = (
    Cause(
        key="data-corrupt",
        group="R2",
        title="A preprocessed file is truncated or corrupt",
        what=(
            "A worker could not make sense of a file of a case. Usually it was written only in part: preprocessing or "
            "unpacking was interrupted, the disk was full, or another training of the same dataset is unpacking it now."
        ),
        remedy=(
            "If the dataset has .npz files, the .npy files are copies of them: "
            "`find $nnUNet_preprocessed/DATASET -name '*.npy' -delete`, then train again. Don't start two trainings of "
            'it before the first says "unpacking done".',
            _ANEW,
            "Make sure that there was room: `df -h $nnUNet_preprocessed`.",
        ),
        safeloader=_RETRIES,
        signs=(
            Sign("mmap length is greater than file size"),
            Sign("No data left in file"),
            Sign("EOF: reading array"),
            Sign("Ran out of input", within=_READING),
            Sign("pickle data was truncated"),
            Sign("invalid load key", within=_READING),
            Sign("BadZipFile"),
            Sign("Bad CRC-32"),
            Sign("while decompressing data"),
            Sign("cannot mmap an empty file"),
            Sign("blosc2_schunk_open_offset", sure=False),
            Sign("Error while getting the slice", sure=False),
            Sign("cannot reshape array of size", within=r"_?format(?:_impl)?\.py"),
            Sign("Cannot load file containing pickled data when allow_pickle=False", within=_READING),
            Sign("Failed to interpret file"),
        ),
        sources=("nnUNet#2581", "nnUNet#2626", "nnUNet#1879", "nnUNet#1628"),
        unless=("disk-full", "storage-failed"),
    ),
    Cause(
        key="storage-failed",
        group="R2",
        title="The storage failed while data was read",
        what=(
            "The file system answered with an error: a network file system (NFS, FUSE, SMB) that lost its server, or a "
            "disk that is dying. The files themselves may be all right."
        ),
        remedy=(
            "Ask the kernel: `sudo dmesg -T | grep -iE 'nfs|fuse|i/o error|stale'`, and look whether the files can be "
            "read now: `cat FILE > /dev/null`.",
            "Copy the preprocessed data to a local disk of the node before training: `rsync -a "
            "$nnUNet_preprocessed/DATASET $TMPDIR/` and `export nnUNet_preprocessed=$TMPDIR`. Then continue with "
            "`--c`.",
        ),
        safeloader=(
            "SafeLoader reads again, later and later; if many cases fail at once it takes it for an outage and waits "
            "(up to an hour) instead of giving up."
        ),
        signs=(
            Sign("Input/output error", regex=r"Errno 5\]|Input/output error:"),
            Sign("Stale file handle"),
            Sign("Transport endpoint is not connected"),
            Sign("Remote I/O error"),
            Sign("Host is down", regex=r"Errno 112"),
            Sign("Connection timed out", regex=r"OSError.*Errno 110"),
            Sign("fuse: writeMessage"),
            Sign("ReadFile: operation canceled"),
            Sign("blk_update_request: I/O error"),
            Sign("nfs: server", regex=r"not responding", weight=Weight.HINT, sure=False),
        ),
        sources=("nnUNet#1784", "nnUNet#1254", "nnUNet#1128"),
        unless=("disk-full",),
    ),
    Cause(
        key="data-missing",
        group="R2",
        title="A file of the dataset is missing, or may not be read",
        what="A file that nnU-Net expects in the dataset's folder is not there for this user on this machine.",
        remedy=(
            "See whether it is there: `ls -l FILE` as the same user on the same node. In a container the folder must "
            "be mounted, and nnUNet_raw, nnUNet_preprocessed and nnUNet_results must name the paths inside.",
            "If permission is denied in the middle of a training, a login ticket of the file system may have ended "
            "(Kerberos: `klist`, AFS: `tokens`).",
            _ANEW,
        ),
        safeloader=_RETRIES,
        signs=(
            Sign("No such file or directory", regex=r"nnUNet_?(?:preprocessed|raw|Plans)"),
            Sign("No such file or directory", regex=r"FileNotFoundError", within=_READING),
            Sign("Permission denied", regex=r"nnUN[eE]t|\.(?:npy|npz|b2nd|pkl|nii\.gz)'"),
            Sign("Message for the error 5"),
        ),
        sources=("nnUNet#227", "nnUNet#2882", "nnUNet#2723", "nnUNet#560"),
        unless=("storage-failed", "compile-no-compiler"),
    ),
    Cause(
        key="data-other-version",
        group="R2",
        title="The preprocessed data was made by another version of nnU-Net",
        what="The properties of a case lack what this version of nnU-Net looks for.",
        remedy=("Preprocess again with the version that trains: `nnUNetv2_plan_and_preprocess -d DATASET`.",),
        safeloader="It fails with SafeLoader as well, and names the case.",
        signs=(Sign("'class_locations'", regex=r"KeyError|^ 'class_locations'"),),
        sources=("nnUNet#291",),
    ),
    Cause(
        key="bus-error",
        group="R2",
        title="A process was killed by a bus error (SIGBUS)",
        what=(
            "It touched memory that has no storage behind it: a memory-mapped file became shorter or its file system "
            "failed while it was read, or /dev/shm was full. The log does not say which."
        ),
        remedy=(
            "Look at /dev/shm: `df -h /dev/shm` (Docker's default is 64 MiB: `docker run --ipc=host`).",
            "Look whether files of the preprocessed data changed during the training, or their storage failed: `sudo "
            "dmesg -T | tail -50`.",
        ),
        safeloader="SafeLoader replaces the worker, makes its batch again, and needs no /dev/shm.",
        signs=(Sign("Bus error", sure=False), Sign("SIGBUS", regex=r"^(?!.*SafeLoader)", sure=False)),
        sources=("nnUNet#398",),
        unless=("shm-full", "data-corrupt", "storage-failed"),
    ),
)
