"""The numbers by which a network says where a box lies."""
