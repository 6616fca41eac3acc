"""Operators: pure functions on tensors, one folder each, several backends behind one signature.

Importing this package loads no compiler: numba, Triton and the CUDA packages are imported when a call first needs them.
"""

import sys

if __name__ == "kernels":
    # Run from the checkout's root, Python finds this folder under the bare name, which belongs to another package.
    # Hand the name on to that package where it is installed; without it, this stays an empty module.
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    # Only a checkout has that link; two of them may be on the path, one installed and one stood in.
    _elsewhere = [entry for entry in sys.path if not Path(entry, "zoo", "kernels").is_symlink()]
    _spec = PathFinder.find_spec("kernels", _elsewhere)
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
else:
    from zoo.kernels.backends import describe, used
    from zoo.kernels.causal_conv1d.op import causal_conv1d
    from zoo.kernels.causal_conv1d.op import flops as causal_conv1d_flops
    from zoo.kernels.landmark_attention.op import flops as landmark_attention_flops
    from zoo.kernels.landmark_attention.op import landmark_attention
    from zoo.kernels.linear.op import flops as linear_flops
    from zoo.kernels.linear.op import linear
    from zoo.kernels.relative_attention.op import flops as relative_attention_flops
    from zoo.kernels.relative_attention.op import relative_attention
    from zoo.kernels.relative_attention.segments import Segments
    from zoo.kernels.selective_scan.op import flops as selective_scan_flops
    from zoo.kernels.selective_scan.op import selective_scan
    from zoo.kernels.sparse_attention.op import flops as sparse_attention_flops
    from zoo.kernels.sparse_attention.op import sparse_attention
    from zoo.kernels.sparse_attention.pattern import Pattern, visible_pairs
    from zoo.kernels.sparse_attention.reference import dense_weights
    from zoo.kernels.ssd.op import flops as ssd_flops
    from zoo.kernels.ssd.op import ssd
    from zoo.kernels.token_shift.op import flops as token_shift_flops
    from zoo.kernels.token_shift.op import token_shift
    from zoo.kernels.wkv4.op import flops as wkv4_flops
    from zoo.kernels.wkv4.op import wkv4
    from zoo.kernels.wkv7.op import flops as wkv7_flops
    from zoo.kernels.wkv7.op import wkv7

    __all__ = [
        "Pattern",
        "Segments",
        "causal_conv1d",
        "causal_conv1d_flops",
        "dense_weights",
        "describe",
        "landmark_attention",
        "landmark_attention_flops",
        "linear",
        "linear_flops",
        "relative_attention",
        "relative_attention_flops",
        "selective_scan",
        "selective_scan_flops",
        "sparse_attention",
        "sparse_attention_flops",
        "ssd",
        "ssd_flops",
        "token_shift",
        "token_shift_flops",
        "used",
        "visible_pairs",
        "wkv4",
        "wkv4_flops",
        "wkv7",
        "wkv7_flops",
    ]
