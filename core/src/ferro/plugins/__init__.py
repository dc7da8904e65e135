"""Discovery and loading of plugins, and what core itself offers."""
