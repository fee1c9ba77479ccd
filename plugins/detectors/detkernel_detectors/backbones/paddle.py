"""Names of parameters in files that come from PaddlePaddle, such as RT-DETR's."""

from __future__ import annotations


def _of_paddle(stage: int) -> list[tuple[str, str]]:
    block, ours = rf"res_layers\.{stage}\.blocks\.(\d+)\.", rf"layer{stage + 1}.\1."
    pairs = [
        (rf"{block}branch2{letter}\.{theirs}\.", f"{ours}{name}{number}.")
        for number, letter in enumerate("abc", 1)
        for theirs, name in (("conv", "conv"), ("norm", "bn"))
    ]
    shortcut = [(rf"{block}short\.(?:conv\.)?norm\.", f"{ours}downsample.2.")]
    return [*pairs, *shortcut, (rf"{block}short\.conv\.(?:conv\.)?", f"{ours}downsample.1.")]


PADDLE = [
    *(
        (rf"conv1\.conv1_{number + 1}\.{theirs}\.", f"stem.{number * 3 + place}.")
        for number in range(3)
        for place, theirs in enumerate(("conv", "norm"))
    ),
    *(pair for stage in range(4) for pair in _of_paddle(stage)),
]
"""How the names of parameters begin in RT-DETR's files, which come from PaddlePaddle, and ours."""
