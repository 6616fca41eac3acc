"""Compiles every Triton kernel of the zoo for Hopper (sm_90), without a GPU, and reports what the compiler made of it.

    python benchmarks/compile_triton.py          # writes benchmarks/results/triton_sm90.json

What counts for speed and can be read off the machine code: registers per thread and the programs that therefore fit on
one multiprocessor, bytes of local memory, accesses to it inside loops (spills that cost time), and per turn of a loop
(one step of 16 channels; in the selective scan 4 steps) the instructions, those of the special function unit (exp2,
reciprocals), shuffles, vectorised loads and tensor core products. These are counts, not times.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RESULTS = Path(__file__).parent / "results"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SM_REGISTERS, SM_WARPS, SM_PROGRAMS = 65536, 64, 32  # of one Hopper multiprocessor
ACTIVATIONS = {  # the other tensors are float32 when they reach a kernel
    "selective_scan": {"x", "u", "dt", "z", "dy", "y", "du", "ddt", "dz"},
    "wkv7": {"r", "w", "k", "v", "a", "b", "dy", "y", "dv"},
    "ssd": {"x", "B", "C", "M", "dy", "y", "dx"},
}
SIZES = ("D", "H", "G", "V", "slab_rows")


@dataclass(frozen=True)
class Variant:
    """One specialisation: a kernel, the activations' type, what is absent, and what differs from Mamba-1's sizes."""

    kernel: str
    dtype: str = "bf16"
    absent: tuple[str, ...] = ()
    d_state: int = 16
    softplus: bool = True
    reverse: bool | None = None
    operator: str = "selective_scan"

    @property
    def kernels(self) -> Any:
        """The module with the operator's kernels."""
        return importlib.import_module(f"zoo.kernels.{self.operator}.triton_kernels")

    def launch_arguments(self) -> dict[str, Any]:
        """What the backend gives its kernels by name."""
        backend = importlib.import_module(f"zoo.kernels.{self.operator}.triton_backend")
        named: dict[str, Any] = backend.launch_arguments(self.d_state, self.softplus)
        return named if self.reverse is None else named | {"REVERSE": self.reverse}

    @property
    def title(self) -> str:
        """Names the variant in the table, by what it has beyond the bare recurrence."""
        words = [self.kernel, self.dtype, f"N={self.d_state}"] + ["reversed"] * bool(self.reverse)
        arguments = getattr(self.kernels, f"{self.kernel}_kernel").arg_names
        words += [f"+{word}" for word, name in PARTS.items() if name in arguments and name not in self.absent]
        return " ".join(words)


PARTS = {"gate": "z", "checkpoints": "checkpoints", "segments": "segment_ids", "slices": "slice_states"}
SLICES = ("slice_states", "slice_decays")
PLAIN = (*SLICES, "segment_ids")
BARE = (*PLAIN, "skip", "z", "dt_bias")
VARIANTS = [
    variant
    for dtype in ("bf16", "fp32")
    for variant in (
        Variant("forward", dtype, (*PLAIN, "checkpoints")),
        Variant("forward", dtype, PLAIN),
        Variant("forward", dtype, SLICES),
        Variant("forward", dtype),
        Variant("backward", dtype, PLAIN),
        Variant("backward", dtype, SLICES),
        Variant("backward", dtype),
        Variant("slice", dtype, ("z",), reverse=False),
        Variant("slice", dtype, reverse=True),
    )
] + [
    Variant("forward", "fp16", PLAIN),
    Variant("backward", "fp16", PLAIN),
    Variant("forward", absent=BARE, softplus=False),
    Variant("backward", absent=BARE, softplus=False),
    *(Variant(kernel, absent=PLAIN, d_state=n) for n in (1, 8, 64) for kernel in ("forward", "backward")),
]


@dataclass(frozen=True)
class Wkv7Variant(Variant):
    """The same for wkv7, whose state per value channel is the K key channels of a head."""

    d_state: int = 64
    operator: str = "wkv7"

    @property
    def title(self) -> str:
        """As above, with the operator's name, because kernels are called alike."""
        return "wkv7 " + super().title.replace("N=", "K=")

    def launch_arguments(self) -> dict[str, Any]:
        """As above; there is no softplus."""
        backend = importlib.import_module("zoo.kernels.wkv7.triton_backend")
        named: dict[str, Any] = backend.launch_arguments(self.d_state)
        return named


WKV7_VARIANTS = [
    *(
        Wkv7Variant(kernel, dtype, absent)
        for dtype in ("bf16", "fp32")
        for kernel, absent in (
            ("forward", ("checkpoints", "segment_ids")),
            ("forward", ("segment_ids",)),
            ("forward", ()),
            ("backward", ("segment_ids",)),
            ("backward", ()),
        )
    ),
    *(
        Wkv7Variant(kernel, absent=("segment_ids",), d_state=keys)
        for keys in (32, 128)
        for kernel in ("forward", "backward")
    ),
]


@dataclass(frozen=True)
class SsdVariant(Variant):
    """The same for ssd, whose kernels compute one chunk of one head, of 64 channels if nothing else is said."""

    d_state: int = 128
    operator: str = "ssd"
    channels: int = 64

    @property
    def title(self) -> str:
        """As above, with the operator's name and the channels of a head."""
        title = f"ssd {super().title} P={self.channels}"
        return title + " +segments" * (self.kernel in ("output", "gradient") and "segments" not in self.absent)

    def launch_arguments(self) -> dict[str, Any]:
        """As above, by dtype; the kernel that passes states on has no products."""
        backend = importlib.import_module("zoo.kernels.ssd.triton_backend")
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.dtype]
        named: dict[str, Any] = backend.launch_arguments(dtype, self.channels, self.d_state)
        if self.kernel == "pass":
            return {
                "SIZE": self.channels * self.d_state, "BLOCK": backend.BLOCK, "REVERSE": self.reverse,
                "num_warps": 4, "enable_fp_fusion": True,
            }  # fmt: skip
        return named


