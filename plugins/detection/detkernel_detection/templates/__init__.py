"""What `detkernel new-plugin --kind model` (and dataset, transform, evaluator) starts from."""

from detkernel.scaffold import Template

HERE = "detkernel_detection.templates"
DETECTION, TORCH = "detkernel-detection>=0.1,<0.2", "torch>=2.9"

model = Template(HERE, "model", "model: {use: my_plugin, width: 32}", (DETECTION, TORCH))
dataset = Template(
    HERE,
    "dataset",
    "data:\n  use: loader\n  train: {use: my_plugin, csv: boxes.csv}",
    (DETECTION, TORCH, "numpy>=2", "pillow>=11"),
)
transform = Template(HERE, "transform", "data:\n  train_transforms: [{use: my_plugin, prob: 0.3}]", (DETECTION, TORCH))
evaluator = Template(HERE, "evaluator", "recall: {use: my_plugin, iou: 0.7}", (DETECTION, TORCH, "torchvision>=0.24"))
