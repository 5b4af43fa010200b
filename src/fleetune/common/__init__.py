"""Share what every folder needs: the version, files, locks, memory, text, settings, the registry, the events."""

__version__ = "0.1.0"
