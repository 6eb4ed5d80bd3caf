"""The registry: immutable model versions in a folder or an object store.

A version is a folder `versions/<version>/` with weights (safetensors), two id maps (Arrow, mapped into memory) and
`manifest.json`, which is written last and only if there is none: a folder without it does not exist for readers.
File names carry the start of their hash, so two writers of one version cannot mix their files.
"""

import functools
import hashlib
import json
import re
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from ml.fold_in import PRIOR_STRENGTH
from ml.ids import IdMap
from ml.models import MODELS, build_model
from ml.recommender import Recommender
from ml.store import Store

FORMAT = 1
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FILES = {"model": "safetensors", "users": "arrow", "items": "arrow"}


class VersionDamaged(ValueError):  # noqa: N818
    """A version that cannot be trusted: missing, half-written, changed, or of a kind this program does not know."""


class VersionExists(ValueError):  # noqa: N818
    """A version's name is taken; versions never change."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a version, as it was published."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a version is, where it comes from and how well it ranked."""

    version: str
    recipe: dict[str, Any]
    model: dict[str, Any]  # name, config, num_users, num_items
    files: dict[str, FileEntry]
    code_version: str
    created_at: str
    snapshot: str | None = None
    # validation, test, popularity and evaluated_on {snapshot, split, from, through, interactions}
    metrics: dict[str, Any] = field(default_factory=dict)
    trained_through: str | None = None  # time of the newest interaction the weights have seen
    refit: bool = False
    parent_version: str | None = None
    run_id: str | None = None
    run_epoch: int | None = None
    # recall, users, probes and lists, as ml.retrieval measured them; None where nothing was measured
    retrieval: dict[str, Any] | None = None
    prior_strength: float = PRIOR_STRENGTH  # of folding in
    format: int = FORMAT

    def as_json(self) -> dict[str, Any]:
        """Return the manifest as plain JSON values."""
        return asdict(self)

    def to_bytes(self) -> bytes:
        """Write the manifest in its one canonical form, with a checksum over all of it."""
        body = self.as_json()
        return _canonical({**body, "checksum": hashlib.sha256(_canonical(body)).hexdigest()})

    @classmethod
    def from_bytes(cls, data: bytes, version: str) -> "Manifest":
        """Read a manifest; VersionDamaged if any byte of it is not as it was written."""
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            raise _damaged(version, "its manifest is not JSON") from None
        if not isinstance(body, dict) or "format" not in body:
            raise _damaged(version, "its manifest is not one of this program")
        if body["format"] != FORMAT:
            raise _damaged(
                version,
                f"it has format {str(body['format'])[:20]} and this program reads format {FORMAT}",
                "Use the program that wrote it, or train a new version",
            )
        checksum = body.pop("checksum", None)
        if checksum != hashlib.sha256(_canonical(body)).hexdigest() or data != _canonical(
            {**body, "checksum": checksum}
        ):
            raise _damaged(version, "its manifest was changed after it was published")
        if body.get("version") != version:
            raise _damaged(version, f"its manifest is that of {str(body.get('version'))[:140]!r}")
        try:
            files = {key: FileEntry(**entry) for key, entry in body.pop("files").items()}
            manifest = cls(**body, files=files)
        except (TypeError, KeyError, AttributeError):
            raise _damaged(version, "its manifest lacks fields or has unknown ones") from None
        if set(files) != set(_FILES):
            raise _damaged(version, f"it names the files {sorted(files)} instead of {sorted(_FILES)}")
        return manifest


