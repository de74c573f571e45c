"""Endpoints and credentials: they reach the store that they are for, and no text that anybody reads."""

import os
import pickle
import sys
from typing import Any, ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from pydantic import ValidationError

from acsr_ray.config import MissingExtraError
from acsr_ray.corpus.units import plan_units, read_unit
from acsr_ray.filesystems import (
    CREDENTIALS,
    Connection,
    StorageLocationError,
    StorageSettings,
    connect,
    connected,
    open_filesystem,
    resolve_connection,
)
from acsr_ray.storage import open_storage

SECRETS = {"MY_KEY": "key-1", "MY_SECRET": "secret-1", "MY_TOKEN": "token-1"}
NAMED = StorageSettings(
    access_key_variable="MY_KEY", secret_key_variable="MY_SECRET", token_variable="MY_TOKEN"
)
NOTHING = StorageSettings()


@pytest.fixture
def made(monkeypatch):
    """Stand-ins for stores that remember what they were made with, by protocol."""
    stores: dict[str, list[dict[str, Any]]] = {}
    for name in ("s3", "gs", "hf", "az"):
        stores[name] = []

        class Recorded(MemoryFileSystem):
            protocol = name
            cachable = False
            options: ClassVar = stores[name]

            def __init__(self, **options):
                self.options.append(options)
                super().__init__()

            @classmethod
            def _strip_protocol(cls, path):
                return MemoryFileSystem._strip_protocol(path.partition("://")[2] or path)

        monkeypatch.setitem(_registry, name, Recorded)
    return stores


def options_of(made, connection, uri):
    """Return what the store of a URI is made with, without what every store gets."""
    with connected(connection):
        open_filesystem(uri)
    options = made[uri.partition("://")[0]].pop()
    waits = options.pop("config_kwargs", None)
    assert (waits is not None) == uri.startswith("s3://")
    assert options.pop("use_listings_cache", uri.startswith("az")) is uri.startswith("az")
    return options


EXPECTED = [
    (NOTHING, "s3", {}),
    (NOTHING, "gs", {}),
    (NOTHING, "hf", {}),
    (StorageSettings(endpoint_url="http://minio:9000"), "s3", {"endpoint_url": "http://minio:9000"}),
    (StorageSettings(endpoint_url="http://fake:4443"), "gs", {"endpoint_url": "http://fake:4443"}),
    (StorageSettings(endpoint_url="https://hub.corp"), "hf", {"endpoint": "https://hub.corp"}),
    (StorageSettings(endpoint_url="https://x", profile="p"), "az", {}),
    (StorageSettings(region="eu-1"), "s3", {"client_kwargs": {"region_name": "eu-1"}}),
    (StorageSettings(profile="night"), "s3", {"profile": "night"}),
    (StorageSettings(anonymous=True), "s3", {"anon": True}),
    (StorageSettings(anonymous=True), "gs", {"token": "anon"}),
    (StorageSettings(anonymous=True), "hf", {"token": False}),
    (NAMED, "s3", {"key": "key-1", "secret": "secret-1", "token": "token-1"}),
    (NAMED, "hf", {"token": "token-1"}),
]


@pytest.mark.parametrize(("settings", "protocol", "options"), EXPECTED)
def test_what_a_store_is_made_with(made, settings, protocol, options):
    connection = resolve_connection(settings, NOTHING, "", SECRETS)
    assert options_of(made, connection, f"{protocol}://bucket/x") == options


def test_input_and_output_may_differ(made):
    shared = NAMED.model_copy(update={"endpoint_url": "http://minio:9000"})
    public = StorageSettings(anonymous=True)
    connection = resolve_connection(shared, public, "s3://ours/out", SECRETS)
    # Another identity is another one as a whole; where to ask stays.
    source = {"endpoint_url": "http://minio:9000", "anon": True}
    target = {**SECRETS_AS_OPTIONS, "endpoint_url": "http://minio:9000"}
    assert options_of(made, connection, "s3://public/in/a.tar") == source
    assert options_of(made, connection, "s3://ours/output-of-others/a.tar") == source
    assert options_of(made, connection, "s3://ours/out") == target
    assert options_of(made, connection, "s3://ours/out/data/x") == target
    elsewhere = resolve_connection(
        shared, StorageSettings(endpoint_url="http://other"), "s3://ours/out", SECRETS
    )
    assert options_of(made, elsewhere, "s3://in") == {**SECRETS_AS_OPTIONS, "endpoint_url": "http://other"}


SECRETS_AS_OPTIONS = {"key": "key-1", "secret": "secret-1", "token": "token-1"}


def test_a_connection_ends_with_its_block(made):
    with (
        pytest.raises(RuntimeError, match="inside"),
        connected(resolve_connection(NAMED, NOTHING, "", SECRETS)),
    ):
        raise RuntimeError("inside")
    assert options_of(made, Connection(), "s3://x") == {}
    open_filesystem("s3://x")
    assert "key" not in made["s3"].pop()


