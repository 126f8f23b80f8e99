"""Models named on the Hugging Face hub or on ModelScope, downloaded by the libraries of these.

    clue/roberta_chinese_clue_tiny               huggingface_hub; HF_ENDPOINT, HF_HOME, HF_TOKEN
    modelscope:dienstag/chinese-roberta-wwm-ext  modelscope_hub, the extra [modelscope];
                                                 MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE,
                                                 MODELSCOPE_API_TOKEN

Guarantees: only a model's own files are downloaded, never code; weights are taken as safetensors
where the hub has them; without a connection, an earlier download from the Hugging Face hub is used.
The variables work as in the two libraries. A local path always takes precedence over a name on the
Hugging Face hub.
"""

from __future__ import annotations

import difflib
import logging
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

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
MODELSCOPE = "modelscope:"
NAME = OWNED_NAME + r"|bert-(base|large)-[\w-]+"
FILES = ("*config*.json", "vocab.txt", "tokenizer.json", "bert_model.ckpt*")
SAFE = ("model*.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
KERAS = ("tf_model.h5",)


def is_name(where: str | Path) -> bool:
    """Whether `where` is not a path and looks like owner/name or is a preset in PUBLISHED."""
    name = str(where)
    if name.startswith(MODELSCOPE):
        return True
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
    """The directory (in the cache of its library) of the model called `name`, or of a preset."""
    if name.startswith(MODELSCOPE):
        return _from_modelscope(name.removeprefix(MODELSCOPE))
    # Imported here because only a model on the hub needs it.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    repository = PUBLISHED.get(name, name)
    try:
        for weights in (SAFE, PICKLED, KERAS):
            patterns = [*FILES, *weights]
            directory = Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
            if any(directory.glob(weights[0])):
                break
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


def modelscope(what: str) -> Any:
    """ModelScope's library, for `what`; its reports of each step are silenced."""
    try:
        import modelscope_hub
    except ImportError:
        raise UserError(
            f"{what} needs ModelScope's library; run: pip install 'clue_ds[modelscope]'"
        ) from None
    logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
    return modelscope_hub


def _from_modelscope(name: str) -> Path:
    """The directory (in modelscope_hub's cache) of the model ORG/NAME on ModelScope."""
    if not re.fullmatch(OWNED_NAME, name):
        raise UserError(f"{MODELSCOPE}{name} is no name on ModelScope; give {MODELSCOPE}ORG/NAME")
    library = modelscope(f"{MODELSCOPE}{name}")
    try:
        api = library.HubApi()
        there = [file.path for file in api.list_repo_files(name, "model", recursive=False)]
        forms = (SAFE, PICKLED, KERAS)
        weights = next((f for f in forms if any(fnmatch(path, f[0]) for path in there)), SAFE)
        wanted = [path for path in there if any(fnmatch(path, p) for p in (*FILES, *weights))]
        if wanted:
            return Path(api.download_repo(name, "model", allow_patterns=wanted))
    except library.NotExistError:
        raise UserError(
            f"ModelScope has no model {name} (or it is private: set MODELSCOPE_API_TOKEN); correct "
            "the name"
        ) from None
    except (library.HubError, OSError) as error:
        raise UserError(
            f"the model {name} can't be downloaded from ModelScope: {first_line(error)}; download "
            "it on another machine and give its directory"
        ) from None
    raise UserError(
        f"{name} on ModelScope holds no config and no weights ({', '.join(there) or 'no files'}); "
        "give the name of a BERT"
    )
