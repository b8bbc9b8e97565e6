"""R1, first half: torch.compile fails in the training process, and the workers are blamed."""

from __future__ import annotations

from typing import Final

from safeloader.faults.explain.model import ANY_ERROR, Cause, Sign

WITHOUT: Final = "Train without it at once: `nnUNet_compile=F nnUNetv2_train …` (slower on most GPUs, same results)."
"""The first step of every remedy but one."""
_SAFELOADER: Final = (
    "With a trainer of SafeLoader (`-tr nnUNetTrainerSafeLoader`), the same batch is computed again without "
    "torch.compile, and training goes on."
)
BUILDING: Final = (
    # Only while code is built: compiled code that fails later has frames of torch._inductor as well.
    r"_inductor[/\\](?:codegen|scheduler|graph|cpp_builder|cpu_vec_isa|async_compile|compile_worker)"
    r"|compile_fx\.py:(?:compile_fx|_?fx_codegen_and_compile|_compile_fx_inner|inner_compile|codegen_and_compile)"
    r"|triton[/\\](?:runtime[/\\]build|compiler|common[/\\]build)"
    r"|_dynamo[/\\]backends[/\\]common\.py:_wrapped_bw_compiler"
)
"""Frames, as `path:function`, that are there only while torch.compile builds code."""
CACHE: Final = (
    r"_inductor[/\\](?:runtime[/\\]cache_dir_utils|codecache\.py:(?:write|write_atomic|cache_dir|_get_tmp_dir\w*)$)"
    r"|triton[/\\]runtime[/\\]cache"
)
"""Frames in which torch.compile makes or writes its folders."""
_WORDS: Final = (
    "nnU-Net compiles the network with torch.compile by default, at the first batch of the first epoch. Building the "
    "code failed"
)

