"""forge trains models on many GPUs from one YAML file."""

__version__ = "0.1.0"
