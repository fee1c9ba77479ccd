"""Detection models and backbones from torchvision, for detkernel."""