CAUSES: Final = (
    Cause(
        key="compile-no-compiler",
        group="R1",
        title="torch.compile found no C or C++ compiler",
        what=f"{_WORDS}, because there is no working compiler on this machine or in this container.",
        remedy=(
            WITHOUT,
            "Or install a compiler: `sudo apt install build-essential` (conda: `conda install -c conda-forge gxx`; "
            "cluster: `module load gcc`). If CC or CXX are set, `$CC --version` must work.",
        ),
        safeloader=_SAFELOADER,
        signs=(
            Sign("InvalidCxxCompiler"),
            Sign("No working C++ compiler found"),
            Sign("Failed to find C compiler"),
            Sign("Failed to find C++ compiler"),
            Sign("Compiler: ", regex=r"Compiler: \S+ is not found"),
            Sign("FileNotFoundError", within=r"triton[/\\](?:runtime|common)[/\\]build"),
            Sign("cannot execute", regex=r"(?:gcc|cc1|cc1plus|g\+\+).*cannot execute"),
        ),
        sources=("nnUNet#2306", "nnUNet#2749"),
    ),
    Cause(
        key="compile-no-python-headers",
        group="R1",
        title="torch.compile found no Python headers (Python.h)",
        what=f"{_WORDS}: the compiler is there, the header files of this Python are not.",
        remedy=(
            WITHOUT,
            "Or install the headers: `sudo apt install gcc python3-dev` (for the Python that runs nnU-Net, for example "
            "python3.10-dev; with `dnf`: python3-devel). Without root: a conda Python brings its own headers.",
        ),
        safeloader=_SAFELOADER,
        signs=(
            Sign("Python.h: No such file"),
            Sign("include file 'Python.h' not found"),
            Sign("pyconfig.h", regex=r"pyconfig\.h:\d+:\d+: fatal error"),
        ),
        sources=("nnUNet#2398", "nnUNet#2769"),
    ),
    Cause(
        key="compile-no-libcuda",
        group="R1",
        title="torch.compile could not link with libcuda.so",
        what=f"{_WORDS}: the compiler is there, but the linker does not find the CUDA driver's library libcuda.so.",
        remedy=(
            WITHOUT,
            "Or let the linker find it: `ldconfig -p | grep libcuda`. If only libcuda.so.1 is there: `sudo ln -s "
            "/lib/x86_64-linux-gnu/libcuda.so.1 /lib/x86_64-linux-gnu/libcuda.so && sudo ldconfig`. Without root: "
            "`export TRITON_LIBCUDA_PATH=DIR` with a folder that holds that link.",
        ),
        safeloader=_SAFELOADER,
        signs=(
            Sign("libcuda.so cannot found"),
            Sign("cannot find -lcuda"),
            Sign("libcuda.so", regex=r"libcuda\.so(?:\.1)?: cannot open shared object"),
        ),
        sources=("nnUNet#2164", "nnUNet#2576", "nnUNet#1533"),
    ),
    Cause(
        key="compile-no-triton",
        group="R1",
        title="torch.compile found no working Triton",
        what=f"{_WORDS}: Triton, which generates the GPU's code, is missing, too old, or not made for this platform.",
        remedy=(
            WITHOUT,
            "Or install PyTorch again with the command of https://pytorch.org (its Linux packages bring the Triton "
            "that fits); `python -c 'import triton; print(triton.__version__)'` must work. Windows has no Triton.",
        ),
        safeloader=_SAFELOADER,
        signs=(
            Sign("Cannot find a working triton installation"),
            Sign("TritonMissing"),
            Sign("No module named 'triton'", regex=r"ModuleNotFoundError|ImportError"),
        ),
        sources=("nnUNet#2115", "triton#3708"),
    ),
    Cause(
        key="compile-old-compiler",
        group="R1",
        title="torch.compile found a compiler that is too old",
        what=f"{_WORDS}: the compiler does not understand the C code that Triton wrote.",
        remedy=(
            WITHOUT,
            "Or use a newer compiler: `module load gcc`, or `conda install -c conda-forge gxx` and `export CC=$(which "
            "x86_64-conda-linux-gnu-gcc)`.",
        ),
        safeloader=_SAFELOADER,
        signs=(Sign("loop initial declarations are only allowed in C99"), Sign("use option -std=c99")),
        sources=("nnUNet#2203",),
    ),
    Cause(
        key="compile-no-cache",
        group="R1",
        title="torch.compile can't write the folder in which it keeps what it builds",
        what=(
            "torch.compile keeps what it builds in a folder, which can't be made or written, or is on a full disk. "
            "A recent PyTorch asks for the folder as soon as nnU-Net imports it, whether anything is compiled or not."
        ),
        remedy=(
            "Name a folder that you may write, on a disk that has room: `export TORCHINDUCTOR_CACHE_DIR=FOLDER "
            "TRITON_CACHE_DIR=FOLDER/triton` (without them: /tmp/torchinductor_USER and ~/.triton).",
        ),
        safeloader=_SAFELOADER,
        signs=(Sign("[Errno ", regex=r"Error: \[Errno (?:1|2|13|17|20|28|30|122)\]", within=CACHE),),
    ),
    Cause(
        key="compile-old-gpu",
        group="R1",
        title="torch.compile needs a newer GPU",
        what=f"{_WORDS}: Triton, which generates the GPU's code, needs one of compute capability 7.0 (Volta) or newer.",
        remedy=(WITHOUT, "Or train on a newer GPU: on this one nothing else helps."),
        safeloader=_SAFELOADER,
        signs=(Sign("GPUTooOldForTriton"), Sign("too old to be supported by the triton GPU compiler")),
    ),
    Cause(
        key="compile-no-ptxas",
        group="R1",
        title="torch.compile could not assemble the GPU's code (ptxas)",
        what=f"{_WORDS}: ptxas, the GPU's assembler, is not there, or does not know this GPU.",
        remedy=(
            WITHOUT,
            "Or install PyTorch again with the command of https://pytorch.org (its Triton brings a ptxas), or name "
            "one of a CUDA that knows this GPU: `export TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas`.",
        ),
        safeloader=_SAFELOADER,
        signs=(
            Sign("PTXASError"),
            Sign("Cannot find ptxas"),
            Sign("ptxas fatal"),
            Sign("ptxas: ", regex=r"ptxas: (?:not found|No such file|Permission denied)"),
        ),
    ),
    Cause(
        key="compile-failed",
        group="R1",
        title="torch.compile failed in the training process",
        what=f"{_WORDS}; the quoted lines are all that the log says about the reason.",
        remedy=(
            WITHOUT,
            "If that trains, it was the compiler: look for lines of gcc or ld above the traceback, or set "
            "`TORCHDYNAMO_VERBOSE=1` and run again.",
        ),
        safeloader=_SAFELOADER,
        signs=(
            Sign("BackendCompilerFailed"),
            Sign("InductorError"),
            Sign("CppCompileError"),
            Sign("C++ compile error"),
            Sign("CalledProcessError", regex=r"/(?:gcc|cc|g\+\+|clang|ptxas|\w*cc\.sh)'|/main\.c'|cuda_utils"),
            Sign("torch._dynamo.exc."),
            Sign("triton.compiler.errors."),
            Sign("Error", regex=ANY_ERROR, within=BUILDING),
        ),
        sources=("nnUNet#2712", "nnUNet#1898", "nnUNet#2330"),
        unless=(
            "compile-no-compiler",
            "compile-no-python-headers",
            "compile-no-libcuda",
            "compile-no-triton",
            "compile-old-compiler",
            "compile-no-cache",
            "compile-old-gpu",
            "compile-no-ptxas",
            "gpu-out-of-memory",
            "gpu-setup",
            "gpu-lost",
            "label-out-of-range",
            "device-assert",
            "disk-full",
        ),
    ),
)
