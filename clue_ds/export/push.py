"""`clue-ds push`: publish a model directory on the Hugging Face hub or on ModelScope.

Guarantees: the files of the directory itself are uploaded in one commit, so that the model appears
complete or not at all; its card calls it by the name under which it is published. HF_ENDPOINT and
HF_TOKEN work as in huggingface_hub, MODELSCOPE_ENDPOINT and MODELSCOPE_API_TOKEN as in
modelscope_hub.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Literal

import tyro

from clue_ds.errors import UserError, first_line
from clue_ds.export import hub

CARD = "README.md"


def push(
    model: tyro.conf.Positional[Path],
    name: tyro.conf.Positional[str],
    to: Literal["hf", "modelscope"] = "hf",
    private: bool = False,
    licence: str | None = None,
) -> None:
    """Publish a model directory on the Hugging Face hub or on ModelScope, with its card.

    Log in first: `hf auth login` or `ms login`, or set HF_TOKEN or MODELSCOPE_API_TOKEN to a token
    that may write.

    Args:
        model: a directory that `clue-ds export`, `import` or `finetune` wrote; of a fine-tuning
            run, the model in it is taken.
        name: OWNER/NAME, under which others will load it.
        to: hf (the Hugging Face hub) or modelscope (pip install 'clue_ds[modelscope]').
        private: let only the owner see a repository that this command makes.
        licence: the licence for the card, by the hub's names, such as apache-2.0.
    """
    # Imported here, because `--help` needs no torch.
    from clue_ds.export import card, sources
    from clue_ds.export.publish import MODEL_FILES

    if not re.fullmatch(hub.OWNED_NAME, name):
        raise UserError(f"{name!r} is not a name on the hub; give OWNER/NAME")
    directory = sources.of_finetuning(sources.existing(model))
    if not any((directory / file).is_file() for file in MODEL_FILES):
        raise UserError(
            f"{directory} holds no model ({' or '.join(MODEL_FILES)}); write one with: clue-ds "
            "export RUN"
        )
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    contents: dict[str, Path | bytes] = {
        path.relative_to(directory).as_posix(): path for path in files
    }
    if CARD in contents:
        text = (directory / CARD).read_text(encoding="utf-8")
        text = card.renamed(text, name, licence)
        contents[CARD] = (card.for_modelscope(text, name) if to == "modelscope" else text).encode()
    if to == "modelscope":
        url = _commit_to_modelscope(name, private, licence, contents)
    else:
        url = _commit(name, private, contents)
    print(f"published {directory} as {name}: {len(contents)} files, {url}")


def _commit(name: str, private: bool, contents: dict[str, Path | bytes]) -> str:
    """Make the repository if there is none, and all files one commit in it; returns its address."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = huggingface_hub.HfApi()
    operations = [
        huggingface_hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=content)
        for file, content in contents.items()
    ]
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(name, operations, commit_message="Model written by clue_ds")
        return str(url)
    except LocalTokenNotFoundError:
        said = "there is no token"
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status not in (401, 403):
            raise UserError(
                f"can't publish {name}: {first_line(error)}; run the command again later"
            ) from None
        said = "the hub refuses this token" if status == 403 else "the hub asks for a token"
    except OSError as error:
        raise UserError(
            f"can't reach the hub to publish {name}: {first_line(error)}; run the command where "
            "the hub can be reached"
        ) from None
    raise UserError(
        f"can't publish {name}: {said}; log in with `hf auth login` as someone who may write to "
        f"{name.partition('/')[0]}, or set HF_TOKEN"
    )


def _commit_to_modelscope(
    name: str, private: bool, licence: str | None, contents: dict[str, Path | bytes]
) -> str:
    """Make the repository if there is none, and all files one commit in it; returns its address."""
    library = hub.modelscope(f"--to modelscope for {name}")
    api = library.HubApi()
    with tempfile.TemporaryDirectory() as scratch:
        for file, content in contents.items():
            place = Path(scratch) / file
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                place.write_bytes(content)
            else:
                place.symlink_to(content.resolve())
        try:
            if not api.repo_exists(name, "model"):
                visibility = "private" if private else "public"
                # The library would say Apache-2.0 of a model without a licence.
                api.create_repo(name, "model", visibility=visibility, license=licence or "Other")
            api.upload_folder(
                name,
                "model",
                scratch,
                commit_message="Model written by clue_ds",
                use_cache=False,
                disable_tqdm=True,
            )
        except (library.AuthenticationError, library.PermissionDeniedError):
            raise UserError(
                f"can't publish {name}: ModelScope refuses the token, or there is none; log in "
                f"with `ms login` as someone who may write to {name.partition('/')[0]}, or set "
                "MODELSCOPE_API_TOKEN"
            ) from None
        except (library.HubError, OSError) as error:
            raise UserError(
                f"can't publish {name} on ModelScope: {first_line(error)}; run the command again "
                "later"
            ) from None
    return f"{library.HubConfig().endpoint}/models/{name}"
