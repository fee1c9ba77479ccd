"""What a hook promises, shown in runs of a small detector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detkernel.loop import Kernel
from detkernel.testing.hook import HookContract as PlainHookContract

from detkernel_detection.testing.generators import restore_all, seed_all, states_of_all
from detkernel_detection.testing.tiny import tiny_kernel


class HookContract(PlainHookContract):
    """A hook leaves exact resume exact."""

    generator_names = "torch's, NumPy's or Python's"

    def kernel(self, plugins: Mapping[str, object], **options: Any) -> Kernel:
        return tiny_kernel(plugins, **options)

    def seed(self) -> None:
        seed_all(0)

    def generators(self) -> Any:
        return states_of_all()

    def restore(self, states: Any) -> None:
        restore_all(states)
