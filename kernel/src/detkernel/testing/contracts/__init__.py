"""What each kind of plugin promises, as classes to subclass: pytest runs their tests against your plugin.

    class TestMyModel(ModelContract):
        def plugin(self):
            return MyModel(width=8)

A failure says what the contract wants and why.
"""

from detkernel.testing.contracts.dataset import DatasetContract
from detkernel.testing.contracts.evaluator import EvaluatorContract
from detkernel.testing.contracts.hook import HookContract
from detkernel.testing.contracts.model import ModelContract
from detkernel.testing.contracts.transform import TransformContract

__all__ = ["DatasetContract", "EvaluatorContract", "HookContract", "ModelContract", "TransformContract"]
