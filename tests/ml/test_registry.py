import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml.ids import IdMap
from ml.models import MODELS, build_model
from ml.recipes import RECIPES
from ml.recommender import Recommender
from ml.registry import Manifest, Registry, VersionDamaged, VersionExists, _canonical
from ml.store import FolderStore, open_store


def recommender(name: str = "caser", users: int = 6, items: int = 9, seed: int = 0) -> Recommender:
    torch.manual_seed(seed)
    model = build_model(name, users, items)
    maps = (IdMap.from_ids([f"{letter}-{n} ü" for n in range(size)]) for letter, size in (("u", users), ("i", items)))
    return Recommender(model, *maps, prior_strength=0.5)


def publish(registry: Registry, version: str | None = "v1", name: str = "caser", seed: int = 0) -> Manifest:
    return registry.publish(
        recommender(name, seed=seed), recipe=RECIPES[name].as_dict(), version=version, snapshot="abc",
        metrics={"test": {"ndcg@10": 0.1}, "popularity": {"ndcg@10": 0.05}}, trained_through="2026-01-31T12:00:00Z",
        refit=True, parent_version="v0", run_id="run", run_epoch=2,
    )  # fmt: skip


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(FolderStore(tmp_path / "store"))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_ranks_as_what_was_published(registry: Registry, name: str) -> None:
    published = publish(registry, name=name)
    loaded, manifest = registry.load("v1")
    assert manifest == published
    assert manifest.model["name"] == name
    assert (manifest.snapshot, manifest.parent_version, manifest.run_id, manifest.run_epoch) == ("abc", "v0", "run", 2)
    assert manifest.refit
    assert manifest.code_version.count("+") == 1
    original = recommender(name)
    histories = [np.array([1, 2]), np.array([3])]
    items, scores = loaded.top_k([0, 1], histories, histories, 5)
    expected_items, expected_scores = original.top_k([0, 1], histories, histories, 5)
    assert np.array_equal(items, expected_items)
    # Not to the last bit: mapped weights lie elsewhere in memory, which may change the order of a sum.
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)
    assert loaded.users.equals(original.users)
    assert loaded.items.equals(original.items)
    assert manifest.prior_strength == 0.5
    strangers = [recommender.encode([-1], [[1, 2]]) for recommender in (loaded, original)]
    torch.testing.assert_close(*strangers)


def test_names_are_made_up_or_checked(registry: Registry) -> None:
    made = publish(registry, version=None).version
    assert registry.load(made)[1].version == made
    assert made.split("-")[1] == "caser"
    for name in ("", "../x", "a/b", ".hidden", "-x", "a" * 129, "ü", "a\n"):
        with pytest.raises(ValueError, match="cannot name a version"):
            publish(registry, version=name)
        with pytest.raises(ValueError, match="cannot name a version"):
            registry.load(name)


def test_versions_never_change(registry: Registry) -> None:
    publish(registry)
    before = {path: path.read_bytes() for path in registry.store.path.rglob("*") if path.is_file()}
    with pytest.raises(VersionExists, match="exists already"):
        publish(registry, seed=1)
    assert {path: path.read_bytes() for path in registry.store.path.rglob("*") if path.is_file()} == before


def test_two_writers_of_one_version_do_not_mix(registry: Registry) -> None:
    class Late(FolderStore):
        """A store in which somebody else publishes just before our manifest."""

        def put_if_absent(self, name: str, data: bytes | Path) -> bool:
            publish(Registry(FolderStore(self.path)), seed=1)
            return super().put_if_absent(name, data)

    with pytest.raises(VersionExists, match="meanwhile"):
        publish(Registry(Late(registry.store.path)), seed=2)
    weights = registry.load("v1")[0].model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in recommender(seed=1).model.state_dict().items())


def test_a_publish_that_was_cut_off_counts_for_nothing(registry: Registry) -> None:
    publish(registry)

    class Full(FolderStore):
        """A store whose disk is full once a few files are written."""

        left = 2

        def put(self, name: str, data: bytes | Path) -> None:
            if not self.left:
                raise OSError(28, "No space left on device")
            self.left -= 1
            super().put(name, data)

    with pytest.raises(OSError, match="No space"):
        publish(Registry(Full(registry.store.path)), version="v2")
    assert registry.names() == ["v1"]
    assert [manifest.version for manifest in registry.versions()] == ["v1"]
    with pytest.raises(VersionDamaged, match="no manifest"):
        registry.load("v2")
    with pytest.raises(VersionDamaged, match="there is no version v3"):
        registry.load("v3")
    publish(registry, version="v2")
    registry.load("v2")


def test_delete_removes_everything(registry: Registry) -> None:
    publish(registry)
    publish(registry, version="v10")
    registry.delete("v1")
    assert registry.names() == ["v10"]
    assert all(name.startswith("versions/v10/") for name in registry.store.list())
    registry.load("v10")