def test_no_text_shows_a_secret():
    environment = {**SECRETS, "AWS_SECRET_ACCESS_KEY": "secret-2", "HF_TOKEN": "secret-3"}
    connection = resolve_connection(NAMED, NOTHING, "s3://ours/out", environment)
    for text in (repr(connection), str(connection), f"{connection.source}", NAMED.model_dump_json()):
        assert not any(value in text for value in environment.values())
    assert pickle.loads(pickle.dumps(connection)) == connection


def test_a_variable_that_is_not_set_is_an_error_that_does_not_repeat_it():
    """Somebody may have given the secret itself."""
    mistaken = StorageSettings(secret_key_variable="wJalrXUtnFEMI_K7MDENG")
    with pytest.raises(StorageLocationError, match="secret-key-variable names") as error_info:
        resolve_connection(mistaken, NOTHING, "", {})
    assert "wJalr" not in str(error_info.value)
    assert error_info.value.exit_code == 2
    with pytest.raises(StorageLocationError, match="access-key-variable"):
        resolve_connection(StorageSettings(access_key_variable="EMPTY"), NOTHING, "", {"EMPTY": ""})


@pytest.mark.parametrize(
    "wrong",
    [
        {"secret_key_variable": "wJalr/secret+key"},
        {"endpoint_url": "http://user:secret@minio:9000"},
        {"endpoint_url": "minio:9000"},
        {"secret_key": "x"},
    ],
)
def test_settings_that_hold_a_secret_are_refused(wrong):
    with pytest.raises(ValidationError):
        StorageSettings.model_validate(wrong)


@pytest.mark.parametrize(
    "uri", ["ftp://me:secret@host/in", "http://me:secret@host/x.tar", "simplecache::ftp://me:secret@host/in"]
)
def test_a_password_in_a_uri_is_refused_and_not_repeated(uri):
    with pytest.raises(StorageLocationError) as error_info:
        open_filesystem(uri)
    assert "secret" not in str(error_info.value)


@pytest.mark.parametrize("uri", ["memory://a/b:c@d", "memory://a", "/tmp/a:b@c"])
def test_what_only_looks_like_one_is_no_password(uri):
    open_filesystem(uri)


def test_workers_get_the_drivers_variables(monkeypatch):
    driver = {
        "AWS_ACCESS_KEY_ID": "key-1",
        "AWS_SECRET_ACCESS_KEY": "secret-1",
        "AWS_ENDPOINT_URL": "http://minio:9000",
        "HF_TOKEN": "token-1",
        "AWS_PROFILE": "on this machine alone",
        "PATH": "/bin",
    }
    connection = resolve_connection(NOTHING, NOTHING, "", driver)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of the node's own role")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of the node's own role")
    for name in driver.keys() - {"PATH"}:
        monkeypatch.setenv(name, "before")
    with connected(Connection()):
        connect(connection)
        assert os.environ["AWS_SECRET_ACCESS_KEY"] == "secret-1"
        assert os.environ["AWS_ENDPOINT_URL"] == "http://minio:9000"
        assert os.environ["HF_TOKEN"] == "token-1"
        # A token of another identity would spoil the keys.
        assert "AWS_SESSION_TOKEN" not in os.environ
        # These name what only this machine has.
        assert os.environ["AWS_PROFILE"] == "before"
        assert os.environ["PATH"] != "/bin"


def test_a_driver_without_credentials_leaves_the_nodes_theirs(monkeypatch):
    for name in CREDENTIALS:
        monkeypatch.setenv(name, "of the node's own role")
    with connected(Connection()):
        connect(resolve_connection(NOTHING, NOTHING, "", {"PATH": "/bin"}))
    assert {os.environ[name] for name in CREDENTIALS} == {"of the node's own role"}


@pytest.mark.parametrize(("protocol", "extra"), [("gs", "gs"), ("gcs", "gs"), ("hf", "hf"), ("s3", "s3")])
def test_a_missing_library_names_the_extra(monkeypatch, protocol, extra):
    monkeypatch.delitem(_registry, protocol, raising=False)
    for module in ("gcsfs", "huggingface_hub", "s3fs"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'acsr-ray\[{extra}\]'") as error_info:
        open_filesystem(f"{protocol}://bucket/x")
    assert error_info.value.exit_code == 2


def test_an_unknown_scheme_is_an_error_of_the_user():
    with pytest.raises(StorageLocationError, match=r"foo://bar cannot be opened.*foo"):
        open_filesystem("foo://bar")


@pytest.mark.parametrize("protocol", ["gs", "hf"])
def test_a_corpus_is_read_from_any_store(made, protocol, tmp_path, write_shard):
    data = write_shard(tmp_path / "a.parquet", 5).read_bytes()
    store = MemoryFileSystem()
    store.pipe("/any-store/in/a.parquet", data)
    try:
        units = plan_units(
            f"{protocol}://any-store/in", image_column="image", unit_rows=3, unit_megabytes=32.0, limit=None
        )
        assert [unit.uri for unit in units] == [f"{protocol}:///any-store/in/a.parquet"] * 2
        assert sum(read_unit(unit).num_rows for unit in units) == 5
    finally:
        store.rm("/any-store", recursive=True)


def test_an_output_is_only_where_it_can_be_created_without_replacing(made):
    with pytest.raises(StorageLocationError, match="cannot be at gs://"):
        open_storage("gs://bucket/out")
