"""based_mp: pretraining, evaluation and generation for BASED language models."""

__version__ = "0.1.0"
