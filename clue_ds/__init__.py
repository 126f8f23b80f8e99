"""Chinese BERT pretraining with DeepSpeed. Importing the package itself imports nothing heavy."""

__version__ = "0.1.0"
