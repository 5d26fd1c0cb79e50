"""Push: an export goes to a hub, by this explicit command alone, after its card and its files were shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from fewstep import proof
from fewstep.hub import REFUSALS

FACTS = "fewstep.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Parcel:
    """What would go to a hub: the export's files, sorted, and its card as it will read there."""

    folder: Path
    hub_id: str
    files: tuple[str, ...]
    card: str
    notes: tuple[str, ...]  # what the one who pushes should know

    @property
    def size(self) -> int:
        """Bytes."""
        return sum((self.folder / f).stat().st_size for f in self.files)

    def lines(self) -> list[str]:
        """The card, the files and the notes, for people."""
        files = [f"  {(self.folder / f).stat().st_size / 1e6:10.3f} MB  {f}" for f in self.files]
        total = f"{len(self.files)} files, {self.size / 1e6:.3f} MB, to https://huggingface.co/{self.hub_id}"
        return [self.card.rstrip(), "", "-" * 40, *files, total, *(f"note: {note}" for note in self.notes)]


def check_id(hub_id: str) -> None:
    """Raises ValueError for what is no owner/name."""
    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise ValueError(f"{hub_id!r} is no hub id ({error}); write OWNER/NAME, as in me/my-4step") from error
    if "/" not in hub_id:
        raise ValueError(f"{hub_id!r} names no owner; write OWNER/NAME, as in me/{hub_id}")


def pack(folder: Path | str, hub_id: str) -> Parcel:
    """What a push of this export would send. Touches no network. Raises ValueError if there is no export, or no hub id."""
    folder = Path(folder)
    check_id(hub_id)
    if not (folder / FACTS).is_file():
        raise ValueError(f"{folder} is not a fewstep export (it has no {FACTS}); `fewstep export RUN --to DIR` makes one")
    try:
        facts = proof.stated(folder)
    except proof.Broken as error:
        raise ValueError(f"{folder}: {error}") from error
    if not (folder / "README.md").is_file():
        raise ValueError(f"{folder} has no README.md, the card that others read; export again")
    parts = {f: f.relative_to(folder) for f in folder.rglob("*") if f.is_file()}
    files = sorted(part.as_posix() for part in parts.values() if not any(p.startswith((".", "__pycache__")) for p in part.parts))
    if pickles := [f for f in files if f.endswith(PICKLES)]:
        raise ValueError(f"{pickles[0]} is a pickle, which can run code, and no part of an export; take it out of {folder}")
    if links := [part for f, part in parts.items() if f.is_symlink()]:
        raise ValueError(f"{links[0]} is a link, and no part of an export; take it out of {folder}")
    card = (folder / "README.md").read_text("utf-8")
    here = r"^folder = .*?  # where this folder lies(, or its hub id)?$"

    def there(line: re.Match[str]) -> str:
        """What takes no hub id, the lines that import the export's own pipeline, takes the folder that a download made."""
        fetched = f"from huggingface_hub import snapshot_download\n\nfolder = snapshot_download({hub_id!r})"
        return f"folder = {hub_id!r}" if line[1] else fetched

    return Parcel(folder, hub_id, tuple(files), re.sub(here, there, card, flags=re.M), tuple(_notes(facts, card)))


def _notes(facts: dict[str, Any], card: str) -> list[str]:
    found, teacher = [], facts["teacher"]["path"]
    if facts["form"] == "lora" and (Path(teacher).is_absolute() or teacher.startswith("zoo:")):
        found.append(f"others cannot load this LoRA's teacher, {teacher}; train from its hub id, or say on the card where it is")
    if not re.search(r"^license:", card.split("\n---", 1)[0], re.M):
        found.append("the card states no licence, as the teacher's states none; add the one you may give")
    return found


def send(parcel: Parcel, *, private: bool = False) -> str:
    """Uploads a parcel as one commit and returns its address. This, and nothing else in fewstep, writes to a hub.

    The repository is made if it is not there; files of another name that it has stay. Raises ValueError if it holds something
    that is no fewstep export, or if the hub refuses."""
    api = HfApi()
    try:
        if api.repo_exists(parcel.hub_id):
            there = {f for f in api.list_repo_files(parcel.hub_id) if not f.startswith(".")}
            if there and FACTS not in there:
                raise ValueError(f"{parcel.hub_id} is not a fewstep export; name another, nothing was changed")
        else:
            api.create_repo(parcel.hub_id, private=private)
        contents = {f: (parcel.card.encode() if f == "README.md" else str(parcel.folder / f)) for f in parcel.files}
        operations = [CommitOperationAdd(path_in_repo=f, path_or_fileobj=content) for f, content in contents.items()]
        api.create_commit(parcel.hub_id, operations, commit_message=f"fewstep export of {parcel.folder.resolve().name}")
    except REFUSALS as error:
        said = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"the hub did not take {parcel.hub_id}: {said}. See that this machine is online and logged in (`hf auth login`), "
            "then push again"
        ) from error
    return f"https://huggingface.co/{parcel.hub_id}"
