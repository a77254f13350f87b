"""Kernels compiled ahead of time, one file of machine code (a cubin) for each variant and architecture.

    python -m vqserve_server.search.cuda.cubins DIR [ARCHITECTURE ...]

compiles them into a folder, on any machine that has Triton, without a GPU. An index in the folder says what they were
compiled from: files that were made from other sources are not loaded. Compiling needs this file, `kernels.py` and
`variants.py`, and neither torch nor the rest of the server: the Dockerfile has a stage for it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from vqserve_server.search.cuda.variants import ARCHITECTURES, Variant, all_variants

# Where an installation has them.
FOLDER = Path(__file__).with_name("compiled")
_INDEX = "index.json"
_FORMAT = 1
_SOURCES = ("kernels.py", "variants.py")
# From here on Triton compiles for exactly one architecture ("sm_90a"), whose instructions no later one has.
_FIRST_EXACT = 90


class Unusable(Exception):
    """There are no cubins for a device; the text says why."""


@dataclass(frozen=True)
class Cubin:
    """One compiled variant.

    Attributes:
        name: name of the variant.
        architecture: compute capability without the dot, such as 90.
        file: file in the folder.
        sha256: of its content.
        entry: name of the function in it.
        arguments: Triton's types of its arguments, in order, without those that were fixed when it was compiled.
        warps: warps of a block.
        shared: bytes of shared memory of a block.
    """

    name: str
    architecture: int
    file: str
    sha256: str
    entry: str
    arguments: list[str]
    warps: int
    shared: int


Index: TypeAlias = list[Cubin]


def source_hash() -> str:
    """Return the SHA-256 of what decides how kernels are compiled: their source and the table of variants."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


def build(folder: Path, architectures: Iterable[int] = ARCHITECTURES) -> list[Cubin]:
    """Compile every variant for the architectures into a folder, which is made.

    Raises:
        RuntimeError: a kernel needs what `driver.py` does not give it.
    """
    import triton  # noqa: PLC0415

    found = []
    for architecture in architectures:
        (folder / f"sm_{architecture}").mkdir(parents=True, exist_ok=True)
        for variant in all_variants(architecture):
            compiled = compile_variant(variant)
            path = folder / f"sm_{architecture}" / f"{variant.name}.cubin"
            path.write_bytes(compiled.asm["cubin"])
            found.append(_describe(variant, compiled, path.relative_to(folder).as_posix()))
    index = {"format": _FORMAT, "source": source_hash(), "triton": triton.__version__}
    index["cubins"] = [asdict(one) for one in found]
    (folder / _INDEX).write_text(f"{json.dumps(index, indent=1)}\n")
    return found


def compile_variant(variant: Variant) -> Any:
    """Compile a variant and return Triton's `CompiledKernel`: its metadata, and in `asm` what each step made."""
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    from vqserve_server.search.cuda import kernels  # noqa: PLC0415

    function = getattr(kernels, variant.kernel)
    types = dict(variant.signature)
    signature = {name: types[name].partition(":")[0] if name in types else "constexpr" for name in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", int(types[name].partition(":")[2])]]
        for i, name in enumerate(function.arg_names)
        if ":" in types.get(name, "")
    }
    source = ASTSource(function, signature, constexprs=dict(variant.constants), attrs=aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    # Without the paths of the sources, which differ from machine to machine.
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        return triton.compile(source, target=GPUTarget("cuda", variant.architecture, 32), options=options)


def _describe(variant: Variant, compiled: Any, file: str) -> Cubin:
    metadata = compiled.metadata
    needs = (metadata.global_scratch_size, metadata.profile_scratch_size, metadata.num_ctas - 1)
    if any(needs) or metadata.launch_cooperative_grid or metadata.launch_pdl or metadata.tensordesc_meta:
        raise RuntimeError(f"{variant.name} needs scratch memory, clusters or descriptors, which no launch provides")
    return Cubin(
        name=variant.name,
        architecture=variant.architecture,
        file=file,
        sha256=hashlib.sha256(compiled.asm["cubin"]).hexdigest(),
        entry=metadata.name,
        arguments=[kind.partition(":")[0] for _, kind in variant.signature],
        warps=metadata.num_warps,
        shared=metadata.shared,
    )


def read_index(folder: Path) -> Index:
    """Return what a folder has.

    Raises:
        Unusable: nothing, or kernels that were made from other sources.
    """
    try:
        content = json.loads((folder / _INDEX).read_text())
    except FileNotFoundError:
        raise Unusable("this installation has no compiled kernels") from None
    except (OSError, ValueError) as error:
        raise Unusable(f"the index of the compiled kernels cannot be read: {error}") from error
    if not isinstance(content, dict) or (content.get("format"), content.get("source")) != (_FORMAT, source_hash()):
        raise Unusable("the compiled kernels were made from other sources than these: compile them again")
    return [Cubin(**entry) for entry in content["cubins"]]


def cubins_for(index: Index, capability: tuple[int, int], architecture: int) -> list[Cubin]:
    """Return the cubins of an architecture, whose code a device can run.

    Args:
        index: all cubins.
        capability: the device's compute capability.
        architecture: that of the variants that a search on this device uses.

    Raises:
        Unusable: there are none, or the device cannot run them.
    """
    found = [one for one in index if one.architecture == architecture]
    if not found or not _runs(architecture, capability):
        raise Unusable(f"there are no compiled kernels for compute capability {capability[0]}.{capability[1]}")
    return found


def read(cubin: Cubin, folder: Path) -> bytes:
    """Return the machine code of a cubin.

    Raises:
        Unusable: the file is missing or has another content.
    """
    try:
        content = (folder / cubin.file).read_bytes()
    except OSError as error:
        raise Unusable(f"a compiled kernel cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest() != cubin.sha256:
        raise Unusable(f"the compiled kernel {cubin.file} is damaged")
    return content


def _runs(architecture: int, capability: tuple[int, int]) -> bool:
    """Return whether a device runs machine code of an architecture: that of its own major version, up to its minor."""
    own = 10 * capability[0] + capability[1]
    if architecture >= _FIRST_EXACT:
        return own == architecture
    return architecture // 10 == capability[0] and architecture <= own


def main(arguments: list[str]) -> int:
    """Compile into the folder that the first argument names; return the exit code."""
    known = [str(one) for one in ARCHITECTURES]
    if not arguments or not set(arguments[1:]) <= set(known):
        print(f"usage: python -m vqserve_server.search.cuda.cubins DIR [{'|'.join(known)} ...]", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    made = build(folder, [int(one) for one in arguments[1:] or known])
    size = sum((folder / one.file).stat().st_size for one in made)
    print(f"{len(made)} kernels, {size / 1e6:.1f} MB, in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