SSD_VARIANTS = [
    *(
        SsdVariant(kernel, dtype, absent)
        for dtype in ("bf16", "fp16", "fp32")
        for kernel, absent in (
            ("state", ()),
            ("output", ("segments",)),
            ("output", ()),
            ("gradient", ("segments",)),
            ("gradient", ()),
        )
    ),
    *(SsdVariant("pass", reverse=reverse) for reverse in (False, True)),
    *(SsdVariant(kernel, absent=("segments",), d_state=64) for kernel in ("output", "gradient")),
    *(SsdVariant(kernel, absent=("segments",), channels=128) for kernel in ("output", "gradient")),
]


@dataclass
class Report:
    """What the compiler made of one variant. Loops are innermost loops, in the order of the code."""

    registers: int
    local_bytes: int
    shared_bytes: int
    programs_per_multiprocessor: int
    local_accesses_in_loops: int
    loops: list[dict[str, int]] = field(default_factory=list)


def compile_variant(variant: Variant) -> Report:
    """Compiles for channels (not heads) in multiples of 16, say D = 2048, and contiguous or strided inputs."""
    kernels = variant.kernels
    kernel = getattr(kernels, f"{variant.kernel}_kernel")
    named = variant.launch_arguments()
    options = {name: named.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in named}
    constants = named | dict.fromkeys(variant.absent)
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in (*kernels.LENGTHS, *SIZES) or name.endswith(("_row", "_batch", "_head", "_group")):
            signature[name] = "i32"
        else:
            signature[name] = {True: f"*{variant.dtype}", False: "*fp32"}[name in ACTIVATIONS[variant.operator]]
    for name, kind in (("segment_ids", "*i64"), ("segments", "*i32")):
        if name in signature and name not in constants:
            signature[name] = kind
    unspecialised = (*kernels.LENGTHS, *getattr(kernels, "UNALIGNED", ()), "H", "G")
    aligned = [name for name, kind in signature.items() if kind != "constexpr" and name not in unspecialised]
    position = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature,
        {position[name]: value for name, value in constants.items()},
        {position[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return read_machine_code(compiled.asm["cubin"], options["num_warps"], compiled.metadata.shared)


def read_machine_code(cubin: bytes, warps: int, shared: int) -> Report:
    """Reads registers, local memory and instruction counts with the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    registers, local = (int(x) for x in re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+).*?;", line):
            if (target := re.search(r"`\((\.L_x_\d+)\)", line)) and instruction[1] == "BRA" and target[1] in labels:
                loops.append((labels[target[1]], len(instructions)))
            instructions.append(instruction[1])
    innermost = [
        instructions[a : b + 1]
        for a, b in loops
        if a < b and not any(a <= c and d <= b for c, d in loops if (c, d) != (a, b))
    ]
    per_program = -(-registers // 8) * 8 * 32 * warps
    return Report(
        registers=registers,
        local_bytes=local,
        shared_bytes=shared,
        programs_per_multiprocessor=min(SM_REGISTERS // per_program, SM_WARPS // warps, SM_PROGRAMS),
        local_accesses_in_loops=sum(x.startswith(("LDL", "STL")) for loop in innermost for x in loop),
        loops=[_count(loop) for loop in innermost],
    )


def _count(instructions: list[str]) -> dict[str, int]:
    kinds = Counter(x.split(".")[0] for x in instructions)
    vectors = sum(x.startswith(("LDG", "LDS", "LDGSTS")) and x.endswith((".64", ".128")) for x in instructions)
    return {
        "instructions": len(instructions),
        "special_function": kinds["MUFU"],
        "arithmetic": kinds["FFMA"] + kinds["FMUL"] + kinds["FADD"],
        "shuffles": kinds["SHFL"],
        "global_loads": kinds["LDG"],
        "vector_loads": vectors,
        "barriers": kinds["BAR"],
        "tensor_core": sum(count for kind, count in kinds.items() if kind.endswith(("MMA", "MMA_"))),
    }


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    from zoo.eval.measure import machine_info

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "triton_sm90.json")
    output = parser.parse_args().output

    table = Table("variant", "registers", "local bytes", "in loops", "shared", "programs / SM", "main loop", "SFU")
    rows: list[dict[str, Any]] = []
    for variant in (*VARIANTS, *WKV7_VARIANTS, *SSD_VARIANTS):
        report = compile_variant(variant)
        main_loop = max(report.loops, key=lambda loop: loop["instructions"], default=_count([]))
        numbers = (report.registers, report.local_bytes, report.local_accesses_in_loops, report.shared_bytes)
        numbers += (report.programs_per_multiprocessor, main_loop["instructions"], main_loop["special_function"])
        table.add_row(variant.title, *(str(x) for x in numbers))
        rows.append({"variant": variant.title, **asdict(variant), **asdict(report)})
    Console(width=140).print(table)
    output.parent.mkdir(exist_ok=True)
    facts = machine_info() | {"target": "sm_90", "triton": triton.__version__}
    output.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
