"""From YAML files to plugin objects: read (with positions), compose, structure; and back to text.

    config = load("config.yaml", ["optimizer.lr=0.02"])
    Kernel(config.plugins, config.options, priorities=config.priorities).run()

Every problem that can be seen without data is found here, all at once, before any heavy library is imported.
"""

from detkernel.config.load import Config, load

__all__ = ["Config", "load"]
