"""What the detection plugins of detkernel share: reading weights safely, mapping class outputs by name."""