def test_versions_are_listed_oldest_first(registry: Registry) -> None:
    for name in ("b", "c", "a"):
        publish(registry, version=name)
    (registry.store.path / "versions" / "c" / "manifest.json").write_bytes(b"{}")
    assert [manifest.version for manifest in registry.versions()] == ["b", "a"]
    assert registry.names() == ["a", "b", "c"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_refused(registry: Registry, data: st.DataObject) -> None:
    if not registry.exists("v1"):
        publish(registry)
    files = sorted((registry.store.path / "versions" / "v1").iterdir())
    assert len(files) == 4
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    flipped = content[place] ^ (1 << data.draw(st.integers(0, 7)))
    try:
        path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        with pytest.raises(VersionDamaged, match="version v1 is refused"):
            registry.load("v1")
    finally:
        path.write_bytes(content)
    registry.load("v1")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shortened_or_missing_file_is_refused(registry: Registry, data: st.DataObject) -> None:
    if not registry.exists("v1"):
        publish(registry)
    path = data.draw(st.sampled_from(sorted((registry.store.path / "versions" / "v1").iterdir())))
    content = path.read_bytes()
    keep = data.draw(st.integers(-1, len(content) - 1))
    try:
        if keep < 0:
            path.unlink()
        else:
            path.write_bytes(content[:keep])
        with pytest.raises(VersionDamaged, match="version v1 is refused"):
            registry.load("v1")
    finally:
        path.write_bytes(content)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=200), st.recursive(st.none() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
    )
)
def test_any_other_manifest_is_refused(registry: Registry, manifest: bytes) -> None:
    if not registry.exists("v1"):
        publish(registry)
    (registry.store.path / "versions" / "v1" / "manifest.json").write_bytes(manifest)
    with pytest.raises(VersionDamaged):
        registry.load("v1")
    assert registry.versions() == []


def rewritten(registry: Registry, **changes: object) -> None:
    """Forge a manifest whose checksum is right."""
    path = registry.store.path / "versions" / "v1" / "manifest.json"
    body = json.loads(path.read_bytes()) | changes
    body.pop("checksum")
    path.write_bytes(_canonical({**body, "checksum": hashlib.sha256(_canonical(body)).hexdigest()}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 99}, "has format 99"),
        ({"version": "v2"}, "is that of 'v2'"),
        ({"model": {"name": "transformer", "config": {}, "num_users": 6, "num_items": 9}}, "'transformer'"),
        ({"model": {"name": "neumf", "config": {}, "num_users": 6, "num_items": 9}}, "do not fit together"),
        ({"model": {"name": "caser", "config": {"layers": 3}, "num_users": 6, "num_items": 9}}, "do not fit together"),
        ({"model": {"name": "caser", "config": {}, "num_users": 7, "num_items": 9}}, "other sizes"),
        ({"colour": "red"}, "unknown"),
        ({"files": {}}, "names the files"),
        ({"files": {"model": {"name": "x"}}}, "lacks fields"),
    ],
)
def test_a_foreign_version_is_refused(registry: Registry, changes: dict[str, object], reason: str) -> None:
    publish(registry)
    rewritten(registry, **changes)
    with pytest.raises(VersionDamaged, match=reason):
        registry.load("v1")


def test_a_manifest_cannot_name_files_elsewhere(registry: Registry) -> None:
    manifest = publish(registry)
    files = {key: entry.__dict__ for key, entry in manifest.files.items()}
    outside = files["users"] | {"name": "../v2/users.arrow"}
    rewritten(registry, files=files | {"users": outside})
    with pytest.raises(VersionDamaged, match="missing"):
        registry.load("v1")


def test_weights_that_are_not_finite_are_not_published(registry: Registry) -> None:
    broken = recommender()
    with torch.no_grad():
        next(broken.model.parameters())[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        registry.publish(broken, recipe={}, version="v1")
    with pytest.raises(ValueError, match="not JSON compliant"):
        registry.publish(recommender(), recipe={}, version="v1", metrics={"ndcg@10": float("nan")})
    assert registry.names() == []


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    import boto3
    from moto.server import ThreadedMotoServer

    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT", f"http://{host}:{port}")
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="versions")
    yield "s3://versions/team/registry"
    server.stop()


def test_a_bucket_serves_as_well_as_a_folder(bucket: str, tmp_path: Path) -> None:
    registry = Registry(open_store(bucket), tmp_path / "cache")
    publish(registry)
    publish(registry, version="v2")
    assert registry.names() == ["v1", "v2"]
    with pytest.raises(VersionExists):
        publish(registry)
    loaded, manifest = registry.load("v1")
    assert loaded.top_k([0], [[1]], [[1]], 3)[0].shape == (1, 3)
    # A local copy that went bad is fetched again; a bad original is refused.
    copy = tmp_path / "cache" / "versions" / "v1" / manifest.files["users"].name
    stamp = copy.stat().st_mtime_ns
    copy.write_bytes(bytes(len(copy.read_bytes())))
    os.utime(copy, ns=(stamp, stamp))
    registry.load("v1")
    name = f"versions/v2/{manifest.files['model'].name}"
    registry.store.put(name, registry.store.get(name)[:-1] + b"?")
    with pytest.raises(VersionDamaged, match="changed after it was published"):
        registry.load("v2")
    assert Registry(open_store(bucket)).load("v1")[1] == manifest
    registry.delete("v1")
    assert registry.names() == ["v2"]
