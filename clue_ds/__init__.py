"""Chinese BERT pretraining with DeepSpeed. Importing the package itself imports nothing heavy.

import clue_ds

result = clue_ds.pretrain("run.yaml")
clue_ds.finetune(result.run_dir, train, dev, "my-model")
clue_ds.Predictor("my-model").predict(["一段文本"])
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers know the name; importing typing would take the longest here
if TYPE_CHECKING:
    from clue_ds.tasks.finetune.fit import fit as finetune
    from clue_ds.tasks.finetune.loop import Recipe
    from clue_ds.tasks.predict.predictor import Predictor

__all__ = ["Predictor", "Recipe", "finetune", "pretrain"]

# Name -> where it is: a module, or a module and a name in it.
_HOMES = {
    "pretrain": "clue_ds.pretrain",
    "finetune": "clue_ds.tasks.finetune.fit:fit",
    "Recipe": "clue_ds.tasks.finetune.loop:Recipe",
    "Predictor": "clue_ds.tasks.predict.predictor:Predictor",
}


def __getattr__(name: str) -> object:
    """A public name, imported when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, _, attribute = _HOMES[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found
