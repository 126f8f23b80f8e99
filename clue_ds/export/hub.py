"""Models named on the Hugging Face hub, downloaded by huggingface_hub.

Guarantees: only a model's own files are downloaded, never code; weights are taken as safetensors
where the hub has them; without a connection, an earlier download is used. HF_ENDPOINT, HF_HOME and
HF_TOKEN work as in huggingface_hub. A local path always takes precedence over a name on the hub.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from clue_ds.errors import UserError, first_line

# Preset -> the name under which CLUE published it.
PUBLISHED = {
    "roberta_tiny_clue": "clue/roberta_chinese_clue_tiny",
    "roberta_tiny_pair": "clue/roberta_chinese_pair_tiny",
    "roberta_tiny3l312_clue": "clue/roberta_chinese_3L312_clue_tiny",
    "roberta_tiny3l768_clue": "clue/roberta_chinese_3L768_clue_tiny",
    "roberta_large_clue": "clue/roberta_chinese_clue_large",
    "roberta_large_pair": "clue/roberta_chinese_pair_large",
}
# OWNER/NAME, or one of the names without an owner that the hub had before it had owners.
OWNED_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
NAME = OWNED_NAME + r"|bert-(base|large)-[\w-]+"
FILES = ("*config*.json", "vocab.txt", "tokenizer.json", "bert_model.ckpt*")
SAFE = ("model*.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def is_name(where: str | Path) -> bool:
    """Whether `where` is not a path and looks like owner/name or is a preset in PUBLISHED."""
    name = str(where)
    looks = name in PUBLISHED or re.fullmatch(NAME, name) is not None
    # A path misspelled after its first part, which exists, must give the error about paths.
    return looks and not Path(name).exists() and Path(name).parts[0] not in _here()


def _here() -> set[str]:
    return {path.name for path in Path().iterdir()}


def _no_directory(name: str) -> str:
    """That `name` is no directory here, with the one that was perhaps meant."""
    first, _, rest = name.partition("/")
    folders = {path.name for path in Path().iterdir() if path.is_dir()}
    near = difflib.get_close_matches(first, folders, n=1)
    meant = f" (did you mean {near[0]}/{rest}?)" if rest and near else ""
    return f"{name} is no directory in {Path.cwd()}{meant}"


def download(name: str) -> Path:
    """The directory (in huggingface_hub's cache) of the model called `name`, or of a preset."""
    # Imported here because only a model on the hub needs it.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    repository = PUBLISHED.get(name, name)
    try:
        patterns = [*FILES, *SAFE]
        directory = Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
        if not any(directory.glob("*.safetensors")):
            patterns = [*FILES, *PICKLED]
            directory = Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
        return directory
    except RepositoryNotFoundError:
        raise UserError(
            f"{_no_directory(name)}, and the Hugging Face hub has no model {repository} (or it is "
            "private: set HF_TOKEN); correct the path or the name"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{_no_directory(name)}, and the model {repository} can't be downloaded from the "
            f"Hugging Face hub: {first_line(error)}; correct the path, or download the model on "
            "another machine and give its directory"
        ) from None