class Registry:
    """Versions in one store. Publishing is atomic, loading checks every byte first."""

    def __init__(self, store: Store, cache_dir: Path | None = None) -> None:
        """Use a store; `cache_dir` keeps local copies of files that lie in a bucket."""
        self.store = store
        self._cache = cache_dir

    def publish(
        self,
        recommender: Recommender,
        *,
        recipe: Mapping[str, Any],
        version: str | None = None,
        snapshot: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        trained_through: str | None = None,
        refit: bool = False,
        parent_version: str | None = None,
        run_id: str | None = None,
        run_epoch: int | None = None,
        retrieval: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Publish a version under a new name; VersionExists if the name is taken.

        A publish that was cut off leaves nothing that counts; run it again.
        """
        model = next(name for name, kind in MODELS.items() if type(recommender.model) is kind)
        now = datetime.now(UTC)
        if version is None:
            version = f"{now:%Y%m%dT%H%M%SZ}-{recipe.get('name', model)}-{secrets.token_hex(4)}"
        check_version(version)
        if self.exists(version):
            raise VersionExists(f"version {version} exists already, and versions never change: choose another name")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in recommender.model.state_dict().items()}
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"the weights {name} are not finite: a model like this is not published")
        files = {}
        with tempfile.TemporaryDirectory(prefix="shortlist-publish-") as folder:
            paths = {key: Path(folder) / f"{key}.{suffix}" for key, suffix in _FILES.items()}
            try:
                save_file(weights, paths["model"])
            except SafetensorError as error:
                raise OSError(f"the weights cannot be written to {folder}: {error}") from error
            recommender.users.save(paths["users"])
            recommender.items.save(paths["items"])
            for key, path in paths.items():
                digest = _sha256(path)
                files[key] = FileEntry(f"{key}-{digest[:8]}.{_FILES[key]}", path.stat().st_size, digest)
                self.store.put(_file_name(version, files[key].name), path)
        manifest = Manifest(
            version=version,
            recipe=_plain(recipe),
            model={
                "name": model,
                "config": _plain(asdict(recommender.model.config)),
                "num_users": recommender.num_users,
                "num_items": recommender.num_items,
            },
            files=files,
            code_version=code_version(),
            created_at=now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            snapshot=snapshot,
            metrics=_plain(metrics or {}),
            trained_through=trained_through,
            refit=refit,
            parent_version=parent_version,
            run_id=run_id,
            run_epoch=run_epoch,
            retrieval=None if retrieval is None else _plain(retrieval),
            prior_strength=recommender.prior_strength,
        )
        if not self.store.put_if_absent(_manifest_name(version), manifest.to_bytes()):
            raise VersionExists(f"version {version} was published by somebody else meanwhile: choose another name")
        return manifest

    def exists(self, version: str) -> bool:
        """Tell whether a version of this name is published, sound or not."""
        return self.store.exists(_manifest_name(check_version(version)))

    def names(self) -> list[str]:
        """List the names of all published versions, damaged ones too, sorted."""
        parts = [name.split("/") for name in self.store.list("versions")]
        return sorted(p[1] for p in parts if len(p) == 3 and p[2] == "manifest.json" and _VERSION.fullmatch(p[1]))

    def versions(self) -> list[Manifest]:
        """List the versions, oldest first; half-written ones and those with a damaged manifest are passed over."""
        found = []
        for name in self.names():
            try:
                found.append(self.manifest(name))
            except VersionDamaged:
                continue
        return sorted(found, key=lambda manifest: (manifest.created_at, manifest.version))

    def manifest(self, version: str) -> Manifest:
        """Read the manifest of a version; VersionDamaged if it is missing or was changed."""
        check_version(version)
        try:
            data = self.store.get(_manifest_name(version))
        except KeyError:
            if self.store.list(f"versions/{version}"):
                raise _damaged(version, "it has no manifest: its publishing was cut off, or still goes on") from None
            raise VersionDamaged(f"there is no version {version} in this store: list them with `ml versions`") from None
        return Manifest.from_bytes(data, version)

    def check_files_exist(self, manifest: Manifest) -> None:
        """Raise VersionDamaged if a file of a version is missing; only `load` checks the bytes."""
        present = set(self.store.list(f"versions/{manifest.version}"))
        for entry in manifest.files.values():
            if _file_name(manifest.version, entry.name) not in present:
                raise _damaged(manifest.version, f"its file {entry.name} is missing")

    def load(self, version: str) -> tuple[Recommender, Manifest]:
        """Load a version after checking every byte of it; VersionDamaged says what is wrong and what to do."""
        manifest = self.manifest(version)
        name = manifest.model.get("name")
        if name not in MODELS:
            raise _damaged(
                version,
                f"it holds a model {str(name)[:40]!r} that this program does not know",
                "Use the program that wrote it, or train a new version",
            )
        paths = {key: self._checked(version, entry) for key, entry in manifest.files.items()}
        try:
            users, items = IdMap.open(paths["users"]), IdMap.open(paths["items"])
            # On the meta device nothing is drawn or allocated: the weights of the file take their place.
            with torch.device("meta"), _Undrawn():
                model = build_model(name, len(users), len(items), manifest.model["config"])
            weights = load_file(paths["model"])
            model.load_state_dict(weights, strict=True, assign=True)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            if (len(users), len(items)) != (manifest.model["num_users"], manifest.model["num_items"]):
                raise ValueError("the id maps have other sizes than the manifest says")
            for tensor in weights.values():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise ValueError("its weights are not finite")
            return Recommender(model, users, items, prior_strength=manifest.prior_strength), manifest
        except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            raise _damaged(version, f"its files do not fit together ({reason})") from None

    def delete(self, version: str) -> None:
        """Remove a version, its manifest first, so that a removal cut off leaves nothing that counts."""
        check_version(version)
        self.store.delete(_manifest_name(version))
        for name in self.store.list(f"versions/{version}"):
            self.store.delete(name)
        if self._cache is not None:
            shutil.rmtree(self._cache / "versions" / version, ignore_errors=True)

    def _checked(self, version: str, entry: FileEntry) -> Path:
        """Return a local path of a file whose size and hash are right."""
        name = _file_name(version, entry.name)
        for again in (False, True):
            try:
                path = self.store.local_path(name, self._cache_dir())
            except (KeyError, ValueError):
                raise _damaged(version, f"its file {entry.name} is missing") from None
            size = path.stat().st_size
            if size == entry.size and _sha256(path) == entry.sha256:
                return path
            if again or not path.is_relative_to(self._cache_dir()):
                break
            path.unlink()  # a local copy went bad; the original may be sound
        if size != entry.size:
            raise _damaged(version, f"its file {entry.name} has {size} bytes instead of {entry.size}")
        raise _damaged(version, f"its file {entry.name} was changed after it was published")

    def _cache_dir(self) -> Path:
        if self._cache is None:
            # The store makes the folder if it needs it, as a bucket does; it goes with this registry.
            self._cache = Path(tempfile.gettempdir()) / f"shortlist-versions-{secrets.token_hex(8)}"
            weakref.finalize(self, shutil.rmtree, self._cache, ignore_errors=True)
        return self._cache


class _Undrawn(TorchFunctionMode):
    """Leaves new weights as they are: filling ones without memory would import PyTorch's compiler, for seconds."""

    FILLING = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.zero_, torch.Tensor.fill_)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.FILLING or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def check_version(version: str) -> str:
    """Return the name if it can name a version, else ValueError."""
    if not _VERSION.fullmatch(version):
        raise ValueError(
            f"{version[:140]!r} cannot name a version: use 1 to 128 letters, digits and . _ -, no sign first"
        )
    return version


@functools.cache
def code_version() -> str:
    """Name the code that trains: the package's version and the start of a hash of its sources."""
    try:
        number = metadata.version("shortlist")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        number = "0"
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{number}+{digest.hexdigest()[:12]}"


def _manifest_name(version: str) -> str:
    return _file_name(version, "manifest.json")


def _file_name(version: str, name: str) -> str:
    return f"versions/{version}/{name}"


def _damaged(
    version: str, reason: str, advice: str = "Delete it, or publish it again under another name"
) -> VersionDamaged:
    return VersionDamaged(f"version {version} is refused: {reason}. {advice}.")


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON makes of the values; ValueError for one that is not finite."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(values), allow_nan=False))
    return plain


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
