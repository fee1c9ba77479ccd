"""The standard transforms, and the geometry and colours that they are made of."""
