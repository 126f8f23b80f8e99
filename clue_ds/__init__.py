"""Chinese BERT pretraining with DeepSpeed. Importing the package itself imports nothing heavy."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`clue_ds.pretrain(config)` without an import of its own."""
    if name == "pretrain":
        import importlib

        return importlib.import_module("clue_ds.pretrain")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
